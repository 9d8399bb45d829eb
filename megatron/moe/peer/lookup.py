"""Dot products and weighted sums of table rows, looked up by (token, row) pair.

Shape suffixes: T tokens, D hidden, R rows of a table, A assignments of a token to an
expert, W hidden units of one expert, P = A x W pairs of a token and a row, U distinct
rows that are in any pair, G segments.

Two operations read rows in place, without a copy of P rows, and are each other's
gradient:

    dot products    d_p = x[token_p] . table[row_p]
                    grad_x = sums by token of grad_d_p * table[row_p]
    weighted rows   y = sums by token of s_p * table[row_p]
                    grad_s_p = grad_y[token_p] . table[row_p]

In both, the table's gradient is a sum by row of a number times the token's row. So a
pass over the pairs reads rows of one table or writes those of its gradient; the other
operand is the tokens' rows, which are few and stay in the cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron.first_order import first_order_only
from megatron.host_allocator import empty_cached
from megatron.moe.dispatch import permute
from megatron.moe.dispatch.plan import bincount_static

_REUSE_BYTES = 8 * 2**20
"""Smallest result, in bytes, that is written to reused memory rather than to new
pages."""


class TokenExpertPairs(NamedTuple):
    """All (token, table row) pairs, sorted by row and sorted by token."""

    by_row_P: Tensor
    """list positions of the pairs, sorted by row"""
    row_P: Tensor
    """row of each pair, ascending"""
    token_P: Tensor
    """token of each pair, in the same order"""
    by_token_P: Tensor | None
    """list positions of the pairs, sorted by token; None if the list is in that order
    already, as from most gates"""
    row_by_token_P: Tensor
    """row of each pair, in that order"""
    token_offsets_T1: Tensor
    """start of each token's pairs in by_token_P; the last entry is P"""

    @staticmethod
    def of(
        token_A: Tensor, expert_A: Tensor, num_tokens: int, num_local: int, width: int
    ) -> TokenExpertPairs:
        """Expand assignments to pairs, one per hidden unit, and sort them.

        Raises:
            AssertionError: on the CPU, for a token or expert out of range. The kernels
                do not check.
        """
        token_P = token_A
        row_P = expert_A
        if width > 1:
            token_P = token_A.repeat_interleave(width, output_size=len(token_A) * width)
            unit_W = torch.arange(width, device=expert_A.device)
            row_P = (expert_A.unsqueeze(1) * width + unit_W).flatten()
        sorted_row_P, by_row_P = _sort(row_P)
        if _is_sorted(token_P):
            sorted_token_P = token_P
            by_token_P = None
        else:
            sorted_token_P, by_token_P = _sort(token_P)
        if not token_P.is_cuda:  # on CUDA the check would force a device sync
            _check_sorted_range(sorted_token_P, num_tokens)
            _check_sorted_range(sorted_row_P, num_local * width)
        token_T1 = torch.arange(num_tokens + 1, device=token_P.device)
        return TokenExpertPairs(
            by_row_P=by_row_P,
            row_P=sorted_row_P,
            token_P=token_P[by_row_P],
            by_token_P=by_token_P,
            row_by_token_P=_reorder(row_P, by_token_P),
            token_offsets_T1=torch.searchsorted(sorted_token_P, token_T1),
        )


@dataclass(frozen=True, slots=True)
class PairOps:
    """Implementation of the operations on pairs, and the layout of table gradients."""

    dots: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(rows [T, D], table [R, D], token_P, row_P) -> [P]"""
    segment_sum: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(rows, index_P, offsets_G1, weight_P) -> [G, D] in the dtype of the rows, as
    `megatron.moe.dispatch.permute.segment_sum`"""
    sparse: bool
    """gradients of tables are sparse tensors"""

    def pair_dots(self, rows_TD: Tensor, stack: Tensor, pairs: TokenExpertPairs) -> Tensor:
        """Compute rows[token_p] . table[row_p]: [P] in list order, fp32 or wider.

        Pairs are processed in row order: the second pair of a row finds it in the
        cache, and neighbouring rows are read one after the other.
        """
        sorted_P = self.dots(rows_TD, stack.flatten(0, -2), pairs.token_P, pairs.row_P)
        sorted_P = sorted_P.to(torch.promote_types(sorted_P.dtype, torch.float32))
        return torch.empty_like(sorted_P).index_copy_(0, pairs.by_row_P, sorted_P)

    def token_sums(self, stack: Tensor, scale_P: Tensor, pairs: TokenExpertPairs) -> Tensor:
        """Sum scale * table[row] over each token's pairs: [T, D]."""
        return self.segment_sum(
            stack.flatten(0, -2),
            pairs.row_by_token_P,
            pairs.token_offsets_T1,
            _reorder(scale_P, pairs.by_token_P),
        )

    def row_sums(
        self, rows_TD: Tensor, scale_P: Tensor, pairs: TokenExpertPairs, shape: torch.Size
    ) -> Tensor:
        """Sum scale * rows[token] over each table row's pairs: the gradient of a table.

        Args:
            shape: shape of the table's parameter, [blocks, rows of a block, D].
        """
        blocks, per_block, _ = shape
        scale_P = scale_P[pairs.by_row_P]
        if not self.sparse:
            offsets_R1 = _offsets(bincount_static(pairs.row_P, blocks * per_block))
            return self.segment_sum(rows_TD, pairs.token_P, offsets_R1, scale_P).view(shape)
        row_U, count_U = pairs.row_P.unique_consecutive(return_counts=True)
        values_UD = self.segment_sum(rows_TD, pairs.token_P, _offsets(count_U), scale_P)
        index_2U = row_U.new_empty(2, len(row_U))
        torch.div(row_U, per_block, rounding_mode="floor", out=index_2U[0])
        torch.remainder(row_U, per_block, out=index_2U[1])
        return torch.sparse_coo_tensor(
            index_2U, values_UD, shape, is_coalesced=True, check_invariants=False
        )


class PairDots(torch.autograd.Function):
    """rows[token_p] . table[row_p] of all pairs: [P]. Saves no rows but the tokens'.

    One call per table rather than one for all: when a hook consumes a table's gradient,
    it is freed before the next one is computed.
    """

    @staticmethod
    def forward(ctx, rows_TD: Tensor, stack: Tensor, ops: PairOps, *pairs: Tensor) -> Tensor:
        ctx.ops = ops
        ctx.save_for_backward(rows_TD, stack, *pairs)
        return ops.pair_dots(rows_TD, stack, TokenExpertPairs(*pairs))

    @staticmethod
    @first_order_only
    def backward(ctx, grad_P: Tensor) -> tuple:
        rows_TD, stack, *saved = ctx.saved_tensors
        pairs = TokenExpertPairs(*saved)
        need_rows, need_stack, *_ = ctx.needs_input_grad
        grad_rows = None
        grad_stack = None
        if need_rows:
            grad_rows = ctx.ops.token_sums(stack, grad_P, pairs)
        if need_stack:
            grad_stack = ctx.ops.row_sums(rows_TD, grad_P, pairs, stack.shape)
        return grad_rows, grad_stack, *(None,) * (1 + len(pairs))


class WeightedRowSum(torch.autograd.Function):
    """Sum of scale_p * table[row_p] by token: [T, D] in the table's dtype."""

    @staticmethod
    def forward(ctx, stack: Tensor, scale_P: Tensor, ops: PairOps, *pairs: Tensor) -> Tensor:
        ctx.ops = ops
        ctx.save_for_backward(stack, scale_P, *pairs)
        return ops.token_sums(stack, scale_P, TokenExpertPairs(*pairs))

    @staticmethod
    @first_order_only
    def backward(ctx, grad_TD: Tensor) -> tuple:
        stack, scale_P, *saved = ctx.saved_tensors
        pairs = TokenExpertPairs(*saved)
        need_stack, need_scale, *_ = ctx.needs_input_grad
        grad_TD = grad_TD.contiguous()
        grad_scale = None
        grad_stack = None
        if need_scale:
            grad_scale = ctx.ops.pair_dots(grad_TD, stack, pairs).to(scale_P.dtype)
        if need_stack:
            grad_stack = ctx.ops.row_sums(grad_TD, scale_P, pairs, stack.shape)
        return grad_stack, grad_scale, *(None,) * (1 + len(pairs))


def embedding_dots(rows_TD: Tensor, table_RD: Tensor, token_P: Tensor, row_P: Tensor) -> Tensor:
    """Compute rows[token_p] . table[row_p]: [P] in the dtype of both, summed in fp32.

    This is torch's gradient of embedding_bag's per-sample weights, which reads both
    rows in place. The public sampled_addmm takes nearly twice as long and has no bf16.
    """
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_TD, table_RD, row_P, row_P, token_P, mode=0
    )


def segment_sum_in_reused_memory(
    rows: Tensor, index_P: Tensor, offsets_G1: Tensor, weight_P: Tensor
) -> Tensor:
    """Compute `permute.segment_sum`, writing large results to reused memory: [G, D].

    173 MB of sums took 58 ms in new pages and 8 ms in reused ones. embedding_bag cannot
    write to given memory, but a sparse matrix product can. It exists for fp32 and fp64
    only. For bf16, summing slices and copying them to reused memory is no faster than
    new pages, and slower on a busy machine, because threads synchronise at every slice.
    """
    weight_P = weight_P.to(rows.dtype)
    shape = (len(offsets_G1) - 1, rows.shape[1])
    has_product = rows.dtype in (torch.float32, torch.float64)
    has_product = has_product and torch.backends.mkl.is_available()
    num_bytes = shape[0] * shape[1] * rows.itemsize
    if rows.is_cuda or not has_product or num_bytes < _REUSE_BYTES:
        return permute.segment_sum(rows, index_P, offsets_G1, weight_P)
    out_GD = empty_cached(shape, rows.dtype, rows.device)
    matrix = _csr_matrix(offsets_G1, index_P, weight_P, len(rows))
    return torch.addmm(out_GD, matrix, rows, beta=0, out=out_GD)


def _csr_matrix(offsets_G1: Tensor, index_P: Tensor, weight_P: Tensor, num_rows: int) -> Tensor:
    """Return the segments as a sparse matrix [G, rows]."""
    _silence_csr_warning()
    shape = (len(offsets_G1) - 1, num_rows)
    return torch.sparse_csr_tensor(offsets_G1, index_P, weight_P, shape, check_invariants=False)


@cache
def _silence_csr_warning() -> None:
    """Trigger torch's once-per-process warning that CSR tensors are in beta, unseen.

    The only operation used on them is the product above, which tests compare.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)


def _sort(index: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sorted values, their positions), stable.

    On the CPU by single-threaded NumPy, which is as fast as torch.sort on two threads.
    torch's threads synchronise dozens of times per sort: on a busy machine its sort
    took longer than the rest of the layer.
    """
    if index.is_cuda:
        return index.sort(stable=True)
    bits = len(index).bit_length()
    keys = index.numpy() << bits | np.arange(len(index))
    keys.sort()
    return torch.from_numpy(keys >> bits), torch.from_numpy(keys & (1 << bits) - 1)


def _is_sorted(index: Tensor) -> bool:
    """Return whether the values ascend. False on CUDA: a sort is cheaper than a sync."""
    return not index.is_cuda and bool(np.all(index.numpy()[1:] >= index.numpy()[:-1]))


def _check_sorted_range(index: Tensor, size: int) -> None:
    """Raise AssertionError unless all of these sorted numbers are in [0, size)."""
    if len(index) == 0:
        return
    low, high = index[[0, -1]].tolist()
    assert low >= 0 and high < size, (
        f"token or row numbers span [{low}, {high}], allowed [0, {size})"
    )


def _reorder(values: Tensor, order: Tensor | None) -> Tensor:
    """Return values[order]; None means that they are in order."""
    if order is None:
        return values
    return values[order]


def _offsets(counts: Tensor) -> Tensor:
    """Return the starts of segments of these sizes and the end of the last: [G + 1]."""
    offsets_G1 = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=offsets_G1[1:])
    return offsets_G1
