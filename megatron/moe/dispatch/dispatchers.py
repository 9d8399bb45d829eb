"""Token dispatchers: how token rows reach the experts and how their outputs come back.

Shape suffixes: T tokens on this rank, D hidden, A assignments of the gate, S rows
(dispatched assignments, sorted by expert), R rows received by this rank's experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron.moe.dispatch.all_to_all import AllToAll, sort_received_by_expert
from megatron.moe.dispatch.permute import GatherWeights, PermuteTokens, UnpermuteTokens
from megatron.moe.dispatch.plan import AllToAllSplits, DispatchPlan, PermutedTokens
from megatron.moe.routing import Routing


class TokenDispatcher(ABC):
    """Moves token rows to the experts and combines the experts' outputs.

    The MoE layer calls the methods in this order:

        in_flight = dispatcher.start(x_TD, routing, plan)      # communication starts
        ...                                                    # overlaps with communication
        expert_inputs, metadata = dispatcher.finish(in_flight)
        y_TD = dispatcher.combine(experts(*expert_inputs), metadata)

    A dispatcher keeps no state between calls: what `finish` needs is in the record that
    `start` returns, and what `combine` needs is in `metadata`. Nothing else reads
    either. The backward pass of what is computed between `start` and `finish` overlaps
    with the communication of the gradients.
    """

    def __deepcopy__(self, memo: dict) -> TokenDispatcher:
        """Return itself: it has no state but the process group, which copies share."""
        return self

    @abstractmethod
    def start(self, x_TD: Tensor, routing: Routing, plan: DispatchPlan) -> Any:
        """Start sending tokens to the experts; return the record for `finish`."""

    @abstractmethod
    def finish(self, in_flight: Any) -> tuple[tuple, Any]:
        """Wait; return the experts' arguments and the record for `combine`."""

    @abstractmethod
    def combine(self, expert_output: Tensor, metadata: Any) -> Tensor:
        """Return the weighted sum of expert outputs of this rank's tokens: [T, D]."""


class LocalDispatcher(TokenDispatcher):
    """Dispatcher for experts that are all on this rank: no communication.

    The experts gather the rows, multiply them by their weights and sum them per token.
    Fused with the experts' matrix products this needs no copy of the rows, so their
    output is already combined.
    """

    def start(self, x_TD: Tensor, routing: Routing, plan: DispatchPlan) -> tuple:
        weight_S = GatherWeights.apply(routing.weight_A, plan.routed)
        return x_TD, weight_S, plan.routed

    def finish(self, in_flight: tuple) -> tuple[tuple, None]:
        return in_flight, None

    def combine(self, expert_output: Tensor, metadata: None) -> Tensor:
        return expert_output


@dataclass(frozen=True, slots=True)
class _SentRows:
    """Rows that this rank sent to other ranks, which return as expert outputs."""

    routed: PermutedTokens
    splits: AllToAllSplits


@dataclass(frozen=True, slots=True)
class _RowsInFlight:
    """Token rows and weights on their way to other ranks."""

    all_to_all: AllToAll
    sent: _SentRows


class AllToAllDispatcher(TokenDispatcher):
    """Dispatcher for sharded experts: one row per assignment goes to its expert's rank.

    Weights travel with the rows, because the experts apply them between their two
    matrix products.

    Args:
        group: ranks that share the experts.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def start(self, x_TD: Tensor, routing: Routing, plan: DispatchPlan) -> _RowsInFlight:
        weight_S = GatherWeights.apply(routing.weight_A, plan.routed)
        x_SD = PermuteTokens.apply(x_TD, plan.routed)
        splits = plan.splits
        all_to_all = AllToAll(
            (x_SD, weight_S), splits.input_splits, splits.output_splits, self.group
        )
        return _RowsInFlight(all_to_all, _SentRows(plan.routed, splits))

    def finish(self, in_flight: _RowsInFlight) -> tuple[tuple, _SentRows]:
        x_RD, weight_R = in_flight.all_to_all.finish()
        received = sort_received_by_expert(in_flight.sent.splits)
        expert_inputs = (x_RD, GatherWeights.apply(weight_R, received), received)
        return expert_inputs, in_flight.sent

    def combine(self, expert_output: Tensor, metadata: _SentRows) -> Tensor:
        splits = metadata.splits
        all_to_all = AllToAll(
            (expert_output,), splits.output_splits, splits.input_splits, self.group
        )
        (y_SD,) = all_to_all.finish()
        return UnpermuteTokens.apply(y_SD, None, metadata.routed)
