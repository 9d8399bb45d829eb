"""The dispatch plan: which assignments fit the experts' capacity, sorted by expert.

The plan moves no tokens. Its only communication is one exchange of row counts, and only
when the experts are sharded.

Shape suffixes: T tokens on this rank, E routed experts, C choices (E + zero-computation
experts), A assignments of the gate, S rows (dispatched assignments, sorted by choice),
L zero-computation experts with rows, P ranks that share the experts.
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
    """Index tensors that permute token rows to expert order and back.

    Entries of the S tensors past `expert_offsets_E[-1]` are padding: reading the true
    length would force a device sync.
    """

    source_index_S: Tensor
    """index of each row into the gate's assignments; every assignment at most once"""
    token_S: Tensor
    """token of each row"""
    unpermute_index_S: Tensor
    """row numbers sorted by token"""
    token_offsets_T1: Tensor
    """start of each token's rows in unpermute_index_S; the last entry is the number of
    rows"""
    expert_offsets_E: Tensor
    """end of each expert's rows"""

    def counts(self) -> list[int]:
        """Return the number of rows of each expert. Synchronises with the device."""
        return self.expert_offsets_E.diff(prepend=self.expert_offsets_E.new_zeros(1)).tolist()

    def one_row_per_token(self, num_rows: int) -> PermutedTokens:
        """Return these rows as if each was a token of its own, in the order of the rows.

        Args:
            num_rows: number of tokens; rows past the last expert's are tokens without
                experts.
        """
        row_S = torch.arange(num_rows + 1, device=self.token_S.device)
        return PermutedTokens(
            source_index_S=row_S[:-1],
            token_S=row_S[:-1],
            unpermute_index_S=row_S[:-1],
            token_offsets_T1=torch.minimum(row_S, self.expert_offsets_E[-1]),
            expert_offsets_E=self.expert_offsets_E,
        )


@dataclass(frozen=True, slots=True)
class AllToAllSplits:
    """Row counts of the all-to-all between the ranks that share the experts."""

    input_splits: list[int]
    """rows sent to each rank"""
    output_splits: list[int]
    """rows received from each rank"""
    received_PE: Tensor
    """rows received from each rank for each of this rank's experts"""


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """Where each assignment goes. Made by `build_dispatch_plan`."""

    routed: PermutedTokens | None
    """rows for routed experts; None: all of the gate's assignments, in the gate's
    order"""
    zero_computation: PermutedTokens | None
    """rows for zero-computation experts, sorted by expert; None if the gate has none.
    Experts that return zeros have no rows"""
    zero_computation_counts: list[int]
    """rows of each zero-computation expert; 0 for those that return zeros"""
    splits: AllToAllSplits | None
    """None when the experts are not sharded"""
    assigned_C: Tensor
    """assignments per choice before capacity"""
    dispatched_C: Tensor
    """assignments per choice after capacity"""
    dispatched_T: Tensor
    """assignments per token after capacity"""

    @staticmethod
    def unpermuted(routing: Routing, num_tokens: int, num_experts: int) -> DispatchPlan:
        """Build a dropless plan for experts that need no sorted rows."""
        assigned_C = bincount_static(routing.expert_A, num_experts)
        return DispatchPlan(
            routed=None,
            zero_computation=None,
            zero_computation_counts=[],
            splits=None,
            assigned_C=assigned_C,
            dispatched_C=assigned_C,
            dispatched_T=bincount_static(routing.token_A, num_tokens),
        )


def capacity_from_factor(
    num_tokens: int, num_experts: int, factor: float, minimum: int, k: int = 1
) -> int | None:
    """Compute an expert's capacity: min(T, max(minimum, ceil(factor * k * T / E))) rows.

    With a factor of 1.0 an even load of k experts per token fits exactly, as in DeepSpeed
    and Megatron. A factor of 0 means no limit and returns None.
    """
    if factor == 0:
        return None
    rows = factor * k * num_tokens / num_experts
    # Rounding of a factor like 4 / 3 must not add a row.
    return min(num_tokens, max(minimum, math.ceil(round(rows, 6))))


def build_dispatch_plan(
    routing: Routing,
    num_tokens: int,
    num_experts: int,
    num_zero_computation: int = 0,
    capacity: int | Tensor | None = None,
    num_zero_output: int = 0,
    group: dist.ProcessGroup | None = None,
) -> DispatchPlan:
    """Sort assignments by choice and drop those over capacity.

    Each choice keeps its `capacity` assignments of highest priority, ties by position
    in the gate's list; the others are dropped, never rerouted. This takes one sort,
    plus one by token for gates whose list is not token-major. The host synchronises
    with the device once, and only with sharded experts or zero-computation experts.

    Args:
        routing: output of the gate.
        num_zero_computation: number of zero-computation experts.
        capacity: rows that each routed expert accepts (zero-computation experts then
            have no limit), or int64 [C] with the limit of each choice, or None for no
            limit.
        num_zero_output: how many of the last zero-computation experts return zeros:
            they are counted, but no rows are made for them.
        group: ranks that share the routed experts; None: this rank holds all of them.
    """
    assigned_C = bincount_static(routing.expert_A, num_experts + num_zero_computation)
    if capacity is None:
        order_A = routing.expert_A.argsort(stable=True)
        dispatched_C = assigned_C
    else:
        order_A, dispatched_C = _apply_capacity(routing, assigned_C, capacity, num_experts)
    assignments = _SortedAssignments.from_order(routing, order_A, num_tokens)
    ends_C = dispatched_C.cumsum(0)
    counts = _HostCounts(splits=None, num_routed=None, zero_computation=[])
    if group is not None or num_zero_computation:
        counts = _read_counts(dispatched_C, num_experts, num_zero_output, group)
    if capacity is None and not num_zero_computation:
        routed = assignments.permute_all(ends_C)
        dispatched_T = routed.token_offsets_T1.diff()
    else:
        routed = assignments.permute(0, ends_C[:num_experts], counts.num_routed)
        is_dispatched_A = assignments.position_A < ends_C[-1]
        dispatched_T = assignments.token_offsets(is_dispatched_A).diff()
    zero_computation = None
    if num_zero_computation:
        ends_L = ends_C[num_experts : len(ends_C) - num_zero_output] - counts.num_routed
        zero_computation = assignments.permute(
            counts.num_routed, ends_L, sum(counts.zero_computation)
        )
    return DispatchPlan(
        routed=routed,
        zero_computation=zero_computation,
        zero_computation_counts=counts.zero_computation,
        splits=counts.splits,
        assigned_C=assigned_C,
        dispatched_C=dispatched_C,
        dispatched_T=dispatched_T,
    )


@dataclass(frozen=True, slots=True)
class _SortedAssignments:
    """Assignments sorted by choice, with their positions listed by token."""

    order_A: Tensor
    """assignments by choice, dropped ones last"""
    position_A: Tensor
    """positions in order_A of all assignments, sorted by token"""
    token_A: Tensor
    """token of each assignment, in the gate's order"""
    sorted_token_A: Tensor
    """token of each assignment, ascending"""
    num_tokens: int

    @staticmethod
    def from_order(routing: Routing, order_A: Tensor, num_tokens: int) -> _SortedAssignments:
        """Invert the order and list the positions by token."""
        position_A = torch.empty_like(order_A)
        position_A[order_A] = torch.arange(len(order_A), device=order_A.device)
        token_A = routing.token_A
        sorted_token_A = token_A
        if not routing.token_major:
            sorted_token_A, by_token_A = token_A.sort(stable=True)
            position_A = position_A[by_token_A]
        return _SortedAssignments(order_A, position_A, token_A, sorted_token_A, num_tokens)

    def permute_all(self, expert_offsets_E: Tensor) -> PermutedTokens:
        """Return all assignments as rows."""
        counts_T = bincount_static(self.token_A, self.num_tokens)
        return PermutedTokens(
            source_index_S=self.order_A,
            token_S=self.token_A[self.order_A],
            unpermute_index_S=self.position_A,
            token_offsets_T1=F.pad(counts_T.cumsum(0), (1, 0)),
            expert_offsets_E=expert_offsets_E,
        )

    def permute(self, first: int, ends_G: Tensor, length: int | None = None) -> PermutedTokens:
        """Return the assignments from position `first` on as rows.

        Args:
            first: position in order_A of the first row.
            ends_G: end of each expert's rows, relative to `first`.
            length: value of `ends_G[-1]` where the host knows it; None leaves padding.
        """
        num_rows = ends_G[-1:] if len(ends_G) else 0
        inside_A = (self.position_A >= first) & (self.position_A < first + num_rows)
        source_index_S = self.order_A[first:][:length]
        return PermutedTokens(
            source_index_S=source_index_S,
            token_S=self.token_A[source_index_S],
            unpermute_index_S=_stable_partition(self.position_A, inside_A)[:length] - first,
            token_offsets_T1=self.token_offsets(inside_A),
            expert_offsets_E=ends_G,
        )

    def token_offsets(self, inside_A: Tensor) -> Tensor:
        """Return where each token's rows start, counting masked rows only: [T + 1]."""
        counts_T = torch.zeros(self.num_tokens, dtype=torch.int64, device=inside_A.device)
        counts_T.scatter_add_(0, self.sorted_token_A, inside_A.long())
        return F.pad(counts_T.cumsum(0), (1, 0))


@dataclass(frozen=True, slots=True)
class _HostCounts:
    """Row counts that the host needs before it can launch the dispatch."""

    splits: AllToAllSplits | None
    """None when the experts are not sharded"""
    num_routed: int | None
    """rows for routed experts; None: not read from the device"""
    zero_computation: list[int]
    """rows of each zero-computation expert; 0 for those that return zeros"""


def _read_counts(
    dispatched_C: Tensor,
    num_experts: int,
    num_zero_output: int,
    group: dist.ProcessGroup | None,
) -> _HostCounts:
    """Exchange row counts between ranks and copy them to the host, in one copy."""
    dispatched_E = dispatched_C[:num_experts]
    zero_computation = dispatched_C[num_experts:]
    if group is None:
        num_routed, *local_counts = torch.cat(
            [dispatched_E.sum(0, keepdim=True), zero_computation]
        ).tolist()
        splits = None
    else:
        sent_PE = dispatched_E.view(dist.get_world_size(group), -1)
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE.contiguous(), group=group)
        numbers = torch.cat([sent_PE.sum(1), received_PE.sum(1), zero_computation]).tolist()
        ep_size = len(sent_PE)
        input_splits = numbers[:ep_size]
        output_splits = numbers[ep_size : 2 * ep_size]
        local_counts = numbers[2 * ep_size :]
        num_routed = sum(input_splits)
        splits = AllToAllSplits(input_splits, output_splits, received_PE)
    if num_zero_output:
        local_counts[-num_zero_output:] = [0] * num_zero_output
    return _HostCounts(splits, num_routed, local_counts)


def _apply_capacity(
    routing: Routing, assigned_C: Tensor, capacity: int | Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Sort assignments by choice and move those over capacity behind all others.

    Returns:
        (sorted assignments [A], number of dispatched assignments per choice [C]).
    """
    if isinstance(capacity, int):
        capacity_C = torch.full_like(assigned_C, len(routing.expert_A))
        capacity_C[:num_experts] = capacity
    else:
        capacity_C = capacity
    priority_A = routing.priority_A
    if priority_A is None:
        priority_A = routing.weight_A.detach().abs()
    by_priority_A = priority_A.argsort(descending=True, stable=True)
    order_A = by_priority_A[routing.expert_A[by_priority_A].argsort(stable=True)]
    choice_A = routing.expert_A[order_A]
    position_A = torch.arange(len(order_A), device=order_A.device)
    rank_in_choice_A = position_A - exclusive_cumsum(assigned_C)[choice_A]
    within_capacity_A = rank_in_choice_A < capacity_C[choice_A]
    return _stable_partition(order_A, within_capacity_A), torch.minimum(assigned_C, capacity_C)


def _stable_partition(values: Tensor, mask: Tensor) -> Tensor:
    """Return the values where the mask is set, then the others, both in their order.

    Unlike boolean indexing this does not synchronise with the device.
    """
    rank = mask.cumsum(0)
    position = torch.where(mask, rank - 1, rank[-1:] + (~mask).cumsum(0) - 1)
    return torch.empty_like(values).scatter_(0, position, values)


def bincount_static(index: Tensor, size: int) -> Tensor:
    """Count how often each of 0 .. size - 1 occurs: int64 [size].

    Unlike torch.bincount its output shape is static, so it does not synchronise with
    the device.
    """
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))


def exclusive_cumsum(counts: Tensor) -> Tensor:
    """Return the start of each of consecutive groups with these sizes."""
    return counts.cumsum(0) - counts
