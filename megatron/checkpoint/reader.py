"""Tensors on disk: safetensors files written piece by piece, and ranges of whole tensors read from pieces.

A *piece* is a contiguous range of a flattened tensor. Whatever ZeRO stage and expert-parallel size wrote a checkpoint,
each rank's part of a tensor is one piece of it, so a run of any other topology can read the ranges it needs.

    index.json   {"tensors": {name: {"shape": [...], "pieces": [[rank, start, length], ...]}},
                  "kinds": ["weight", "exp_avg", "exp_avg_sq"], "buffers": [name, ...]}
    rank_00003.safetensors   "<kind>/<name>" 1-D pieces; in rank 0's also "buffer/<name>", whole; "rng/<device>"
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.io.safetensors_writer import BY_NAME, SafetensorsWriter, TensorSpec, read_header

SLICE = 1 << 20  # elements of a tensor that is read in slices


def shard_name(rank: int) -> str:
    """File of a rank's pieces."""
    return f"rank_{rank:05d}.safetensors"


class CheckpointReader:
    """The tensors of a checkpoint's folder, whole or in ranges. What is read is ordinary memory, never a mapped file.

    Args:
        path: the folder; its files were checked against the manifest.

    Raises:
        OSError: a file ends too early, or is not there any more.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = json.loads((self.path / "index.json").read_text(encoding="utf-8"))
        self.kinds: list[str] = index["kinds"]
        self.shapes: dict[str, tuple[int, ...]] = {
            n: tuple(t["shape"]) for n, t in index["tensors"].items()
        }
        self.buffers: list[str] = index["buffers"]
        self._pieces = {n: t["pieces"] for n, t in index["tensors"].items()}
        self._headers: dict[int, tuple[dict[str, dict], int]] = {}

    def read(self, kind: str, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements `start` to `start + length` of a flattened tensor, 1-D; by default all.

        Args:
            kind: weight, exp_avg, exp_avg_sq.
        """
        total = math.prod(self.shapes[name])
        length = total - start if length is None else length
        assert start >= 0 and start + length <= total, f"{name} has {total} elements"
        out, end = None, start
        for rank, first, size in self._pieces[name]:
            low, high = max(start, first), min(start + length, first + size)
            if low < high:
                if low != end:
                    break
                end = high
                part = self._range(rank, f"{kind}/{name}", low - first, high - low)
                if out is None:
                    out = part if len(part) == length else part.new_empty(length)
                if out is not part:
                    out[low - start : high - start] = part
        if end != start + length:
            raise ValueError(f"{self.path / 'index.json'}: no file has element {end} of {name}")
        return torch.empty(0) if out is None else out

    def slices(self, kind: str, name: str) -> Iterator[Tensor]:
        """A flattened tensor in consecutive ranges, so that it need not be in memory whole."""
        total = math.prod(self.shapes[name])
        for start in range(0, total, SLICE):
            yield self.read(kind, name, start, min(SLICE, total - start))

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """As which a tensor is stored; float32 if it has no elements."""
        pieces = self._pieces[name]
        return (
            BY_NAME[self._header(pieces[0][0])[0][f"{kind}/{name}"]["dtype"]]
            if pieces
            else torch.float32
        )

    def num_pieces(self, name: str) -> int:
        """Of a tensor."""
        return len(self._pieces[name])

    def buffer_entry(self, name: str) -> TensorSpec:
        """What a buffer is."""
        stored = self._header(0)[0][f"buffer/{name}"]
        return TensorSpec(name, BY_NAME[stored["dtype"]], tuple(stored["shape"]))

    def buffer(self, name: str) -> Tensor:
        """A buffer of the model, whole."""
        shape = self.buffer_entry(name).shape
        return self._range(0, f"buffer/{name}", 0, math.prod(shape)).reshape(shape)

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Random states of a rank, by device."""
        header, _ = self._header(rank)
        names = [name for name in header if name.startswith("rng/")]
        return {
            n.removeprefix("rng/"): self._range(rank, n, 0, header[n]["shape"][0])
            for n in names
        }

    def _header(self, rank: int) -> tuple[dict[str, dict], int]:
        if rank not in self._headers:
            self._headers[rank] = read_header(self.path / shard_name(rank))
        return self._headers[rank]

    def _range(self, rank: int, name: str, first: int, length: int) -> Tensor:
        header, data = self._header(rank)
        dtype = BY_NAME[header[name]["dtype"]]
        where = data + header[name]["data_offsets"][0] + first * dtype.itemsize
        path = self.path / shard_name(rank)
        raw = np.fromfile(path, np.uint8, length * dtype.itemsize, offset=where)
        if len(raw) < length * dtype.itemsize:
            raise OSError(f"{path} ends inside {name}: it is damaged, or was changed meanwhile")
        return torch.from_numpy(raw).view(dtype) if length else torch.empty(0, dtype=dtype)


def make_index(
    pieces: Sequence[Sequence[tuple[str, int, int]]],
    shapes: dict[str, tuple[int, ...]],
    kinds: Sequence[str],
    buffers: Sequence[str],
) -> dict:
    """Content of index.json.

    Args:
        pieces: by rank, (tensor, start, length) of each of its pieces.
    """
    tensors = {name: {"shape": list(shape), "pieces": []} for name, shape in shapes.items()}
    for rank, owned in enumerate(pieces):
        for name, start, length in owned:
            tensors[name]["pieces"].append([rank, start, length])
    for name, tensor in tensors.items():
        tensor["pieces"].sort(key=lambda piece: piece[1])
        end = 0
        for _, start, length in tensor["pieces"]:
            assert start == end, (
                f"the ranks' pieces of {name} overlap or leave a gap at element {end}"
            )
            end += length
        assert end == math.prod(tensor["shape"]), (
            f"the ranks have {end} elements of {name}, {tensor['shape']}"
        )
    return {"tensors": tensors, "kinds": list(kinds), "buffers": list(buffers)}


def write_tensors(
    path: str | Path,
    entries: Sequence[TensorSpec],
    get: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Write a safetensors file whose tensors are asked for one after the other; returns its (bytes, SHA-256)."""
    with SafetensorsWriter(path, entries, metadata) as writer:
        for entry in writer.entries:
            writer.write(get(entry.name))
        return writer.finish()
