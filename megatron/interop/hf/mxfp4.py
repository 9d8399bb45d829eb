"""MXFP4 experts, as gpt-oss is released, dequantised while they are read.

A stack of matrices [E, R, C] is stored as `NAME_blocks` [E, R, C / 32, 16] and `NAME_scales`
[E, R, C / 32], bytes both. A block has 32 numbers of four bits, two in each byte with the lower
bits first: a sign, two bits of exponent and one of mantissa (e2m1). They are multiplied by 2 to the
power of the block's scale - 127. Their unquantised form, which families map, is transposed,
[E, C, R], and in bf16, in which every such number is exact.

Source: OCP Microscaling Formats specification 1.0 (2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.config.fields import require, shortened
from megatron.interop.hf.file_tensor import FileTensor, SourceTensor

_BLOCKS = "_blocks"
_SCALES = "_scales"
_BYTES = 16
"""Bytes of a block"""
_SIZE = 2 * _BYTES
"""Numbers of a block"""
_BIAS = 127
"""Scale that stands for 1"""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Numbers by their lower three bits; the fourth is the sign"""


@dataclass(frozen=True)
class MXFP4Tensor:
    """A stack of transposed matrices in MXFP4 whose ranges are read as bf16."""

    blocks: FileTensor
    scales: FileTensor
    dtype: torch.dtype = torch.bfloat16
    """Dtype in which export writes the tensor"""

    @property
    def file(self) -> str:
        """Name of the file with the blocks."""
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unquantised tensor, [E, C, R]."""
        experts, rows, num_blocks, _ = self.blocks.shape
        return (experts, num_blocks * _SIZE, rows)

    def read(self, start: int, length: int) -> Tensor:
        """Return elements `start` to `start + length` of the flattened tensor, bf16 [length].

        The matrices that the range touches are dequantised one at a time.

        Raises:
            OSError: A file cannot be read, or has become shorter.
        """
        matrix_size = math.prod(self.shape[1:])
        parts = [torch.empty(0, dtype=torch.bfloat16)]
        position = start
        while position < start + length:
            expert, first = divmod(position, matrix_size)
            count = min(matrix_size - first, start + length - position)
            parts.append(self._matrix(expert).flatten()[first : first + count])
            position += count
        return torch.cat(parts)

    def _matrix(self, expert: int) -> Tensor:
        """Return a matrix of the unquantised tensor, bf16 [C, R]."""
        _, rows, num_blocks, _ = self.blocks.shape
        count = rows * num_blocks
        bytes_NB = self.blocks.read(expert * count * _BYTES, count * _BYTES).view(count, _BYTES)
        scale_N = self.scales.read(expert * count, count)
        values_RC = dequantize_blocks(bytes_NB, scale_N).view(rows, -1)
        return values_RC.t()


def dequantize_blocks(bytes_NB: Tensor, scale_N: Tensor) -> Tensor:
    """Return the numbers of blocks.

    Args:
        bytes_NB: uint8 [N, 16].
        scale_N: uint8 [N].
    Returns:
        bf16 [N, 32].
    """
    numbers = torch.tensor((*_MAGNITUDES, *(-number for number in _MAGNITUDES)))
    low_NB = numbers[(bytes_NB & 15).int()]
    high_NB = numbers[(bytes_NB >> 4).int()]
    values_NS = torch.stack((low_NB, high_NB), -1).flatten(1)
    exponent_N1 = scale_N.int().unsqueeze(1) - _BIAS
    return torch.ldexp(values_NS, exponent_N1).bfloat16()


def dequantize_mxfp4(
    stored: dict[str, FileTensor], quantization: Mapping[str, Any]
) -> dict[str, SourceTensor]:
    """Return the tensors of a source with MXFP4 experts, without their blocks and scales.

    Args:
        stored: Tensors as they are in the files, by name.
        quantization: Value of quantization_config.

    Raises:
        ValueError: Blocks have no scales, or scales no blocks, or their shapes or dtypes do not
            belong together.
    """
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in stored.items():
        base = name.removesuffix(_BLOCKS)
        if name.endswith(_SCALES):
            _require_tensor(name.removesuffix(_SCALES) + _BLOCKS, name, stored)
        elif base == name:
            tensors[name] = tensor
        else:
            scales = _require_tensor(base + _SCALES, name, stored)
            _check(base, tensor, scales)
            tensors[base] = MXFP4Tensor(tensor, scales)
    return tensors


def _require_tensor(name: str, other: str, stored: Mapping[str, FileTensor]) -> FileTensor:
    """Return a tensor that another one needs."""
    if name not in stored:
        raise ValueError(
            f"the tensor {shortened(name)} is missing, without which {shortened(other)} has no "
            "values. Download the model's files again"
        )
    return stored[name]


def _check(name: str, blocks: FileTensor, scales: FileTensor) -> None:
    """Raise ValueError if blocks and scales do not belong together."""
    require(
        len(blocks.shape) == 4 and blocks.shape[-1] == _BYTES,
        f"the shape of the tensor {name}{_BLOCKS}",
        list(blocks.shape),
        f"[experts, rows, blocks, {_BYTES}]",
    )
    require(
        scales.shape == blocks.shape[:-1],
        f"the shape of the tensor {name}{_SCALES}",
        list(scales.shape),
        f"{list(blocks.shape[:-1])}, one scale for each block",
    )
    for suffix, tensor in ((_BLOCKS, blocks), (_SCALES, scales)):
        what = f"the dtype of the tensor {name}{suffix}"
        require(tensor.dtype == torch.uint8, what, str(tensor.dtype), "torch.uint8")
