"""Write a safetensors file one tensor at a time, and read the header of one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.io.atomic_write import errors_with_path
from megatron.io.sha256 import FileDigest
from megatron.io.untrusted import open_regular, parse_json

_CHUNK_BYTES = 16 << 20
_MOST_DIMENSIONS = 64
"""Dimensions that a tensor of torch may have"""

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

TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
"""Dtypes of the files that are written here"""

FOREIGN_DTYPES = {**TORCH_DTYPES, "F8_E4M3": torch.float8_e4m3fn}
"""Dtypes of the files of others that can be read: with those of quantised weights"""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor of a file that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Context manager that writes a safetensors file without holding all of its tensors.

    The safetensors package needs all tensors of a file in memory; this writer needs one, or a
    part of one.

    Args:
        path: The file, which is written directly: rename it when it is finished.
        specs: The tensors that will be written. Tensors of wide dtypes come first, so that all
            are aligned; attribute `specs` has the order in which `write` expects them.
        metadata: Strings for the header.

    Raises:
        OSError: The file cannot be written; the message names it.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Sequence[TensorSpec],
        metadata: dict[str, str] | None = None,
    ):
        self.path = str(path)
        self.specs = in_file_order(specs)
        self.nbytes = 0
        """Bytes written so far"""
        self._next = 0
        self._sha256 = hashlib.sha256()
        header = _header(self.specs, metadata)
        with errors_with_path(self.path):
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._put(memoryview(struct.pack("<Q", len(header)) + header))

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor, which may be on any device."""
        spec = self.specs[self._next]
        assert tensor.shape == spec.shape, (
            f"a tensor of shape {tuple(tensor.shape)} does not match {spec}"
        )
        self.write_parts([tensor])

    def write_parts(self, parts: Iterable[Tensor]) -> None:
        """Write the next tensor as consecutive ranges of its elements, each of any shape."""
        spec = self.specs[self._next]
        self._next += 1
        missing = math.prod(spec.shape)
        for part in parts:
            missing -= part.numel()
            assert part.dtype == spec.dtype and missing >= 0, (
                f"a part of {part.numel()} elements of {part.dtype} does not match {spec}"
            )
            if part.numel():
                flat = part.detach().reshape(-1).cpu().contiguous()
                self._put(memoryview(flat.view(torch.uint8).numpy()))
        assert missing == 0, f"{missing} elements of {spec} are missing"

    def _put(self, data: memoryview) -> None:
        with errors_with_path(self.path):
            for start in range(0, len(data), _CHUNK_BYTES):
                chunk = data[start : start + _CHUNK_BYTES]
                self._sha256.update(chunk)
                while len(chunk):
                    written = self._file.write(chunk)
                    chunk = chunk[written:]
        self.nbytes += len(data)

    def finish(self) -> FileDigest:
        """Sync the file to the disk, close it and return its size and SHA-256."""
        missing = len(self.specs) - self._next
        assert missing == 0, f"{missing} announced tensors are missing"
        with errors_with_path(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
        return FileDigest(self.nbytes, self._sha256.hexdigest())

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _header(specs: Sequence[TensorSpec], metadata: dict[str, str] | None) -> bytes:
    """Return the JSON header of a file, padded so that its data are aligned to 8 bytes."""
    header = {}
    if metadata:
        header["__metadata__"] = metadata
    offset = 0
    for spec in specs:
        assert spec.name not in header, f"two tensors have the name {spec.name}"
        header[spec.name] = {
            "dtype": SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def in_file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return the specs with wide dtypes first, so that every tensor of a file is aligned."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


def read_header(
    path: str | Path, dtypes: Mapping[str, torch.dtype] = TORCH_DTYPES
) -> tuple[dict[str, dict], int]:
    """Read and check the header of a safetensors file.

    Args:
        dtypes: The allowed dtypes by their name in the header.

    Returns:
        ({tensor: {"dtype", "shape", "data_offsets"}}, position of the first byte of data). Every
        dtype is allowed, and the size of every tensor is that of its shape and dtype. A tensor
        may end behind the end of a truncated file.

    Raises:
        ValueError: The file is not a safetensors file; the message names it.
        OSError: It cannot be read.
    """
    header, data_start = _read_raw_header(path)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_tensor_entry(entry, dtypes):
            raise ValueError(
                f"{path} is not a safetensors file that can be read: the entry of tensor "
                f"{name[:200]!r} is {str(entry)[:200]}; allowed dtypes: {' '.join(dtypes)}"
            )
    return header, data_start


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the strings that a safetensors file has in its header; none: an empty dict.

    Raises:
        ValueError: The file is not a safetensors file, or has other values than strings there;
            the message names the file.
        OSError: It cannot be read.
    """
    header, _ = _read_raw_header(path)
    metadata = header.get("__metadata__", {})
    is_valid = isinstance(metadata, dict)
    if not is_valid or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(
            f"{path} is not a safetensors file: __metadata__ of its header is "
            f"{str(metadata)[:200]}; allowed: strings by name"
        )
    return metadata


def _read_raw_header(path: str | Path) -> tuple[dict[str, Any], int]:
    """Return the JSON object at the beginning of a file, and where its data begin."""
    with open_regular(path) as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path} is not a safetensors file: it has {len(prefix)} bytes")
        if prefix == b"version ":  # as a length, 2.3e18 bytes
            raise ValueError(
                f"{path} is not a safetensors file: it is a pointer of Git LFS to one. Download "
                "the file itself, with git lfs pull"
            )
        (length,) = struct.unpack("<Q", prefix)
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError(
                f"{path} is not a safetensors file: its header is longer than the file"
            )
        raw = file.read(length)
    try:
        header = parse_json(raw.decode())
    except ValueError as error:
        raise ValueError(
            f"{path} is not a safetensors file: its header is not JSON: {error}"
        ) from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is not a JSON object")
    return header, 8 + length


def _is_tensor_entry(entry: Any, dtypes: Mapping[str, torch.dtype]) -> bool:
    """Return whether an entry of a header has a known dtype and positions that fit its shape."""
    if not isinstance(entry, dict) or str(entry.get("dtype")) not in dtypes:
        return False
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        return False
    nbytes = math.prod(shape) * dtypes[entry["dtype"]].itemsize
    return offsets[1] - offsets[0] == nbytes


def _are_counts(values: Any) -> bool:
    """Return whether a JSON value is a list of sizes or positions in a file."""
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)
