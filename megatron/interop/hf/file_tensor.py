"""Tensors of safetensors files, of which only headers are read until their values are needed."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron.config.fields import require
from megatron.io.safetensors_writer import FOREIGN_DTYPES, read_header
from megatron.io.untrusted import open_regular


class SourceTensor(Protocol):
    """A tensor of a source, in the form in which a family maps it."""

    @property
    def file(self) -> str:
        """Name of the file that has it, or its main part."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which export writes the tensor; `read` may return a wider one."""
        ...

    def read(self, start: int, length: int) -> Tensor:
        """Return elements `start` to `start + length` of the flattened tensor."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """A tensor as it is in a safetensors file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    position: int
    """First byte in the file"""

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.path.name

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self, start: int, length: int) -> Tensor:
        """Return elements `start` to `start + length` of the flattened tensor.

        Raises:
            OSError: The file cannot be read, or has become shorter.
        """
        assert start >= 0 and start + length <= self.numel, f"{self} has no such range"
        if not length:
            return torch.empty(0, dtype=self.dtype)
        nbytes = length * self.dtype.itemsize
        offset = self.position + start * self.dtype.itemsize
        with open_regular(self.path) as file:
            raw = np.fromfile(file, np.uint8, nbytes, offset=offset)
        if len(raw) < nbytes:
            raise OSError(f"{self.path} has become shorter while it was read")
        return torch.from_numpy(raw).view(self.dtype)


def read_file_tensors(path: Path) -> dict[str, FileTensor]:
    """Read the header of a safetensors file.

    Returns:
        Its tensors by name, in the order of their positions.

    Raises:
        ValueError: It is not one, or is truncated.
    """
    header, data_start = read_header(path, FOREIGN_DTYPES)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = {}
    end = 0
    for name, entry in entries:
        start, end = entry["data_offsets"]
        dtype = FOREIGN_DTYPES[entry["dtype"]]
        tensors[name] = FileTensor(path, tuple(entry["shape"]), dtype, data_start + start)
    size = os.path.getsize(path)
    require(
        size == data_start + end,
        f"the size of {path}",
        size,
        f"{data_start + end} bytes, as its header says",
        "The file is truncated or damaged: download it again.",
    )
    return tensors
