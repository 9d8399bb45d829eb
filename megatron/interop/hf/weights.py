"""Ranges of our tensors from a Hugging Face folder, and ranges of theirs from our tensors.

Everything is read by the range that is written, so that memory holds a few blocks: a matrix of one
expert, or a slice of a matrix that has the same elements in the same order in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.shards import SLICE_ELEMENTS
from megatron.config.schema import RunConfig
from megatron.interop.hf.config_map import complete
from megatron.interop.hf.source import HFSource
from megatron.interop.hf.tensor_map import (
    BlockLink,
    TensorMap,
    account_for_all,
    find_layout,
    map_tensors,
)
from megatron.interop.hf.transforms import Shape

OUTPUT_WEIGHT = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"

ReadRange = Callable[[str, int, int], Tensor]
"""Returns elements `start` to `start + length` of the flattened tensor `name`, 1-D"""


class HFWeights:
    """Our tensors, read from the tensors of a source.

    Args:
        source: The folder.
        config: Configuration of the model, from the source's config.json.
        shapes: Full shapes of our parameters and buffers by name.

    Raises:
        ValueError: A tensor of the source is missing, unknown or has another shape.
    """

    def __init__(self, source: HFSource, config: RunConfig, shapes: Mapping[str, Shape]):
        self.source = source
        self.config = config
        self.shapes = dict(shapes)
        found = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
        self.layout = find_layout(source.family, self.shapes, found)
        """Layout of the source's experts; None: its family has one layout"""
        self.map = map_tensors(source.family, self.layout, self.shapes)
        self.duplicates = self._find_duplicates(found)
        """Names of tensors of the source that are copies of another one"""
        completed = complete(source.family, source.config)
        self.unused = account_for_all(
            source.family, completed, self.map, found, self.duplicates
        )
        """Tensors of the source that the model does not have"""
        self._cached_block: tuple[str, int, Tensor] | None = None

    def _find_duplicates(self, found: Mapping[str, Shape]) -> tuple[str, ...]:
        """Return the output layer of a source whose embeddings are tied, if it is stored."""
        if OUTPUT_WEIGHT in self.map.shapes or OUTPUT_WEIGHT not in found:
            return ()
        embedding = self.map.ours[EMBEDDING][0].theirs
        if found.get(embedding) != found[OUTPUT_WEIGHT] or not self._are_equal(embedding):
            raise ValueError(
                f"config.json ties the embeddings, but {OUTPUT_WEIGHT} differs from "
                f"{embedding}. Set tie_word_embeddings to false to keep both"
            )
        return (OUTPUT_WEIGHT,)

    def _are_equal(self, embedding: str) -> bool:
        """Return whether the stored output layer has the values of the embedding."""
        first = self.source.tensors[embedding]
        second = self.source.tensors[OUTPUT_WEIGHT]
        for start, length in slices(math.prod(first.shape)):
            # Not torch.equal: NaN in both is no difference.
            pair = (first.read(start, length), second.read(start, length))
            if not torch.allclose(*pair, rtol=0, atol=0, equal_nan=True):
                return False
        return True

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return elements `start` to `start + length` of a flattened tensor of ours: fp32 [length].

        Raises:
            OSError: A file cannot be read.
        """
        links = self.map.ours[name]
        block_size = links[0].numel
        out = torch.empty(length)
        position = 0
        while position < length:
            number, first = divmod(start + position, block_size)
            count = min(block_size - first, length - position)
            out[position : position + count] = self._read_block(links[number], first, count)
            position += count
        return out

    def buffer(self, name: str) -> Tensor:
        """Return a buffer of ours in its full shape, fp32."""
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)

    def _read_block(self, link: BlockLink, start: int, length: int) -> Tensor:
        """Return a range of one block of ours, in the source's dtype."""
        tensor = self.source.tensors[link.theirs]
        their_size = math.prod(link.their_block_shape)
        if link.transform.offset is not None:
            offset = link.slot * their_size + link.transform.offset(link.shape)
            return tensor.read(offset + start, length)
        theirs = self._read_their_block(link, their_size)
        ours = link.transform.take(theirs, link.shape, self.config)
        return ours.reshape(-1)[start : start + length]

    def _read_their_block(self, link: BlockLink, size: int) -> Tensor:
        """Return a block of theirs, which consecutive ranges of ours need again."""
        cached = self._cached_block
        if cached is not None and cached[:2] == (link.theirs, link.slot):
            return cached[2]
        self._cached_block = None  # frees its memory first
        tensor = self.source.tensors[link.theirs]
        block = tensor.read(link.slot * size, size).view(link.their_block_shape)
        self._cached_block = (link.theirs, link.slot, block)
        return block


class HFTensors:
    """Their tensors, made of ranges of ours.

    Args:
        tensor_map: Map of the model's tensors.
        config: Configuration of the model.
        read: Returns ranges of our tensors, as `CheckpointReader.read` does for weights.
    """

    def __init__(self, tensor_map: TensorMap, config: RunConfig, read: ReadRange):
        self.map = tensor_map
        self.config = config
        self._read = read

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor of theirs in consecutive ranges of its flattened elements.

        The ranges have the dtype of our tensor.
        """
        by_slot: dict[int, list[BlockLink]] = {}
        for link in self.map.theirs[name]:
            by_slot.setdefault(link.slot, []).append(link)
        for slot in sorted(by_slot):
            yield from self._block_parts(by_slot[slot])

    def _block_parts(self, links: list[BlockLink]) -> Iterator[Tensor]:
        """Yield a block of theirs; its links are all that it consists of."""
        if all(link.transform.offset is not None for link in links):
            for link in sorted(links, key=_offset):
                first = link.index * link.numel
                for start, length in slices(link.numel):
                    yield self._read(link.ours, first + start, length)
            return
        theirs: Tensor | None = None
        for link in links:
            ours = self._read(link.ours, link.index * link.numel, link.numel).view(link.shape)
            if theirs is None:
                theirs = torch.empty(link.their_block_shape, dtype=ours.dtype)
            link.transform.put(theirs, ours, self.config)
        assert theirs is not None
        yield theirs

    def read_full(self, name: str) -> Tensor:
        """Return a tensor of theirs in its full shape."""
        parts = [part.reshape(-1) for part in self.parts(name)]
        return torch.cat(parts).view(self.map.shapes[name])


def _offset(link: BlockLink) -> int:
    assert link.transform.offset is not None
    return link.transform.offset(link.shape)


def slices(numel: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of consecutive slices of a flattened tensor."""
    for start in range(0, numel, SLICE_ELEMENTS):
        yield start, min(SLICE_ELEMENTS, numel - start)


def read_from(tensors: Mapping[str, Any]) -> ReadRange:
    """Return a function that reads ranges of tensors in memory, such as gradients by name."""

    def read(name: str, start: int, length: int) -> Tensor:
        return tensors[name].reshape(-1)[start : start + length]

    return read
