"""Write a safetensors file one tensor at a time, and read the header of one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.io.atomic_write import errors_with_path

CHUNK = 16 << 20

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

BY_NAME = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, so that no more than one need be in memory. A context manager.

    The safetensors package itself wants all tensors of a file at once.

    Args:
        entries: what will be written, in this order but for the alignment: wide elements come first (see `entries`).
        metadata: strings for the header.

    Raises:
        OSError: the file cannot be written; the message names it.
    """

    def __init__(
        self,
        path: str | Path,
        entries: Sequence[TensorSpec],
        metadata: dict[str, str] | None = None,
    ):
        self.path, self.entries = str(path), in_file_order(entries)
        self._next, self._sha256, self.nbytes = 0, hashlib.sha256(), 0
        header, offset = {"__metadata__": metadata} if metadata else {}, 0
        for e in self.entries:
            header[e.name] = {
                "dtype": SAFETENSORS_DTYPES[e.dtype],
                "shape": list(e.shape),
                "data_offsets": [offset, offset + e.nbytes],
            }
            offset += e.nbytes
        assert len(header) == len(self.entries) + bool(metadata), "two tensors of one name"
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with errors_with_path(self.path):
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by close)
        self._put(memoryview(struct.pack("<Q", len(text)) + text))

    def write(self, tensor: Tensor) -> None:
        """The next tensor, from any device."""
        entry = self.entries[self._next]
        assert tensor.shape == entry.shape, (
            f"{tuple(tensor.shape)} is not what {entry} announced"
        )
        self.write_parts([tensor])

    def write_parts(self, parts: Iterable[Tensor]) -> None:
        """The next tensor, as consecutive ranges of it, each of any shape."""
        entry = self.entries[self._next]
        self._next += 1
        left = math.prod(entry.shape)
        for part in parts:
            left -= part.numel()
            assert part.dtype == entry.dtype and left >= 0, (
                f"{part.dtype} or its size is not what {entry} announced"
            )
            if part.numel():
                flat = part.detach().reshape(-1).cpu().contiguous()
                self._put(memoryview(flat.view(torch.uint8).numpy()))
        assert left == 0, f"{left} elements of {entry} are missing"

    def _put(self, data: memoryview) -> None:
        with errors_with_path(self.path):
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                self._sha256.update(chunk)
                while len(chunk):
                    chunk = chunk[self._file.write(chunk) :]
        self.nbytes += len(data)

    def finish(self) -> tuple[int, str]:
        """Sync the file to the disk; returns its (bytes, SHA-256)."""
        assert self._next == len(self.entries), (
            f"{len(self.entries) - self._next} announced tensors are missing"
        )
        with errors_with_path(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
        return self.nbytes, self._sha256.hexdigest()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def in_file_order(entries: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Wide elements first, so that every tensor of a file is aligned."""
    return sorted(entries, key=lambda e: -e.dtype.itemsize)


def read_header(path: str | Path) -> tuple[dict[str, dict], int]:
    """({tensor: {"dtype", "shape", "data_offsets"}}, position of the first data byte) of a safetensors file."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError(
                f"{path} is no safetensors file: its header is longer than the file"
            )
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length
