"""Permute token rows to expert order and sum expert outputs per token, on one rank.

Shape suffixes: T tokens on this rank, D hidden, E routed experts, A assignments of the
gate, S rows (dispatched assignments, sorted by expert), G segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.first_order import first_order_only
from megatron.host_allocator import empty_cached
from megatron.moe.dispatch.plan import PermutedTokens


def segment_sum(
    rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Sum rows[index], times weights if given, within consecutive segments of `index`.

    The sum is parallel, ragged and deterministic.

    Args:
        rows: [any, D].
        index: int64, numbers of rows; may be longer than the segments.
        offsets: [G + 1], start of each segment in `index`; the last entry is the end of
            the last segment.
        weights: one per entry of `index`, in the dtype of the rows.
    Returns:
        [G, D] in the dtype of the rows, accumulated in fp32 or wider.
    """
    num_segments = len(offsets) - 1
    if len(index) == 0 or len(rows) == 0:
        return rows.new_zeros(num_segments, rows.shape[1])
    if index.device.type != "cpu":
        # CUDA's embedding_bag ignores the last offset and extends the last bag to the
        # end of `index`. An extra bag takes the padding, and its sum is discarded.
        offsets = F.pad(offsets, (0, 1), value=len(index))
        return _embedding_bag(rows, index, offsets, weights)[:-1]
    length = int(offsets[-1])
    if length < len(index):
        index = index[:length]
        if weights is not None:
            weights = weights[:length]
        if length == 0:
            return rows.new_zeros(num_segments, rows.shape[1])
    return _embedding_bag(rows, index, offsets, weights)


def _embedding_bag(
    rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None
) -> Tensor:
    return F.embedding_bag(
        index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


class PermuteTokens(torch.autograd.Function):
    """rows_S = x_T[token_S].

    Backward is a segment sum in token order: no atomics, so it is deterministic.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, permuted: PermutedTokens) -> Tensor:
        ctx.permuted = permuted
        return gather_rows(x_TD, permuted.token_S)

    @staticmethod
    @first_order_only
    def backward(ctx, grad_SD: Tensor) -> tuple:
        permuted = ctx.permuted
        grad_TD = segment_sum(
            grad_SD.contiguous(), permuted.unpermute_index_S, permuted.token_offsets_T1
        )
        return grad_TD, None


class UnpermuteTokens(torch.autograd.Function):
    """y_t = sum of the token's rows, times their weights if given.

    Products and sums are accumulated in fp32 inside the operation.
    """

    @staticmethod
    def forward(
        ctx, rows_SD: Tensor, weight_S: Tensor | None, permuted: PermutedTokens
    ) -> Tensor:
        ctx.permuted = permuted
        ctx.length = len(rows_SD)
        unpermute_index_S = permuted.unpermute_index_S[: ctx.length]
        if weight_S is None:
            return segment_sum(rows_SD, unpermute_index_S, permuted.token_offsets_T1)
        ctx.save_for_backward(rows_SD, weight_S)
        return segment_sum(
            rows_SD,
            unpermute_index_S,
            permuted.token_offsets_T1,
            weight_S[unpermute_index_S].to(rows_SD.dtype),
        )

    @staticmethod
    @first_order_only
    def backward(ctx, grad_TD: Tensor) -> tuple:
        grad_SD = gather_rows(grad_TD, ctx.permuted.token_S[: ctx.length])
        saved = ctx.saved_tensors  # read once: checkpointing unpacks each tensor only once
        if not saved:
            return grad_SD, None, None
        rows_SD, weight_S = saved
        grad_weight_S = None
        if ctx.needs_input_grad[1]:
            grad_weight_S = (grad_SD * rows_SD).sum(-1, dtype=weight_S.dtype)
        return grad_SD.mul_(weight_S.to(grad_SD.dtype).unsqueeze(1)), grad_weight_S, None


class GatherWeights(torch.autograd.Function):
    """weight_S = weight_A[source_index_S].

    Each assignment is at most one row, so the gradient is a copy without sums.
    """

    @staticmethod
    def forward(ctx, weight_A: Tensor, permuted: PermutedTokens) -> Tensor:
        ctx.permuted = permuted
        ctx.size = len(weight_A)
        return weight_A.index_select(0, permuted.source_index_S)

    @staticmethod
    @first_order_only
    def backward(ctx, grad_S: Tensor) -> tuple:
        permuted = ctx.permuted
        row_S = torch.arange(len(grad_S), device=grad_S.device)
        # Experts may leave anything, also NaN, in the gradients of padding rows.
        grad_S = torch.where(row_S < permuted.expert_offsets_E[-1:], grad_S, 0)
        grad_A = grad_S.new_zeros(ctx.size)
        return grad_A.scatter_(0, permuted.source_index_S, grad_S), None


def gather_rows(x_TD: Tensor, token_S: Tensor) -> Tensor:
    """Return x_T[token_S], in reused memory where the result is large."""
    out = empty_cached((len(token_S), x_TD.shape[1]), x_TD.dtype, x_TD.device)
    return torch.index_select(x_TD, 0, token_S, out=out)
