"""The PEER layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron.moe.dispatch.permute import GatherWeights
from megatron.moe.dispatch.plan import DispatchPlan, build_dispatch_plan
from megatron.moe.layer import MoELayer, T
from megatron.moe.peer.all_gather import all_gather_tokens, reduce_scatter_outputs
from megatron.moe.peer.experts import PEERExperts
from megatron.moe.routing import Routing


class PEERLayer(MoELayer):
    """A mixture layer whose experts are single neurons or tiny MLPs in tables (PEER).

    Rows of tokens are not sent to experts: the experts' rows are looked up. With sharded experts every rank gets all
    tokens, adds up its own experts' part of every output, and the parts are summed.

    Args:
        experts: this rank's slice of the tables.
    """

    experts: PEERExperts

    def _plan(self, routing: Routing, x_TD: Tensor) -> DispatchPlan:
        limit, sharded = self._expert_capacity(x_TD), self.groups.ep_group is not None
        if limit is None and not sharded:
            return DispatchPlan.as_listed(routing, len(x_TD), self.gate.num_experts)
        return build_dispatch_plan(routing, len(x_TD), self.gate.num_experts, limit=limit)

    def _dispatch_and_compute(
        self, x_TD: Tensor, routing: Routing, plan: DispatchPlan, beside: Callable[[], T]
    ) -> tuple[Tensor, T]:
        group, rows = self.groups.ep_group, plan.routed
        if rows is None:
            return self.experts(
                x_TD, routing.token_A, routing.expert_A, routing.weight_A
            ), beside()
        if group is None:
            kept_S = rows.source_index_S[: sum(rows.counts())]
            return self.experts(
                x_TD,
                routing.token_A[kept_S],
                routing.expert_A[kept_S],
                GatherWeights.apply(routing.weight_A, rows)[: len(kept_S)],
            ), beside()
        shared = all_gather_tokens(x_TD, rows, routing.weight_A, plan.dispatched_C, group)
        y_TD = self.experts(shared.x_TD, shared.token_S, shared.expert_S, shared.weight_S)
        return reduce_scatter_outputs(y_TD, shared, group), beside()
