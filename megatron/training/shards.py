"""Tensors on disk: safetensors files written piece by piece, and ranges of whole tensors read from pieces.

A *piece* is a contiguous range of a flattened tensor. Whatever ZeRO stage and expert-parallel size wrote a checkpoint,
each rank's part of a tensor is one piece of it, so a run of any other topology can read the ranges it needs.

    index.json   {"tensors": {name: {"shape": [...], "pieces": [[rank, start, length], ...]}},
                  "kinds": ["weight", "exp_avg", "exp_avg_sq"], "buffers": [name, ...]}
    rank_00003.safetensors   "<kind>/<name>" 1-D pieces; in rank 0's also "buffer/<name>", whole; "rng/<device>"
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.data.work import named_errors

CHUNK = 16 << 20
SLICE = 1 << 20  # elements of a tensor that is read in slices
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shard_name(rank: int) -> str:
    """File of a rank's pieces."""
    return f"rank_{rank:05d}.safetensors"


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, so that no more than one need be in memory. A context manager.

    The safetensors package itself wants all tensors of a file at once.

    Args:
        entries: what will be written, in this order but for the alignment: wide elements come first (see `entries`).
        metadata: strings for the header.

    Raises:
        OSError: the file cannot be written; the message names it.
    """

    def __init__(self, path: str | Path, entries: Sequence[Entry], metadata: dict[str, str] | None = None):
        self.path, self.entries = str(path), in_file_order(entries)
        self._next, self._sha256, self.nbytes = 0, hashlib.sha256(), 0
        header, offset = {"__metadata__": metadata} if metadata else {}, 0
        for e in self.entries:
            header[e.name] = {"dtype": DTYPES[e.dtype], "shape": list(e.shape),
                              "data_offsets": [offset, offset + e.nbytes]}
            offset += e.nbytes
        assert len(header) == len(self.entries) + bool(metadata), "two tensors of one name"
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with named_errors(self.path):
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by close)
        self._put(memoryview(struct.pack("<Q", len(text)) + text))

    def write(self, tensor: Tensor) -> None:
        """The next tensor, from any device."""
        entry = self.entries[self._next]
        assert tensor.shape == entry.shape, f"{tuple(tensor.shape)} is not what {entry} announced"
        self.write_parts([tensor])

    def write_parts(self, parts: Iterable[Tensor]) -> None:
        """The next tensor, as consecutive ranges of it, each of any shape."""
        entry = self.entries[self._next]
        self._next += 1
        left = math.prod(entry.shape)
        for part in parts:
            left -= part.numel()
            assert part.dtype == entry.dtype and left >= 0, f"{part.dtype} or its size is not what {entry} announced"
            if part.numel():
                flat = part.detach().reshape(-1).cpu().contiguous()
                self._put(memoryview(flat.view(torch.uint8).numpy()))
        assert left == 0, f"{left} elements of {entry} are missing"

    def _put(self, data: memoryview) -> None:
        with named_errors(self.path):
            for start in range(0, len(data), CHUNK):
                chunk = data[start:start + CHUNK]
                self._sha256.update(chunk)
                while len(chunk):
                    chunk = chunk[self._file.write(chunk):]
        self.nbytes += len(data)

    def finish(self) -> tuple[int, str]:
        """Sync the file to the disk; returns its (bytes, SHA-256)."""
        assert self._next == len(self.entries), f"{len(self.entries) - self._next} announced tensors are missing"
        with named_errors(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
        return self.nbytes, self._sha256.hexdigest()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def in_file_order(entries: Sequence[Entry]) -> list[Entry]:
    """Wide elements first, so that every tensor of a file is aligned."""
    return sorted(entries, key=lambda e: -e.dtype.itemsize)


def read_header(path: str | Path) -> tuple[dict[str, dict], int]:
    """({tensor: {"dtype", "shape", "data_offsets"}}, position of the first data byte) of a safetensors file."""
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} is no safetensors file: its header is longer than the file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


class Shards:
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
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(t["shape"]) for n, t in index["tensors"].items()}
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
                    out[low - start:high - start] = part
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
        return BY_NAME[self._header(pieces[0][0])[0][f"{kind}/{name}"]["dtype"]] if pieces else torch.float32

    def num_pieces(self, name: str) -> int:
        """Of a tensor."""
        return len(self._pieces[name])

    def buffer_entry(self, name: str) -> Entry:
        """What a buffer is."""
        stored = self._header(0)[0][f"buffer/{name}"]
        return Entry(name, BY_NAME[stored["dtype"]], tuple(stored["shape"]))

    def buffer(self, name: str) -> Tensor:
        """A buffer of the model, whole."""
        shape = self.buffer_entry(name).shape
        return self._range(0, f"buffer/{name}", 0, math.prod(shape)).reshape(shape)

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Random states of a rank, by device."""
        header, _ = self._header(rank)
        names = [name for name in header if name.startswith("rng/")]
        return {n.removeprefix("rng/"): self._range(rank, n, 0, header[n]["shape"][0]) for n in names}

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


def make_index(pieces: Sequence[Sequence[tuple[str, int, int]]], shapes: dict[str, tuple[int, ...]],
               kinds: Sequence[str], buffers: Sequence[str]) -> dict:
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
            assert start == end, f"the ranks' pieces of {name} overlap or leave a gap at element {end}"
            end += length
        assert end == math.prod(tensor["shape"]), f"the ranks have {end} elements of {name}, {tensor['shape']}"
    return {"tensors": tensors, "kinds": list(kinds), "buffers": list(buffers)}


def write_tensors(path: str | Path, entries: Sequence[Entry], get: Callable[[str], Tensor],
                  metadata: dict[str, str] | None = None) -> tuple[int, str]:
    """Write a safetensors file whose tensors are asked for one after the other; returns its (bytes, SHA-256)."""
    with SafetensorsWriter(path, entries, metadata) as writer:
        for entry in writer.entries:
            writer.write(get(entry.name))
        return writer.finish()
