"""Capacity, plan, exchange, combine: how token rows reach experts and come back. The only MoE communication.

Letters: T tokens on this rank, D hidden, E routed experts, C choices (E + local paths), A assignments of the gate,
S assignments that survive capacity, sorted by choice; R rows this rank's experts receive, P ranks that share experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class Rows:
    """Some of the surviving assignments, sorted by choice, as rows to gather and to combine."""

    assignment_S: Tensor
    """index into the gate's list"""
    token_S: Tensor
    """token of each row"""
    by_token_S: Tensor
    """positions in [0, S) sorted by token"""
    bags_T1: Tensor
    """where each token's positions start in by_token_S; the last entry is S"""

    @staticmethod
    def of(assignment_S: Tensor, token_S: Tensor, num_tokens: int) -> Rows:
        bags_T1 = F.pad(count(token_S, num_tokens).cumsum(0), (1, 0))
        return Rows(assignment_S, token_S, token_S.argsort(stable=True), bags_T1)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rows go where; made by `make_plan`, read by the layer and its counters."""

    routed: Rows
    """rows for routed experts, sorted by expert"""
    local: Rows | None
    """rows for local paths, sorted by path; None without any. Paths that return zeros have no rows"""
    local_counts: list[int]
    """rows of each local path, 0 for those that return zeros"""
    wanted_C: Tensor
    """assignments per choice before capacity"""
    kept_C: Tensor
    """assignments per choice after capacity"""
    kept_T: Tensor
    """assignments per token after capacity"""


def capacity(num_tokens: int, num_experts: int, factor: float, minimum: int) -> int | None:
    """Rows one expert takes: min(T, max(minimum, ceil(T / E * factor))); None (no limit) for factor 0."""
    if factor == 0:
        return None
    return min(num_tokens, max(minimum, math.ceil(num_tokens / num_experts * factor)))


def make_plan(routing: Routing, num_tokens: int, num_experts: int, num_local_paths: int = 0,
              limit: int | Tensor | None = None, num_zero_paths: int = 0) -> Plan:
    """Sort assignments by choice and drop what is over capacity.

    Survivors are the `limit` highest priorities of each choice, ties by position in the gate's list; the rest is
    dropped, never rerouted.

    Args:
        limit: rows one routed expert takes (local paths then have no limit), or int64 [C], or None for no limit.
        num_zero_paths: how many of the last local paths return zeros: counted, but no rows are made for them.
    """
    num_choices = num_experts + num_local_paths
    wanted_C = count(routing.expert_A, num_choices)
    if limit is None:
        order_A = routing.expert_A.argsort(stable=True)
        kept_C = wanted_C
    else:
        order_A, kept_C = _survivors(routing, wanted_C, limit, num_experts)
    token_A = routing.token_A[order_A]
    if not num_local_paths:
        routed = Rows.of(order_A, token_A, num_tokens)
        return Plan(routed, None, [], wanted_C, kept_C, routed.bags_T1.diff())
    counts = kept_C[num_experts:].tolist()
    first = len(order_A) - sum(counts)
    if num_zero_paths:
        counts[-num_zero_paths:] = [0] * num_zero_paths
    local = slice(first, first + sum(counts))
    return Plan(Rows.of(order_A[:first], token_A[:first], num_tokens),
                Rows.of(order_A[local], token_A[local], num_tokens), counts, wanted_C, kept_C,
                count(token_A, num_tokens))


def _survivors(routing: Routing, wanted_C: Tensor, limit: int | Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(assignments under the limit, sorted by choice; how many per choice)."""
    limit_C = limit
    if isinstance(limit, int):
        limit_C = torch.full_like(wanted_C, len(routing.expert_A))
        limit_C[:num_experts] = limit
    priority_A = routing.weight_A.detach().abs() if routing.priority_A is None else routing.priority_A
    by_priority = priority_A.argsort(descending=True, stable=True)
    order_A = by_priority[routing.expert_A[by_priority].argsort(stable=True)]
    choice_A = routing.expert_A[order_A]
    place_A = torch.arange(len(order_A), device=order_A.device) - _starts(wanted_C)[choice_A]
    return order_A[place_A < limit_C[choice_A]], torch.minimum(wanted_C, limit_C)


def count(index: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 occurs: int64 [size]. Unlike bincount it never waits for the device."""
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def bag_sum(rows: Tensor, order: Tensor, bags: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum rows[order] (times weights) within consecutive bags: a parallel, ragged, deterministic segment sum.

    Args:
        rows: [any, D].
        order: int64, which rows.
        bags: where each bag starts in `order`; the last entry is its length.
        weights: as `order`, in the dtype of the rows.
    """
    if len(order) == 0:
        return rows.new_zeros(len(bags) - 1, rows.shape[1])
    return F.embedding_bag(order, rows, bags, mode="sum", per_sample_weights=weights, include_last_offset=True)


class Gather(torch.autograd.Function):
    """rows_S = x_T[token_S]. Backward is a segment sum in token order: no atomics, so it is deterministic."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x_TD.index_select(0, rows.token_S)

    @staticmethod
    def backward(ctx, grad_SD: Tensor) -> tuple:
        return bag_sum(grad_SD.contiguous(), ctx.rows.by_token_S, ctx.rows.bags_T1), None


class Combine(torch.autograd.Function):
    """y_t = sum of weight_s * rows_s over the token's rows, accumulated in fp32 inside the op."""

    @staticmethod
    def forward(ctx, rows_SD: Tensor, weight_S: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(rows_SD, weight_S)
        ctx.rows = rows
        return bag_sum(rows_SD, rows.by_token_S, rows.bags_T1, weight_S[rows.by_token_S].to(rows_SD.dtype))

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple:
        rows_SD, weight_S = ctx.saved_tensors
        grad_SD = grad_TD.index_select(0, ctx.rows.token_S)
        grad_weight_S = (grad_SD * rows_SD).sum(-1, dtype=weight_S.dtype) if ctx.needs_input_grad[1] else None
        return grad_SD.mul_(weight_S.to(grad_SD.dtype).unsqueeze(1)), grad_weight_S, None


class Permute(torch.autograd.Function):
    """rows[order], whose gradient is grad[inverse]: both directions are gathers."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad.index_select(0, ctx.inverse), None, None


class AllToAll(torch.autograd.Function):
    """Rows to their experts' ranks with uneven splits; the gradient travels back the same way."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


@dataclass(frozen=True, slots=True)
class Exchange:
    """What `send_rows` did, for `return_rows` to undo."""

    counts: list[int]
    """rows of each local expert, in the order the experts receive them"""
    send: list[int] | None = None
    receive: list[int] | None = None
    order_R: Tensor | None = None
    inverse_R: Tensor | None = None


def send_rows(rows_SD: Tensor, kept_E: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Exchange]:
    """Bring rows, sorted by global expert, to the ranks that hold the experts.

    Args:
        rows_SD: this rank's rows for routed experts, sorted by expert.
        kept_E: rows per global expert.
        group: expert-parallel group, or None when this rank holds all experts (no communication then).
    Returns:
        rows sorted by local expert [R, D], and the record that `return_rows` needs.
    """
    if group is None:
        return rows_SD, Exchange(counts=kept_E.tolist())
    ep_size = dist.get_world_size(group)
    sent_PE = kept_E.view(ep_size, -1)
    received_PE = torch.empty_like(sent_PE)
    dist.all_to_all_single(received_PE, sent_PE.contiguous(), group=group)
    # One copy to the host for everything the exchange must know.
    sent, received = torch.stack([sent_PE, received_PE]).tolist()
    send, receive = [sum(row) for row in sent], [sum(row) for row in received]
    rows_RD = AllToAll.apply(rows_SD, send, receive, group)
    order_R = _expert_major(received_PE, len(rows_RD))
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    counts = [sum(column) for column in zip(*received)]
    return Permute.apply(rows_RD, order_R, inverse_R), Exchange(counts, send, receive, order_R, inverse_R)


def return_rows(rows_RD: Tensor, exchange: Exchange, group: dist.ProcessGroup | None) -> Tensor:
    """Undo `send_rows`: expert outputs back on the ranks of their tokens, in the order they were sent."""
    if group is None:
        return rows_RD
    by_source = Permute.apply(rows_RD, exchange.inverse_R, exchange.order_R)
    return AllToAll.apply(by_source, exchange.receive, exchange.send, group)


def _expert_major(counts_PE: Tensor, num_rows: int) -> Tensor:
    """Positions of rows that lie as (source rank, expert), in the order (expert, source rank)."""
    starts_EP = _starts(counts_PE.flatten()).view_as(counts_PE).t().flatten()
    lengths_EP = counts_PE.t().flatten()
    shift_R = torch.repeat_interleave(starts_EP - _starts(lengths_EP), lengths_EP, output_size=num_rows)
    return shift_R + torch.arange(num_rows, device=counts_PE.device)


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
    expert_S = torch.repeat_interleave(torch.arange(kept_PE.shape[1], device=kept_E.device).repeat(ep_size), kept_E,
                                       output_size=len(rows.token_S))
    ids_S2 = _all_to_all(torch.stack([rows.token_S, expert_S], 1), send, receive, group)
    first_S = torch.repeat_interleave(_starts(received_P2[:, 1]), received_P2[:, 0], output_size=len(ids_S2))
    weight_S1 = AllToAll.apply(weight_A[rows.assignment_S].unsqueeze(1), send, receive, group)
    x_all_TD = AllToAll.apply(x_TD.repeat(ep_size, 1), [len(x_TD)] * ep_size, tokens, group)
    return Shared(x_all_TD, ids_S2[:, 0] + first_S, ids_S2[:, 1], weight_S1.squeeze(1), tokens)


def sum_shared(y_TD: Tensor, shared: Shared, group: dist.ProcessGroup) -> Tensor:
    """Sum up the ranks' parts of every token's output and hand each rank its own tokens: a reduce-scatter of uneven
    pieces, added in the order of ranks and in fp32, so that it is repeatable."""
    ep_size, mine = dist.get_world_size(group), shared.tokens[dist.get_rank(group)]
    parts = AllToAll.apply(y_TD, shared.tokens, [mine] * ep_size, group)
    wide = torch.promote_types(y_TD.dtype, torch.float32)
    return parts.view(ep_size, mine, y_TD.shape[1]).sum(0, dtype=wide).to(y_TD.dtype)
