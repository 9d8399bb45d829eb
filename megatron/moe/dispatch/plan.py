"""The plan: which assignments survive capacity, sorted by expert. No communication but that of the sizes.

Shape suffixes: T tokens on this rank, E routed experts, C choices (E + local paths), A assignments of the gate, S rows (some
of the assignments, sorted by choice), P ranks that share experts.
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
class PermutedTokens:
    """Rows to gather, to give to experts and to combine, sorted by expert.

    The arrays may be longer than the last of `expert_offsets_E` says. What lies beyond is no row: nobody waits for the device to
    tell how many assignments were dropped.
    """

    source_index_S: Tensor
    """index into the gate's list, each once"""
    token_S: Tensor
    """token of each row"""
    unpermute_index_S: Tensor
    """rows sorted by token"""
    token_offsets_T1: Tensor
    """where each token's rows start in unpermute_index_S; the last entry is the number of rows"""
    expert_offsets_E: Tensor
    """where each expert's rows end"""

    def counts(self) -> list[int]:
        """Rows of each expert. Waits for the device."""
        return self.expert_offsets_E.diff(prepend=self.expert_offsets_E.new_zeros(1)).tolist()


@dataclass(frozen=True, slots=True)
class AllToAllSplits:
    """What the host must know to exchange rows with the other ranks; from `exchange_sizes`."""

    send: list[int]
    """rows to each rank"""
    receive: list[int]
    """rows from each rank"""
    received_PE: Tensor
    """rows from each rank for each of this rank's experts"""


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """Which rows go where; made by `make_plan`, read by the layer and its counters."""

    routed: PermutedTokens | None
    """rows for routed experts; None: all of the gate's list, in its order"""
    local: PermutedTokens | None
    """rows for local paths, sorted by path; None without any. Paths that return zeros have no rows"""
    local_counts: list[int]
    """rows of each local path, 0 for those that return zeros"""
    sizes: AllToAllSplits | None
    """None when experts are not sharded"""
    assigned_C: Tensor
    """assignments per choice before capacity"""
    dispatched_C: Tensor
    """assignments per choice after capacity"""
    dispatched_T: Tensor
    """assignments per token after capacity"""

    @staticmethod
    def as_listed(routing: Routing, num_tokens: int, num_experts: int) -> DispatchPlan:
        """For experts that need no sorted rows, when nothing is dropped."""
        assigned_C = bincount_static(routing.expert_A, num_experts)
        return DispatchPlan(
            None,
            None,
            [],
            None,
            assigned_C,
            assigned_C,
            bincount_static(routing.token_A, num_tokens),
        )


def expert_capacity(
    num_tokens: int, num_experts: int, factor: float, minimum: int
) -> int | None:
    """Rows one expert takes: min(T, max(minimum, ceil(T / E * factor))); None (no limit) for factor 0."""
    if factor == 0:
        return None
    return min(num_tokens, max(minimum, math.ceil(num_tokens / num_experts * factor)))


def build_dispatch_plan(
    routing: Routing,
    num_tokens: int,
    num_experts: int,
    num_local_paths: int = 0,
    limit: int | Tensor | None = None,
    num_zero_paths: int = 0,
    group: dist.ProcessGroup | None = None,
) -> DispatchPlan:
    """Sort assignments by choice and drop what is over capacity.

    Survivors are the `limit` highest priorities of each choice, ties by position in the gate's list; the rest is
    dropped, never rerouted. One sort, and none by token for gates that answer token by token. Only with sharded experts
    or local paths does the host wait for the device, once.

    Args:
        limit: rows one routed expert takes (local paths then have no limit), or int64 [C], or None for no limit.
        num_zero_paths: how many of the last local paths return zeros: counted, but no rows are made for them.
        group: the ranks that share the routed experts; None: this rank has all of them.
    """
    assigned_C = bincount_static(routing.expert_A, num_experts + num_local_paths)
    if limit is None:
        order_A, dispatched_C = routing.expert_A.argsort(stable=True), assigned_C
    else:
        order_A, dispatched_C = _survivors_first(routing, assigned_C, limit, num_experts)
    order = _Order.of(routing, order_A, num_tokens)
    ends_C = dispatched_C.cumsum(0)
    if limit is None and not num_local_paths:
        sizes, _, _ = _to_host(dispatched_C, num_experts, group) if group else (None, 0, [])
        routed = order.all_rows(ends_C)
        return DispatchPlan(
            routed, None, [], sizes, assigned_C, dispatched_C, routed.token_offsets_T1.diff()
        )
    dispatched_T = order.bags(order.position_A < ends_C[-1]).diff()
    if not num_local_paths and group is None:
        return DispatchPlan(
            order.rows(0, ends_C), None, [], None, assigned_C, dispatched_C, dispatched_T
        )
    sizes, num_routed, local_counts = _to_host(dispatched_C, num_experts, group)
    routed = order.rows(0, ends_C[:num_experts], num_routed)
    if not num_local_paths:
        return DispatchPlan(routed, None, [], sizes, assigned_C, dispatched_C, dispatched_T)
    if num_zero_paths:
        local_counts[-num_zero_paths:] = [0] * num_zero_paths
    ends_L = ends_C[num_experts : len(ends_C) - num_zero_paths] - num_routed
    local = order.rows(num_routed, ends_L, sum(local_counts))
    return DispatchPlan(
        routed, local, local_counts, sizes, assigned_C, dispatched_C, dispatched_T
    )


@dataclass(frozen=True, slots=True)
class _Order:
    """A permutation of the assignments, seen token by token."""

    order_A: Tensor
    """assignments by choice, those that were dropped last"""
    position_A: Tensor
    """places in order_A of all assignments, sorted by token"""
    token_A: Tensor
    """the gate's tokens"""
    sorted_token_A: Tensor
    num_tokens: int

    @staticmethod
    def of(routing: Routing, order_A: Tensor, num_tokens: int) -> _Order:
        position_A = torch.empty_like(order_A)
        position_A[order_A] = torch.arange(len(order_A), device=order_A.device)
        token_A = sorted_token_A = routing.token_A
        if not routing.token_major:
            sorted_token_A, by_token_A = token_A.sort(stable=True)
            position_A = position_A[by_token_A]
        return _Order(order_A, position_A, token_A, sorted_token_A, num_tokens)

    def all_rows(self, expert_offsets_E: Tensor) -> PermutedTokens:
        """Every assignment as a row."""
        token_offsets_T1 = F.pad(
            bincount_static(self.token_A, self.num_tokens).cumsum(0), (1, 0)
        )
        return PermutedTokens(
            self.order_A,
            self.token_A[self.order_A],
            self.position_A,
            token_offsets_T1,
            expert_offsets_E,
        )

    def rows(self, first: int, ends_G: Tensor, length: int | None = None) -> PermutedTokens:
        """The rows from place `first` on, whose groups end at `first` + `ends_G`; `length` is the last end if known."""
        last = ends_G[-1:] if len(ends_G) else 0
        inside_A = (self.position_A >= first) & (self.position_A < first + last)
        unpermute_index_S = _first(self.position_A, inside_A)[:length] - first
        source_index_S = self.order_A[first:][:length]
        return PermutedTokens(
            source_index_S,
            self.token_A[source_index_S],
            unpermute_index_S,
            self.bags(inside_A),
            ends_G,
        )

    def bags(self, inside_A: Tensor) -> Tensor:
        """Where each token's rows start among the rows that are inside."""
        counts_T = torch.zeros(self.num_tokens, dtype=torch.int64, device=inside_A.device)
        return F.pad(
            counts_T.scatter_add_(0, self.sorted_token_A, inside_A.long()).cumsum(0), (1, 0)
        )


def _to_host(
    dispatched_C: Tensor, num_experts: int, group: dist.ProcessGroup | None
) -> tuple[AllToAllSplits | None, int, list[int]]:
    """(what an exchange must know, rows for routed experts, rows of each local path): one exchange, one copy."""
    kept_E, num_paths = dispatched_C[:num_experts], len(dispatched_C) - num_experts
    if group is None:
        num_routed, *local_counts = torch.cat(
            [kept_E.sum(0, keepdim=True), dispatched_C[num_experts:]]
        ).tolist()
        return None, num_routed, local_counts
    sent_PE = kept_E.view(dist.get_world_size(group), -1)
    received_PE = torch.empty_like(sent_PE)
    dist.all_to_all_single(received_PE, sent_PE.contiguous(), group=group)
    numbers = torch.cat(
        [dispatched_C[num_experts:], sent_PE.sum(1), received_PE.sum(1)]
    ).tolist()
    local_counts, numbers = numbers[:num_paths], numbers[num_paths:]
    send, receive = numbers[: len(sent_PE)], numbers[len(sent_PE) :]
    return AllToAllSplits(send, receive, received_PE), sum(send), local_counts


def _survivors_first(
    routing: Routing, assigned_C: Tensor, limit: int | Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """(assignments sorted by choice, those over the limit after all others; survivors per choice)."""
    limit_C = limit
    if isinstance(limit, int):
        limit_C = torch.full_like(assigned_C, len(routing.expert_A))
        limit_C[:num_experts] = limit
    priority_A = (
        routing.weight_A.detach().abs() if routing.priority_A is None else routing.priority_A
    )
    by_priority = priority_A.argsort(descending=True, stable=True)
    order_A = by_priority[routing.expert_A[by_priority].argsort(stable=True)]
    choice_A = routing.expert_A[order_A]
    place_A = (
        torch.arange(len(order_A), device=order_A.device)
        - exclusive_cumsum(assigned_C)[choice_A]
    )
    return _first(order_A, place_A < limit_C[choice_A]), torch.minimum(assigned_C, limit_C)


def _first(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is set, then the others, both in their order; without waiting for the device."""
    rank = mask.cumsum(0)
    place = torch.where(mask, rank - 1, rank[-1:] + (~mask).cumsum(0) - 1)
    return torch.empty_like(values).scatter_(0, place, values)


def bincount_static(index: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 occurs: int64 [size]. Unlike bincount it never waits for the device."""
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))


def exclusive_cumsum(counts: Tensor) -> Tensor:
    """Where consecutive groups of these sizes start."""
    return counts.cumsum(0) - counts
