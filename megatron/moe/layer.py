"""The mixture-of-experts layer: gate -> plan -> dispatch -> experts -> combine, plus shared experts and local paths.

Plain torch: it imports no DeepSpeed, so inference, export and gate tests need none. `megatron.engine.moe_adapter.attach`
adds the bookkeeping that DeepSpeed's engine looks for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megatron.moe.dispatch.all_to_all import AllToAll, sort_received_by_expert
from megatron.moe.dispatch.permute import GatherWeights, PermuteTokens, UnpermuteTokens
from megatron.moe.dispatch.plan import (
    DispatchPlan,
    bincount_static,
    build_dispatch_plan,
    expert_capacity,
)
from megatron.moe.experts.grouped_experts import GroupedExperts
from megatron.moe.ffn import FFNContext, FFNOutput
from megatron.moe.gate import Gate
from megatron.moe.routing import GateInput, Routing
from megatron.parallel.groups import Groups, all_reduce_sum

T = TypeVar("T")


class MoELayer(nn.Module):
    """A feed-forward layer in which a gate chooses the experts of each token.

    Args:
        gate: answers which experts each token visits; owns the router.
        experts: this rank's slice of the routed experts.
        num_experts: stacked weights of `experts` over all ranks of the expert-parallel group, which is how checkpoints
            count them; PEER's are blocks of many neurons.
        shared: an always-on MLP `(x, context) -> FFNOutput`, or None.
        train_capacity_factor, eval_capacity_factor, min_capacity: see `plan.capacity`; factor 0 is dropless.
        groups: who shares the experts, and whose loads a global balance loss adds up.
    """

    def __init__(
        self,
        gate: Gate,
        experts: GroupedExperts,
        num_experts: int,
        *,
        shared: nn.Module | None = None,
        train_capacity_factor: float = 0.0,
        eval_capacity_factor: float = 0.0,
        min_capacity: int = 4,
        groups: Groups | None = None,
    ):
        super().__init__()
        self.gate, self.experts, self.shared = gate, experts, shared
        self.num_experts = num_experts
        self.capacity_factors = {True: train_capacity_factor, False: eval_capacity_factor}
        self.min_capacity = min_capacity
        self.groups = groups or Groups()
        self.counters: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        """sums since the last reading, by training mode; `megatron.moe.metrics` reads and clears them"""
        self.step_sums: dict[str, Tensor] = {}
        """sums since the last optimizer step, on this rank"""
        self._step_loads: list[tuple[Tensor, Tensor]] = []
        self._recompute_cache: dict[str, Any] | None = None
        self._is_recompute = False
        self._checked = False

    def forward(self, x_BSD: Tensor, context: FFNContext | None = None) -> FFNOutput:
        """Args: x_BSD: normalised hidden states. Returns: FFNOutput with y [B, S, D] and the gate's aux loss."""
        context = context or FFNContext()
        x_TD = x_BSD.flatten(0, -2)
        routing = self.gate(self._gate_input(x_BSD, context))
        if not self._checked:
            routing.check(
                len(x_TD), self.gate.num_experts + len(self.gate.zero_computation_experts)
            )
            self._checked = True
        plan = self._plan(routing, x_TD)
        y_TD, beside = self._dispatch_and_compute(
            x_TD, routing, plan, lambda: self._local_outputs(x_BSD, routing, plan, context)
        )
        for part in beside:
            y_TD = y_TD + part
        aux_loss = self._aux_loss(routing)
        if not self._is_recompute:
            self._count(routing, plan, aux_loss)
        return FFNOutput(y_TD.view_as(x_BSD), aux_loss, routing.carry)

    def _plan(self, routing: Routing, x_TD: Tensor) -> DispatchPlan:
        paths = self.gate.zero_computation_experts
        zero_paths = sum(getattr(path, "is_zero", False) for path in paths)
        return build_dispatch_plan(
            routing,
            len(x_TD),
            self.gate.num_experts,
            len(paths),
            self._expert_capacity(x_TD),
            zero_paths,
            self.groups.ep_group,
        )

    def _dispatch_and_compute(
        self, x_TD: Tensor, routing: Routing, plan: DispatchPlan, beside: Callable[[], T]
    ) -> tuple[Tensor, T]:
        """(weighted sum of the routed experts' outputs [T, D], what `beside` returns).

        `beside` is called while rows are on their way to other ranks.
        """
        weight_S = GatherWeights.apply(routing.weight_A, plan.routed)
        if plan.sizes is None:
            return self.experts(x_TD, weight_S, plan.routed), beside()
        send, receive, group = plan.sizes.send, plan.sizes.receive, self.groups.ep_group
        exchange = AllToAll(
            (PermuteTokens.apply(x_TD, plan.routed), weight_S), send, receive, group
        )
        there = beside()
        x_RD, weight_R = exchange.finish()
        rows = sort_received_by_expert(plan.sizes)
        y_RD = self.experts(x_RD, GatherWeights.apply(weight_R, rows), rows)
        (y_SD,) = AllToAll((y_RD,), receive, send, group).finish()
        return UnpermuteTokens.apply(y_SD, None, plan.routed), there

    def _local_outputs(
        self, x_BSD: Tensor, routing: Routing, plan: DispatchPlan, context: FFNContext
    ) -> list[Tensor]:
        """What needs no other rank, as [T, D] each: local paths, whose rows never leave it, and the shared experts."""
        x_TD, parts = x_BSD.flatten(0, -2), []
        if plan.local is not None:
            inputs = PermuteTokens.apply(x_TD, plan.local).split(plan.local_counts)
            # Without rows too: ZeRO 2 needs a gradient of every parameter on every rank, if only zeros.
            outputs = [
                path(x)
                for path, x in zip(self.gate.zero_computation_experts, inputs, strict=True)
            ]
            parts.append(
                UnpermuteTokens.apply(
                    torch.cat(outputs),
                    GatherWeights.apply(routing.weight_A, plan.local),
                    plan.local,
                )
            )
        if self.shared is not None:
            parts.append(self.shared(x_BSD, context).y.flatten(0, -2))
        return parts

    def _expert_capacity(self, x_TD: Tensor) -> int | Tensor | None:
        num_tokens, factor = len(x_TD), self.capacity_factors[self.training]
        own = self.gate.capacities(num_tokens, factor, self.min_capacity) if factor else None
        if own is not None:
            return torch.tensor(own, device=x_TD.device)
        return expert_capacity(num_tokens, self.gate.num_experts, factor, self.min_capacity)

    def _gate_input(self, x_BSD: Tensor, context: FFNContext) -> GateInput:
        ids = context.token_ids_BS
        sequence_T, num_sequences = None, 1
        if x_BSD.dim() == 3:
            num_sequences = len(x_BSD)
            sequence_T = torch.arange(num_sequences, device=x_BSD.device).repeat_interleave(
                x_BSD.shape[1]
            )
        return GateInput(
            x_BSD.flatten(0, -2),
            None if ids is None else ids.flatten(),
            sequence_T,
            context.carry,
            context.progress,
            num_sequences,
        )

    def _aux_loss(self, routing: Routing) -> Tensor:
        """The gate's loss, and its global-batch terms with the loads of all ranks and of the step so far."""
        if not routing.balance:
            return routing.aux_loss
        if not self.training:  # nothing to train, nobody to ask
            return routing.aux_loss + sum(term.loss() for term in routing.balance)
        if self._is_recompute:
            loads = self._recompute_cache["loads"]
        else:
            loads = self._global_loads(routing)
            if self._recompute_cache is not None:
                self._recompute_cache["loads"] = loads
        return routing.aux_loss + sum(
            term.loss(*load) for term, load in zip(routing.balance, loads, strict=True)
        )

    @torch.no_grad()
    def _global_loads(self, routing: Routing) -> list[tuple[Tensor, Tensor]]:
        """(count, total) of each term, summed over all ranks and over the micro-batches of this step up to this one."""
        flat = torch.cat(
            [t.flatten() for term in routing.balance for t in (term.count_NG, term.total_N)]
        ).double()
        parts = iter(
            all_reduce_sum(flat, self.groups)
            .float()
            .split(
                [t.numel() for term in routing.balance for t in (term.count_NG, term.total_N)]
            )
        )
        loads = [(next(parts).view_as(term.count_NG), next(parts)) for term in routing.balance]
        if self._step_loads:
            loads = [
                (a + c, b + d) for (a, b), (c, d) in zip(loads, self._step_loads, strict=True)
            ]
        self._step_loads = loads
        return loads

    def end_step(self) -> None:
        """Forget what belongs to the optimizer step that is over."""
        self.step_sums, self._step_loads = {}, []

    def recompute_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For `torch.utils.checkpoint`: what goes around a forward pass, and around its repetition in the backward one.

        The repetition counts nothing, exchanges no loads, and has the aux loss of the first time.
        """
        memory: dict[str, Any] = {}
        return _RecomputeContext(self, memory, again=False), _RecomputeContext(
            self, memory, again=True
        )

    @torch.no_grad()
    def _count(self, routing: Routing, plan: DispatchPlan, aux_loss: Tensor) -> None:
        """Add this forward to the counters."""
        num_tokens = len(plan.dispatched_T)
        wanted_T = bincount_static(routing.token_A, num_tokens)
        one, bins = torch.ones((), device=wanted_T.device), self._most_choices() + 1
        step = {
            "tokens": one * num_tokens,
            "load_E": plan.assigned_C[: self.gate.num_experts],
            **{f"sum/{name}": value for name, value in routing.metric_sums.items()},
        }
        seen = {
            "tokens": one * num_tokens,
            "assigned_C": plan.assigned_C,
            "dispatched_C": plan.dispatched_C,
            "lost_tokens": (plan.dispatched_T < wanted_T).sum(),
            "kept_histogram": bincount_static(plan.dispatched_T.clamp_max(bins - 1), bins),
            "forwards": one,
            "aux_loss": aux_loss,
            **{f"stat/{name}": value for name, value in routing.metric_means.items()},
            **{f"sum/{name}": value for name, value in routing.metric_sums.items()},
        }
        _add(self.counters[self.training], seen)
        if self.training:
            _add(self.step_sums, step)

    def _most_choices(self) -> int:
        """Choices a token can have kept, for the histogram."""
        most = type(self.gate).experts_per_token(self.gate.config, self.gate.num_experts)[1]
        return min(
            max(most, 1) + len(self.gate.zero_computation_experts),
            self.gate.num_experts + len(self.gate.zero_computation_experts),
        )


class _RecomputeContext(AbstractContextManager):
    """A forward pass of a layer: the first, which fills the memory, or one of its repetitions. May be entered again."""

    def __init__(self, layer: MoELayer, memory: dict[str, Any], again: bool):
        self.layer, self.memory, self.again = layer, memory, again

    def __enter__(self) -> None:
        self.layer._recompute_cache, self.layer._is_recompute = self.memory, self.again

    def __exit__(self, *error: object) -> None:
        self.layer._recompute_cache, self.layer._is_recompute = None, False


def _add(sums: dict[str, Tensor], seen: dict[str, Tensor]) -> None:
    """Sum up in fp64: counts of a long interval stay exact."""
    for name, value in seen.items():
        value = value.detach().double()
        sums[name] = sums[name] + value if name in sums else value.clone()
