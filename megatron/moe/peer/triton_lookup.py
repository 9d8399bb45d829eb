"""Triton kernel for PEER's tables: dot products of listed pairs of rows.

Shape suffixes: T tokens, D hidden, R rows of a table, P pairs of a token and a row.

The other operation on tables, weighted sums of listed rows, is `weighted_combine` of
`megatron.moe.experts.triton_combine`: by token for outputs and the tokens'
gradients, and by table row, after a sort and without atomics, for the tables'
gradients. `megatron.moe.peer.lookup` composes forward and backward of the two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.config.fields import require
from megatron.moe.experts.triton_operands import TRITON_DTYPES

# Tile of one program: 2,048 fp32 numbers are 16 registers of each of its 128 threads.
BLOCK_PAIRS = 16
BLOCK_COLUMNS = 128


@triton.jit(do_not_specialize=["num_pairs"])
def _dots_kernel(
    rows_ptr,
    table_ptr,
    token_ptr,
    row_ptr,
    out_ptr,
    num_pairs,
    columns,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[p] = sum over d of rows[token[p], d] * table[row[p], d].

    One program computes BLOCK_P pairs.
    """
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    listed = pair < num_pairs
    token = tl.load(token_ptr + pair, mask=listed, other=0)
    row = tl.load(row_ptr + pair, mask=listed, other=0)
    acc = tl.full((BLOCK_P, BLOCK_D), 0.0, tl.float32)
    for first in range(0, columns, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        here = listed[:, None] & (column < columns)[None, :]
        x = tl.load(rows_ptr + token[:, None] * columns + column[None, :], mask=here, other=0.0)
        y = tl.load(table_ptr + row[:, None] * columns + column[None, :], mask=here, other=0.0)
        acc += x.to(tl.float32) * y.to(tl.float32)
    tl.store(out_ptr + pair, tl.sum(acc, 1), mask=listed)


def triton_dots(rows_TD: Tensor, table_RD: Tensor, token_P: Tensor, row_P: Tensor) -> Tensor:
    """Compute rows[token_p] . table[row_p] for pairs in any order.

    The result is deterministic. Does not synchronise with the device.

    Args:
        rows_TD: bf16, fp16 or fp32, contiguous.
        table_RD: contiguous, in the dtype of the rows.
        token_P: int64 in [0, T), not checked.
        row_P: int64 in [0, R), not checked.
    Returns:
        [P] fp32, accumulated in fp32.
    Raises:
        ValueError: fp64.
    """
    require(
        rows_TD.dtype in TRITON_DTYPES,
        "the dtype of Triton's kernels",
        rows_TD.dtype,
        " ".join(map(str, TRITON_DTYPES)),
    )
    assert rows_TD.dtype == table_RD.dtype, (
        f"rows are {rows_TD.dtype}, the table is {table_RD.dtype}; they must be the same"
    )
    assert rows_TD.is_contiguous() and table_RD.is_contiguous(), (
        "rows and table must be contiguous"
    )
    out_P = torch.empty(len(token_P), dtype=torch.float32, device=rows_TD.device)
    _dots_kernel[(triton.cdiv(len(token_P), BLOCK_PAIRS),)](
        rows_TD,
        table_RD,
        token_P.contiguous(),
        row_P.contiguous(),
        out_P,
        len(token_P),
        rows_TD.shape[1],
        BLOCK_P=BLOCK_PAIRS,
        BLOCK_D=BLOCK_COLUMNS,
    )
    return out_P
