"""What an MoE layer counts in its forward passes, as sums on the device.

Counts are summed in fp64 over the forward passes of a logging interval
(`MoELayer.counters`) or of an optimizer step (`MoELayer.step_sums`), then over ranks.
Nothing here synchronises with the device.

Shape suffixes: T positions on this rank, R those that are not padding, C choices (routed
and zero-computation experts), E routed experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.moe.dispatch.plan import DispatchPlan, bincount_static
from megatron.moe.gate import Gate
from megatron.moe.routing import GateInput, Routing


def forward_counts(
    gate: Gate,
    inp: GateInput,
    routing: Routing,
    plan: DispatchPlan,
    losses: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Count a forward pass for the metrics of an interval.

    Padding is not counted. A mean over tokens counts as often as it has tokens, and the
    losses of a pass without tokens count neither here nor in the model's loss.

    Args:
        losses: the auxiliary loss, and parts of it that are logged, by name.
    """
    num_tokens = inp.num_tokens
    assigned_T = bincount_static(routing.token_A, len(inp.x_TD))
    dispatched_R = plan.dispatched_T
    if inp.padding_T is not None:
        dispatched_R = dispatched_R[inp.unpadded_R]
    one = torch.ones((), device=assigned_T.device)
    gate_means = {
        f"mean/{name}": value.double() * num_tokens
        for name, value in routing.metric_means.items()
    }
    if num_tokens == 0:
        losses = {name: torch.zeros_like(value) for name, value in losses.items()}
    num_bins = max_experts_per_token(gate) + 1
    return {
        "forwards": one * (num_tokens > 0),
        "tokens": one * num_tokens,
        "tokens_with_drops": (plan.dispatched_T < assigned_T).sum(),
        "assigned_C": plan.assigned_C,
        "dispatched_C": plan.dispatched_C,
        "experts_per_token_histogram": bincount_static(
            dispatched_R.clamp_max(num_bins - 1), num_bins
        ),
        **{f"loss/{name}": value for name, value in losses.items()},
        **gate_means,
        **_gate_sums(routing),
    }


def step_counts(
    gate: Gate, inp: GateInput, routing: Routing, plan: DispatchPlan
) -> dict[str, Tensor]:
    """Count a forward pass in training for the gate's update after the optimizer step."""
    load_E = plan.assigned_C[: gate.num_experts]
    one = torch.ones((), device=load_E.device)
    step_sums = {f"step/{name}": value for name, value in routing.step_sums.items()}
    return {
        "tokens": one * inp.num_tokens,
        "load_E": load_E,
        **_gate_sums(routing),
        **step_sums,
    }


def _gate_sums(routing: Routing) -> dict[str, Tensor]:
    return {f"sum/{name}": value for name, value in routing.metric_sums.items()}


def max_experts_per_token(gate: Gate) -> int:
    """Return the most experts of both kinds that a token can have."""
    num_experts = gate.num_experts
    most = type(gate).experts_per_token(gate.config, num_experts)[1]
    return min(max(most, 1), num_experts) + len(gate.zero_computation_experts)


def add_counts(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add values to sums in fp64, so that counts of a long interval stay exact."""
    for name, value in values.items():
        value = value.detach().double()
        if name in sums:
            sums[name] = sums[name] + value
        else:
            sums[name] = value.clone()
