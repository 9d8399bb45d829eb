"""Tensors of a checkpoint: rank files of shards, their index, and reading ranges of full tensors.

A *shard* is a contiguous range of a flattened tensor. Whatever ZeRO stage and expert-parallel size
wrote a checkpoint, each rank's part of a tensor is one shard of it, so a run of any other topology
can read the ranges that it needs.

    index.json   {"tensors": {name: {"shape": [...], "pieces": [[rank, start, length], ...]}},
                  "kinds": ["weight", "exp_avg", "exp_avg_sq"], "buffers": [name, ...]}
                 A tensor with "frozen": true was not trained and has its weight only.
    rank_00003.safetensors   "<state key>/<name>": 1-D shards; "rng/<device>"; in rank 0's file also
                             "buffer/<name>": full buffers
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron.io.safetensors_writer import (
    TORCH_DTYPES,
    SafetensorsWriter,
    TensorSpec,
    read_header,
)
from megatron.io.sha256 import FileDigest

SLICE_ELEMENTS = 1 << 20
"""Elements that `CheckpointReader.slices` holds in memory"""


class ShardRange(NamedTuple):
    """A range of a flattened tensor that a rank's file holds."""

    name: str
    """Name of the tensor"""
    start: int
    """First element in the flattened full tensor"""
    length: int
    """Number of elements"""


def rank_file_name(rank: int) -> str:
    """Return the name of the file with a rank's shards."""
    return f"rank_{rank:05d}.safetensors"


class CheckpointReader:
    """Reads full tensors of a checkpoint, or ranges of them, into ordinary memory.

    Files are read rather than mapped: a mapped file could change later.

    Args:
        path: Directory of the checkpoint, whose files were verified.

    Raises:
        OSError: A file ends too early or is missing; also raised by the methods.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = json.loads((self.path / "index.json").read_text(encoding="utf-8"))
        self.state_keys: list[str] = index["kinds"]
        """What is stored of a trained parameter: weight and moments, such as exp_avg"""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shapes of the full parameters, by name"""
        self.buffers: list[str] = index["buffers"]
        """Names of the model's buffers"""
        self.frozen: set[str] = set()
        """Names of the parameters that were not trained, of which only the weight is stored"""
        self._shards: dict[str, list[list[int]]] = {}
        for name, tensor in index["tensors"].items():
            self.shapes[name] = tuple(tensor["shape"])
            self._shards[name] = tensor["pieces"]
            if tensor.get("frozen", False):
                self.frozen.add(name)
        self._headers: dict[int, tuple[dict[str, dict], int]] = {}

    def read(
        self, state_key: str, name: str, start: int = 0, length: int | None = None
    ) -> Tensor:
        """Read elements `start` to `start + length` of a flattened tensor, by default all of it.

        Args:
            state_key: one of `state_keys`.

        Returns:
            A 1-D tensor [length] in the stored dtype.
        """
        total = math.prod(self.shapes[name])
        if length is None:
            length = total - start
        stop = start + length
        assert start >= 0 and stop <= total, f"{name} has {total} elements"
        key = f"{state_key}/{name}"
        overlaps = self._overlaps(name, start, stop)
        if not overlaps:
            return torch.empty(0)
        if len(overlaps) == 1:
            rank, offset, size = overlaps[0]
            return self._read_range(rank, key, offset, size)
        out = torch.empty(length, dtype=self.dtype(state_key, name))
        position = 0
        for rank, offset, size in overlaps:
            out[position : position + size] = self._read_range(rank, key, offset, size)
            position += size
        return out

    def _overlaps(self, name: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Find where elements `start` to `stop` of a flattened tensor are stored.

        Returns:
            (rank, offset inside its shard, number of elements) of consecutive ranges.
        """
        overlaps = []
        position = start
        for rank, shard_start, shard_length in self._shards[name]:
            low = max(start, shard_start)
            high = min(stop, shard_start + shard_length)
            if low >= high:
                continue
            if low != position:
                break
            overlaps.append((rank, low - shard_start, high - low))
            position = high
        if position != stop:
            raise ValueError(
                f"{self.path / 'index.json'}: no file has element {position} of {name}"
            )
        return overlaps

    def slices(self, state_key: str, name: str) -> Iterator[Tensor]:
        """Yield a flattened tensor in consecutive slices, so that it need not fit in memory."""
        total = math.prod(self.shapes[name])
        for start in range(0, total, SLICE_ELEMENTS):
            yield self.read(state_key, name, start, min(SLICE_ELEMENTS, total - start))

    def dtype(self, state_key: str, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor; float32 for a tensor without elements."""
        shards = self._shards[name]
        if not shards:
            return torch.float32
        first_rank = shards[0][0]
        header, _ = self._header(first_rank)
        return TORCH_DTYPES[header[f"{state_key}/{name}"]["dtype"]]

    def num_shards(self, name: str) -> int:
        """Return the number of shards that a tensor is stored in."""
        return len(self._shards[name])

    def buffer_spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a buffer."""
        header, _ = self._header(0)
        stored = header[f"buffer/{name}"]
        return TensorSpec(name, TORCH_DTYPES[stored["dtype"]], tuple(stored["shape"]))

    def buffer(self, name: str) -> Tensor:
        """Read a buffer of the model, in its full shape."""
        shape = self.buffer_spec(name).shape
        return self._read_range(0, f"buffer/{name}", 0, math.prod(shape)).reshape(shape)

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Read the random states of a rank, by device."""
        header, _ = self._header(rank)
        states = {}
        for key, stored in header.items():
            if key.startswith("rng/"):
                state = self._read_range(rank, key, 0, stored["shape"][0])
                states[key.removeprefix("rng/")] = state
        return states

    def _header(self, rank: int) -> tuple[dict[str, dict], int]:
        if rank not in self._headers:
            self._headers[rank] = read_header(self.path / rank_file_name(rank))
        return self._headers[rank]

    def _read_range(self, rank: int, key: str, start: int, length: int) -> Tensor:
        """Read `length` elements from element `start` of a tensor of a rank's file."""
        header, data_offset = self._header(rank)
        dtype = TORCH_DTYPES[header[key]["dtype"]]
        if length == 0:
            return torch.empty(0, dtype=dtype)
        nbytes = length * dtype.itemsize
        offset = data_offset + header[key]["data_offsets"][0] + start * dtype.itemsize
        path = self.path / rank_file_name(rank)
        raw = np.fromfile(path, np.uint8, nbytes, offset=offset)
        if len(raw) < nbytes:
            raise OSError(f"{path} ends inside {key}: it is damaged, or was changed while read")
        return torch.from_numpy(raw).view(dtype)


def make_index(
    shards: Sequence[Sequence[ShardRange]],
    shapes: dict[str, tuple[int, ...]],
    state_keys: Sequence[str],
    buffers: Sequence[str],
    frozen: Collection[str] = (),
) -> dict:
    """Return the content of index.json.

    Args:
        shards: The shards of every rank, in order of ranks.
        shapes: Shapes of the full parameters, by name.
        state_keys: What is stored of a trained parameter.
        buffers: Names of the buffers in the file of rank 0.
        frozen: Names of the parameters that are not trained.
    """
    tensors: dict[str, dict] = {}
    for name, shape in shapes.items():
        tensors[name] = {"shape": list(shape), "pieces": []}
        if name in frozen:
            tensors[name]["frozen"] = True
    for rank, rank_shards in enumerate(shards):
        for name, start, length in rank_shards:
            tensors[name]["pieces"].append([rank, start, length])
    for name, tensor in tensors.items():
        tensor["pieces"].sort(key=lambda piece: piece[1])
        _require_partition(name, tensor)
    return {"tensors": tensors, "kinds": list(state_keys), "buffers": list(buffers)}


def _require_partition(name: str, tensor: dict) -> None:
    """Assert that the shards of a tensor hold each of its elements exactly once."""
    stop = 0
    for _, start, length in tensor["pieces"]:
        assert start == stop, (
            f"the ranks' shards of {name} overlap or leave a gap at element {stop}"
        )
        stop += length
    assert stop == math.prod(tensor["shape"]), (
        f"the ranks have {stop} elements of {name}, {tensor['shape']}"
    )


def write_tensors(
    path: str | Path,
    specs: Sequence[TensorSpec],
    get: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> FileDigest:
    """Write a safetensors file, requesting its tensors one at a time.

    Args:
        get: Returns the tensor of a name.
        metadata: Strings for the header.
    """
    with SafetensorsWriter(path, specs, metadata) as writer:
        for spec in writer.specs:
            writer.write(get(spec.name))
        return writer.finish()
