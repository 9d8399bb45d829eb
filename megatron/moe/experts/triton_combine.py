"""Triton kernel for weighted segment sums: the combine of experts' outputs.

Shape suffixes: T tokens (segments), D columns, S rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron.moe.experts.triton_operands import check_operands, unit_stride_rows


@triton.jit
def _combine_kernel(
    rows_ptr,
    order_ptr,
    offsets_ptr,
    weight_ptr,
    out_ptr,
    columns,
    rows_stride,
    BLOCK: tl.constexpr,
):
    """out[t] = sum over the segment of t of weight[i] rows[order[i]].

    One program per token and tile of columns.
    """
    column_tiles = (columns + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // column_tiles).to(tl.int64)
    column = tl.program_id(0) % column_tiles * BLOCK + tl.arange(0, BLOCK)
    acc = tl.full((BLOCK,), 0.0, tl.float32)
    for i in range(tl.load(offsets_ptr + token), tl.load(offsets_ptr + token + 1)):
        row = tl.load(order_ptr + i)
        value = tl.load(
            rows_ptr + row * rows_stride + column, mask=column < columns, other=0.0
        ).to(tl.float32)
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + i).to(tl.float32)
        acc += value
    tl.store(
        out_ptr + token * columns + column,
        acc.to(out_ptr.dtype.element_ty),
        mask=column < columns,
    )


def weighted_combine(
    rows_SD: Tensor, order_S: Tensor, token_offsets_T1: Tensor, weight_S: Tensor | None = None
) -> Tensor:
    """Return y_t = sum over i in segment t of weight_i * rows[order_i].

    Sums are accumulated in fp32. This is the kernel counterpart of
    `megatron.moe.dispatch.permute.segment_sum`.

    Args:
        rows_SD: bf16, fp16 or fp32; `order_S` may contain fewer or more than all rows.
        order_S: int64, the row of each entry of the segments.
        token_offsets_T1: int64, start of each segment in `order_S`; the last entry is
            the end of the last segment.
        weight_S: weight of each entry of `order_S`, in any of the dtypes; None: ones.
    Returns:
        [T, D] in the dtype of the rows.
    Raises:
        ValueError: fp64.
    """
    check_operands(rows_SD, (order_S, token_offsets_T1))
    if weight_S is not None:
        aligned = weight_S.is_contiguous() and len(weight_S) == len(order_S)
        assert aligned, "one weight per entry, contiguous"
    rows_SD = unit_stride_rows(rows_SD)
    num_tokens = len(token_offsets_T1) - 1
    columns = rows_SD.shape[1]
    out_TD = rows_SD.new_empty(num_tokens, columns)
    block = min(1024, triton.next_power_of_2(columns))
    _combine_kernel[(num_tokens * triton.cdiv(columns, block),)](
        rows_SD,
        order_S,
        token_offsets_T1,
        weight_S,
        out_TD,
        columns,
        rows_SD.stride(0),
        BLOCK=block,
    )
    return out_TD
