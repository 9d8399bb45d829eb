"""Moving token rows: to their experts, between ranks, and back. The only MoE communication, but that of the sizes.

Letters: T tokens on this rank, D hidden, E routed experts, A assignments of the gate, S rows (assignments that survive
capacity, sorted by expert), R rows this rank's experts receive, P ranks that share experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron import buffers
from megatron.moe.plan import Rows, Sizes, starts


def bag_sum(rows: Tensor, order: Tensor, bags: Tensor, weights: Tensor | None = None) -> Tensor:
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
        return F.embedding_bag(order, rows, bags, mode="sum", per_sample_weights=weights, include_last_offset=True)[:-1]
    if len(order) > (length := int(bags[-1])):
        order, weights = order[:length], None if weights is None else weights[:length]
        if not length:
            return rows.new_zeros(len(bags) - 1, rows.shape[1])
    return F.embedding_bag(order, rows, bags, mode="sum", per_sample_weights=weights, include_last_offset=True)


class Gather(torch.autograd.Function):
    """rows_S = x_T[token_S]. Backward is a segment sum in token order: no atomics, so it is deterministic."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _select(x_TD, rows.token_S)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SD: Tensor) -> tuple:
        return bag_sum(grad_SD.contiguous(), ctx.rows.by_token_S, ctx.rows.bags_T1), None


class Combine(torch.autograd.Function):
    """y_t = sum of the token's rows, times their weights if there are any, accumulated in fp32 inside the op."""

    @staticmethod
    def forward(ctx, rows_SD: Tensor, weight_S: Tensor | None, rows: Rows) -> Tensor:
        ctx.rows, ctx.length = rows, len(rows_SD)
        by_token_S = rows.by_token_S[: ctx.length]
        if weight_S is None:
            return bag_sum(rows_SD, by_token_S, rows.bags_T1)
        ctx.save_for_backward(rows_SD, weight_S)
        return bag_sum(rows_SD, by_token_S, rows.bags_T1, weight_S[by_token_S].to(rows_SD.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor) -> tuple:
        grad_SD, saved = _select(grad_TD, ctx.rows.token_S[: ctx.length]), ctx.saved_tensors
        if not saved:
            return grad_SD, None, None
        rows_SD, weight_S = saved
        grad_weight_S = (grad_SD * rows_SD).sum(-1, dtype=weight_S.dtype) if ctx.needs_input_grad[1] else None
        return grad_SD.mul_(weight_S.to(grad_SD.dtype).unsqueeze(1)), grad_weight_S, None


class Weights(torch.autograd.Function):
    """weight_S = weight_A[assignment_S]. Each assignment is one row at most: the gradient is a copy, without sums."""

    @staticmethod
    def forward(ctx, weight_A: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.size = rows, len(weight_A)
        return weight_A.index_select(0, rows.assignment_S)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_S: Tensor) -> tuple:
        rows = ctx.rows
        place_S = torch.arange(len(grad_S), device=grad_S.device)
        grad_S = torch.where(place_S < rows.ends_E[-1:], grad_S, 0)  # what lies beyond the last end is no row
        return grad_S.new_zeros(ctx.size).scatter_(0, rows.assignment_S, grad_S), None


def _select(x_TD: Tensor, token_S: Tensor) -> Tensor:
    out = buffers.empty((len(token_S), x_TD.shape[1]), x_TD.dtype, x_TD.device)
    return torch.index_select(x_TD, 0, token_S, out=out)


@dataclass
class Transfer:
    """Tensors on their way to other ranks and, in the backward pass, their gradients on the way back."""

    send: list[int]
    """rows to each rank"""
    receive: list[int]
    """rows from each rank"""
    group: dist.ProcessGroup
    pending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)
    """each with what it reads, which must live as long"""
    grads: tuple[Tensor, ...] = ()
    """gradients on their way back"""

    def start(self, tensors: tuple[Tensor, ...], send: list[int], receive: list[int]) -> tuple[Tensor, ...]:
        received = []
        for t in tensors:
            out, t = buffers.empty((sum(receive), *t.shape[1:]), t.dtype, t.device), t.contiguous()
            self.pending.append((dist.all_to_all_single(out, t, receive, send, group=self.group, async_op=True), t))
            received.append(out)
        return tuple(received)

    def wait(self) -> None:
        for work, _ in self.pending:
            work.wait()
        self.pending.clear()


class _Start(torch.autograd.Function):
    """Send rows off. What it returns is not there before `_Finish` has waited for it."""

    @staticmethod
    def forward(ctx, transfer: Transfer, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        return transfer.start(tensors, transfer.send, transfer.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple:
        transfer = ctx.transfer
        transfer.wait()
        back, transfer.grads = transfer.grads, ()
        return None, *back


class _Finish(torch.autograd.Function):
    """Wait for what `_Start` sent off. Backward sends the gradients off, for `_Start`'s to wait for."""

    @staticmethod
    def forward(ctx, transfer: Transfer, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        transfer.wait()
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple:
        # What autograd hands on must have the shapes of the rows here; those on their way go by the record.
        transfer = ctx.transfer
        transfer.grads = transfer.start(grads, transfer.receive, transfer.send)
        return None, *grads


class Exchange:
    """An all-to-all of tensors' rows with uneven splits: starts when made, ends with `finish`.

    What is computed in between overlaps with it, and so does its backward pass with the gradients' way back.

    Args:
        tensors: each with sum(send) rows, sorted by rank.
        send, receive: rows to and from each rank.
    """

    def __init__(self, tensors: tuple[Tensor, ...], send: list[int], receive: list[int], group: dist.ProcessGroup):
        self.transfer = Transfer(send, receive, group)
        self.unfinished = _Start.apply(self.transfer, *tensors)

    def finish(self) -> tuple[Tensor, ...]:
        """What the other ranks sent, rank by rank."""
        return _Finish.apply(self.transfer, *self.unfinished)


def arrived_rows(sizes: Sizes) -> Rows:
    """Rows as they came from the other ranks, as (source rank, expert), to be run through experts."""
    received_PE, num_rows = sizes.received_PE, sum(sizes.receive)
    places_R = torch.arange(num_rows + 1, device=received_PE.device)
    starts_EP = starts(received_PE.flatten()).view_as(received_PE).t().flatten()
    lengths_EP = received_PE.t().flatten()
    shift_R = torch.repeat_interleave(starts_EP - starts(lengths_EP), lengths_EP, output_size=num_rows)
    order_R = shift_R + places_R[:-1]
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, places_R[:-1])
    return Rows(order_R, order_R, inverse_R, places_R, received_PE.sum(0).cumsum(0))


@dataclass(frozen=True, slots=True)
class Shared:
    """All ranks' tokens and those of their assignments whose experts this rank holds; made by `share_tokens`."""

    x_TD: Tensor
    """tokens of all ranks that share the experts, rank by rank"""
    token_S: Tensor
    """int64, which of them each assignment is of"""
    expert_S: Tensor
    """int64, which of this rank's experts"""
    weight_S: Tensor
    tokens: list[int]
    """tokens of each rank"""


def share_tokens(x_TD: Tensor, rows: Rows, weight_A: Tensor, kept_E: Tensor, group: dist.ProcessGroup) -> Shared:
    """Gather all ranks' tokens, once each, and send each assignment to the rank that holds its expert.

    For experts so small that a token's row outweighs them: with k assignments a token this moves P rows instead of k.

    Args:
        rows: this rank's assignments, sorted by expert.
        kept_E: how many each of all experts has.
    """
    ep_size = dist.get_world_size(group)
    kept_PE = kept_E.view(ep_size, -1)
    sent_P2 = torch.stack([kept_PE.sum(1), torch.full((ep_size,), len(x_TD), device=kept_E.device)], 1)
    received_P2 = torch.empty_like(sent_P2)
    dist.all_to_all_single(received_P2, sent_P2, group=group)
    (send, _), (receive, tokens) = torch.stack([sent_P2, received_P2]).transpose(1, 2).tolist()
    # The same for all assignments at once: an int64 per assignment is little beside a row per token.
    token_S, weight_S = rows.token_S[: sum(send)], Weights.apply(weight_A, rows)[: sum(send)]
    expert_S = torch.repeat_interleave(torch.arange(kept_PE.shape[1], device=kept_E.device).repeat(ep_size), kept_E,
                                       output_size=sum(send))
    tokens_sent = Exchange((x_TD.repeat(ep_size, 1),), [len(x_TD)] * ep_size, tokens, group)
    (weight_R,) = Exchange((weight_S,), send, receive, group).finish()
    (ids_R2,) = Exchange((torch.stack([token_S, expert_S], 1),), send, receive, group).finish()
    first_R = torch.repeat_interleave(starts(received_P2[:, 1]), received_P2[:, 0], output_size=len(ids_R2))
    (x_all_TD,) = tokens_sent.finish()
    return Shared(x_all_TD, ids_R2[:, 0] + first_R, ids_R2[:, 1], weight_R, tokens)


def sum_shared(y_TD: Tensor, shared: Shared, group: dist.ProcessGroup) -> Tensor:
    """Sum up the ranks' parts of every token's output and hand each rank its own tokens: a reduce-scatter of uneven
    pieces, added in the order of ranks and in fp32, so that it is repeatable."""
    ep_size, mine = dist.get_world_size(group), shared.tokens[dist.get_rank(group)]
    (parts,) = Exchange((y_TD,), shared.tokens, [mine] * ep_size, group).finish()
    wide = torch.promote_types(y_TD.dtype, torch.float32)
    return parts.view(ep_size, mine, y_TD.shape[1]).sum(0, dtype=wide).to(y_TD.dtype)
