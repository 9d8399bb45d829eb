"""The PEER layer: an MoE layer whose experts are rows of tables."""

from __future__ import annotations

from torch import Tensor

from megatron.moe.dispatch.dispatchers import TokenDispatcher
from megatron.moe.dispatch.plan import DispatchPlan, build_dispatch_plan
from megatron.moe.layer import MoELayer
from megatron.moe.peer.dispatchers import AllGatherDispatcher, PEERLocalDispatcher
from megatron.moe.peer.experts import PEERExperts
from megatron.moe.routing import Routing


class PEERLayer(MoELayer):
    """An MoE layer whose experts are single neurons or tiny MLPs in tables (PEER).

    It differs from `MoELayer` in its dispatcher: token rows are not sorted by expert,
    since the experts look up their table rows for each assignment. With sharded experts
    every rank gathers all tokens and computes its own experts' part of every output.

    Args:
        experts: this rank's slice of the tables.
    """

    experts: PEERExperts

    def _make_dispatcher(self) -> TokenDispatcher:
        if self.groups.ep_group is None:
            return PEERLocalDispatcher()
        return AllGatherDispatcher(self.groups.ep_group)

    def _plan(
        self, routing: Routing, num_tokens: int, capacity: int | Tensor | None
    ) -> DispatchPlan:
        num_experts = self.gate.num_experts
        if capacity is None and self.groups.ep_group is None:
            return DispatchPlan.unpermuted(routing, num_tokens, num_experts)
        return build_dispatch_plan(routing, num_tokens, num_experts, capacity=capacity)
