"""Checks of the tensors that are passed to Triton's expert kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.config.fields import require

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unit_stride_rows(rows: Tensor) -> Tensor:
    """Return the rows such that the numbers of a row are adjacent in memory.

    The rows themselves may have any stride.
    """
    if rows.stride(1) == 1:
        return rows
    return rows.contiguous()


def check_operands(
    rows: Tensor, indices: tuple[Tensor | None, ...], weights: tuple[Tensor, ...] = ()
) -> None:
    """Check dtypes, contiguity and the number of experts.

    Args:
        indices: int64 tensors, of which the first is `expert_offsets_E` if there are
            `weights`.
        weights: stacked matrices [E, ...].
    Raises:
        ValueError: rows of a dtype that the kernels do not support.
        AssertionError: any other mistake of the caller.
    """
    allowed = " ".join(map(str, TRITON_DTYPES))
    what = "the dtype of Triton's expert kernels"
    require(rows.dtype in TRITON_DTYPES, what, rows.dtype, allowed)
    for index in indices:
        if index is None:
            continue
        assert index.dtype == torch.int64, f"indices are int64, not {index.dtype}"
        assert index.is_contiguous(), "indices must be contiguous"
    for weight in weights:
        # The stack itself may be a slice, such as one half of fused projections.
        is_dense = weight.stride()[1:] == (weight.shape[2], 1)
        assert is_dense, "each expert's weights must be contiguous"
        assert len(weight) == len(indices[0]), (
            f"{len(weight)} experts, but {len(indices[0])} expert offsets"
        )
