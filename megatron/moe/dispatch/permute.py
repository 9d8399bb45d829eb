"""Moving token rows: to their experts, between ranks, and back. The only MoE communication, but that of the sizes.

Shape suffixes: T tokens on this rank, D hidden, E routed experts, A assignments of the gate, S rows (assignments that survive
capacity, sorted by expert), R rows this rank's experts receive, P ranks that share experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron import buffers
from megatron.moe.dispatch.plan import PermutedTokens


def segment_sum(
    rows: Tensor, order: Tensor, bags: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Sum rows[order] (times weights) within consecutive bags: a parallel, ragged, deterministic segment sum.

    Args:
        rows: [any, D].
        order: int64, which rows; may be longer than the bags.
        bags: where each bag starts in `order`; the last entry is where the last one ends.
        weights: as `order`, in the dtype of the rows.
    """
    if len(order) == 0 or len(rows) == 0:
        return rows.new_zeros(len(bags) - 1, rows.shape[1])
    if order.device.type != "cpu":
        # There the last bag goes to the end of `order`, whatever its offset says: what lies beyond gets its own.
        bags = F.pad(bags, (0, 1), value=len(order))
        return F.embedding_bag(
            order, rows, bags, mode="sum", per_sample_weights=weights, include_last_offset=True
        )[:-1]
    if len(order) > (length := int(bags[-1])):
        order, weights = order[:length], None if weights is None else weights[:length]
        if not length:
            return rows.new_zeros(len(bags) - 1, rows.shape[1])
    return F.embedding_bag(
        order, rows, bags, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


class PermuteTokens(torch.autograd.Function):
    """rows_S = x_T[token_S]. Backward is a segment sum in token order: no atomics, so it is deterministic."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, rows: PermutedTokens) -> Tensor:
        ctx.rows = rows
        return gather_rows(x_TD, rows.token_S)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SD: Tensor) -> tuple:
        return segment_sum(
            grad_SD.contiguous(), ctx.rows.unpermute_index_S, ctx.rows.token_offsets_T1
        ), None


class UnpermuteTokens(torch.autograd.Function):
    """y_t = sum of the token's rows, times their weights if there are any, accumulated in fp32 inside the op."""

    @staticmethod
    def forward(ctx, rows_SD: Tensor, weight_S: Tensor | None, rows: PermutedTokens) -> Tensor:
        ctx.rows, ctx.length = rows, len(rows_SD)
        unpermute_index_S = rows.unpermute_index_S[: ctx.length]
        if weight_S is None:
            return segment_sum(rows_SD, unpermute_index_S, rows.token_offsets_T1)
        ctx.save_for_backward(rows_SD, weight_S)
        return segment_sum(
            rows_SD,
            unpermute_index_S,
            rows.token_offsets_T1,
            weight_S[unpermute_index_S].to(rows_SD.dtype),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor) -> tuple:
        grad_SD, saved = gather_rows(grad_TD, ctx.rows.token_S[: ctx.length]), ctx.saved_tensors
        if not saved:
            return grad_SD, None, None
        rows_SD, weight_S = saved
        grad_weight_S = (
            (grad_SD * rows_SD).sum(-1, dtype=weight_S.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        return grad_SD.mul_(weight_S.to(grad_SD.dtype).unsqueeze(1)), grad_weight_S, None


class GatherWeights(torch.autograd.Function):
    """weight_S = weight_A[source_index_S]. Each assignment is one row at most: the gradient is a copy, without sums."""

    @staticmethod
    def forward(ctx, weight_A: Tensor, rows: PermutedTokens) -> Tensor:
        ctx.rows, ctx.size = rows, len(weight_A)
        return weight_A.index_select(0, rows.source_index_S)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_S: Tensor) -> tuple:
        rows = ctx.rows
        place_S = torch.arange(len(grad_S), device=grad_S.device)
        grad_S = torch.where(
            place_S < rows.expert_offsets_E[-1:], grad_S, 0
        )  # what lies beyond the last end is no row
        return grad_S.new_zeros(ctx.size).scatter_(0, rows.source_index_S, grad_S), None


def gather_rows(x_TD: Tensor, token_S: Tensor) -> Tensor:
    out = buffers.empty((len(token_S), x_TD.shape[1]), x_TD.dtype, x_TD.device)
    return torch.index_select(x_TD, 0, token_S, out=out)
