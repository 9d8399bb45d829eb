"""FP8 weights with a scale per block, as DeepSeek-V3 is released, dequantised while they are read.

A weight W [R, C] in e4m3 has a second tensor W_scale_inv [ceil(R / 128), ceil(C / 128)] in fp32:
the values are W times the scale of the block that an element is in. Blocks at the edges are
smaller. Weights that stack experts have blocks in each expert.
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

_CONFIG = "config.json: quantization_config"
_SCALE_SUFFIX = "_scale_inv"
_FP8 = torch.float8_e4m3fn
_SCALE_DTYPES = (torch.float32, torch.bfloat16)
_DEFAULT_BLOCK = [128, 128]


@dataclass(frozen=True)
class BlockScaledTensor:
    """A weight in FP8 whose ranges are read as fp32."""

    weight: FileTensor
    scale: FileTensor
    block: tuple[int, int]
    """Rows and columns of a block"""
    dtype: torch.dtype = torch.bfloat16
    """Dtype in which export writes the tensor: DeepSeek's own conversion is to bf16"""

    @property
    def file(self) -> str:
        """Name of the file with the weight."""
        return self.weight.file

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    def read(self, start: int, length: int) -> Tensor:
        """Return elements `start` to `start + length` of the flattened tensor, fp32 [length].

        Raises:
            OSError: A file cannot be read, or has become shorter.
        """
        if not length:
            return torch.empty(0)
        columns = self.shape[-1]
        first_row = start // columns
        end_row = -(-(start + length) // columns)
        num_rows = end_row - first_row
        values = self.weight.read(first_row * columns, num_rows * columns).float()
        self._multiply_by_scales(values.view(num_rows, columns), first_row)
        offset = start - first_row * columns
        return values[offset : offset + length]

    def _multiply_by_scales(self, values_RC: Tensor, first_row: int) -> None:
        """Multiply rows from `first_row` on by the scales of their blocks, in place."""
        block_rows, block_columns = self.block
        rows_of_matrix = self.shape[-2]
        num_rows, columns = values_RC.shape
        scales_per_row = self.scale.shape[-1]
        row = first_row
        while row < first_row + num_rows:
            matrix, row_in_matrix = divmod(row, rows_of_matrix)
            block = row_in_matrix // block_rows
            last = min((block + 1) * block_rows, rows_of_matrix) - row_in_matrix
            end = min(row + last, first_row + num_rows)
            scale_row = matrix * self.scale.shape[-2] + block
            scales = self.scale.read(scale_row * scales_per_row, scales_per_row).float()
            scale_C = scales.repeat_interleave(block_columns)[:columns]
            values_RC[row - first_row : end - first_row] *= scale_C
            row = end


def dequantize_fp8(
    stored: dict[str, FileTensor], quantization: Mapping[str, Any]
) -> dict[str, SourceTensor]:
    """Return the tensors of a source with FP8 weights, without their scales.

    Args:
        stored: Tensors as they are in the files, by name.
        quantization: Value of quantization_config.

    Raises:
        ValueError: The format is another one, a weight has no scale or one of another shape, or
            a scale has no weight in FP8.
    """
    block = _block_size(quantization)
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE_SUFFIX):
            _check_has_weight(name, stored)
        elif tensor.dtype != _FP8:
            tensors[name] = tensor
        else:
            scale = _scale_of(name, tensor, stored, block)
            tensors[name] = BlockScaledTensor(tensor, scale, block)
    return tensors


def _block_size(quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Return rows and columns of a block."""
    number_format = quantization.get("fmt", "e4m3")
    # MiniMax-M2 names the format as torch does.
    is_known = number_format in ("e4m3", "float8_e4m3fn")
    require(is_known, f"{_CONFIG}: fmt", number_format, "'e4m3'")
    block = quantization.get("weight_block_size", _DEFAULT_BLOCK)
    is_pair = isinstance(block, list) and len(block) == 2
    require(
        is_pair and all(type(size) is int and size > 0 for size in block),
        f"{_CONFIG}: weight_block_size",
        block,
        "two positive integers, such as [128, 128]",
        "Dequantise the model with transformers first.",
    )
    return block[0], block[1]


def _scale_of(
    name: str, weight: FileTensor, stored: Mapping[str, FileTensor], block: tuple[int, int]
) -> FileTensor:
    """Return the tensor with the scales of a weight."""
    scale = stored.get(name + _SCALE_SUFFIX)
    if scale is None:
        raise ValueError(
            f"the tensor {shortened(name)} is in FP8 and has no {name.rpartition('.')[2]}"
            f"{_SCALE_SUFFIX}: its values are not known. Download the model's files again"
        )
    require(
        len(weight.shape) in (2, 3),
        f"the shape of the FP8 tensor {name}",
        list(weight.shape),
        "a matrix, or a stack of matrices",
    )
    rows, columns = weight.shape[-2:]
    expected = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    expected = (*weight.shape[:-2], *expected)
    require(
        scale.shape == expected,
        f"the shape of the tensor {name}{_SCALE_SUFFIX}",
        list(scale.shape),
        f"{list(expected)}, one scale for each block of {block[0]} x {block[1]}",
    )
    require(
        scale.dtype in _SCALE_DTYPES,
        f"the dtype of the tensor {name}{_SCALE_SUFFIX}",
        str(scale.dtype),
        " or ".join(map(str, _SCALE_DTYPES)),
    )
    return scale


def _check_has_weight(name: str, stored: Mapping[str, FileTensor]) -> None:
    """Raise ValueError if a scale belongs to no weight in FP8."""
    weight = stored.get(name.removesuffix(_SCALE_SUFFIX))
    if weight is None or weight.dtype != _FP8:
        found = "is missing" if weight is None else f"is in {weight.dtype}"
        raise ValueError(
            f"the tensor {shortened(name)} scales an FP8 weight, which {found}. Download the "
            "model's files again"
        )


def refuse_unscaled(stored: Mapping[str, FileTensor]) -> None:
    """Check the tensors of a source without quantization_config.

    Raises:
        ValueError: One is in FP8, so that its values lack a scale.
    """
    for name, tensor in stored.items():
        if tensor.dtype == _FP8:
            raise ValueError(
                f"the tensor {shortened(name)} is in FP8, but config.json has no "
                "quantization_config, which says how it is scaled. Use the model's own config.json"
            )
