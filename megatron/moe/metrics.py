"""MoE metrics: counters of the layers, reduced over ranks, and totals for gates.

All reductions of counters are here: one all-reduce per logging interval, and one per
optimizer step for gates that keep state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.moe.gate import Gate
from megatron.moe.layer import MoELayer
from megatron.moe.routing import StepTotals
from megatron.parallel.groups import Groups, all_reduce_sum


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Return the MoE layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


class MoEMetrics:
    """Collects the counters of a model's MoE layers.

    Call `post_optimizer_step` once per optimizer step and `read` once per log line.
    Each takes one all-reduce; `post_optimizer_step` takes none when no gate keeps
    state.
    """

    def __init__(self, model: nn.Module, groups: Groups):
        self.layers = moe_layers(model)
        self.groups = groups
        self._any_gate_with_state = any(
            type(layer.gate).post_optimizer_step is not Gate.post_optimizer_step
            for layer in self.layers
        )

    @torch.no_grad()
    def post_optimizer_step(self, skipped: bool = False) -> None:
        """Give gates the step's totals over ranks and micro-batches, then clear them.

        Args:
            skipped: the step changed no weights because a gradient overflowed; then it
                changes no gate's state either.
        """
        counted = all(layer.step_sums for layer in self.layers)
        if self._any_gate_with_state and counted and not skipped:
            totals = self._reduce([layer.step_sums for layer in self.layers])
            load_LE = torch.stack([sums["load_E"] for sums in totals]).float()
            for layer, sums, load_E in zip(self.layers, totals, load_LE, strict=True):
                metric_sums = _with_prefix(sums, "sum/")
                num_tokens = sums["tokens"].float()
                layer.gate.post_optimizer_step(
                    StepTotals(load_E, num_tokens, metric_sums, load_LE)
                )
        for layer in self.layers:
            layer.reset_step_state()

    @torch.no_grad()
    def read(self, training: bool = True) -> dict[str, float | list[float]]:
        """Return means over ranks and forward passes since the last call, then reset.

        Args:
            training: read the counters of training or those of evaluation.
        Returns:
            Empty without MoE layers or forward passes, else means over layers of

            - experts_per_token, experts_per_token_before_capacity: routed and
              zero-computation experts of a token after and before capacity,
            - dropped_assignment_fraction: share of assignments over capacity,
            - tokens_with_drops_fraction: share of tokens that lost an assignment,
            - load_imbalance_max_over_mean: largest over mean load of the routed
              experts, after capacity,
            - zero_computation_fraction: share of dispatched assignments that went to
              zero-computation experts; only for gates with such experts,
            - moe_aux_loss,
            - the gate's `metric_means`, and the metrics it makes of its `metric_sums`;

            each also as a list `..._by_layer`; and experts_per_token_histogram, the
            share of tokens with 0, 1, 2, ... experts after capacity, over all layers.
        """
        if not self.layers or not self.layers[0].counters[training]:
            return {}
        counters = [layer.counters[training] for layer in self.layers]
        totals = self._reduce(counters, to_host=True)
        for layer in self.layers:
            layer.counters[training].clear()
        return _summarize(self.layers, totals)

    def _reduce(
        self, sums: list[dict[str, Tensor]], *, to_host: bool = False
    ) -> list[dict[str, Tensor]]:
        """Sum each layer's values over all ranks: one fp64 all-reduce.

        Args:
            to_host: also copy the result to the CPU, in one copy.
        """
        names = list(sums[0])
        shapes = [sums[0][name].shape for name in names]
        stacked = torch.stack([_flatten(layer_sums, names) for layer_sums in sums])
        stacked = all_reduce_sum(stacked, self.groups)
        if to_host:
            stacked = stacked.cpu()
        sizes = [shape.numel() for shape in shapes]
        return [_unflatten(row.split(sizes), names, shapes) for row in stacked]


def _flatten(sums: dict[str, Tensor], names: list[str]) -> Tensor:
    """Concatenate these values to one row."""
    return torch.cat([sums[name].flatten() for name in names])


def _unflatten(
    parts: tuple[Tensor, ...], names: list[str], shapes: list[torch.Size]
) -> dict[str, Tensor]:
    """Return the parts of a flat row by name, each in its shape."""
    return {
        name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)
    }


def _summarize(
    layers: list[MoELayer], totals: list[dict[str, Tensor]]
) -> dict[str, float | list[float]]:
    """Return values per layer and their means over layers."""
    by_layer: dict[str, list[float]] = {}
    histogram = torch.zeros(())
    for layer, sums in zip(layers, totals, strict=True):
        for name, value in _layer_values(layer, sums).items():
            by_layer.setdefault(name, []).append(float(value))
        histogram = histogram + sums["experts_per_token_histogram"]
    means = {name: sum(values) / len(values) for name, values in by_layer.items()}
    return {
        **means,
        "experts_per_token_histogram": (histogram / histogram.sum()).tolist(),
        **{f"{name}_by_layer": values for name, values in by_layer.items()},
    }


def _layer_values(layer: MoELayer, sums: dict[str, Tensor]) -> dict[str, Tensor | float]:
    """Return the metrics of one layer, which are ratios of its sums."""
    tokens = sums["tokens"]
    assigned = sums["assigned_C"].sum()
    dispatched = sums["dispatched_C"].sum()
    load_E = sums["dispatched_C"][: layer.gate.num_experts]
    values = {
        "experts_per_token_before_capacity": assigned / tokens,
        "experts_per_token": dispatched / tokens,
        "dropped_assignment_fraction": (assigned - dispatched) / assigned.clamp_min(1),
        "tokens_with_drops_fraction": sums["tokens_with_drops"] / tokens,
        "load_imbalance_max_over_mean": load_E.max() / load_E.mean().clamp_min(1 / len(load_E)),
        "moe_aux_loss": sums["aux_loss"] / sums["forwards"],
    }
    if len(layer.gate.zero_computation_experts):
        values["zero_computation_fraction"] = 1 - load_E.sum() / dispatched.clamp_min(1)
    for name, value in _with_prefix(sums, "mean/").items():
        values[name] = value / sums["forwards"]
    values.update(layer.gate.summarise(_with_prefix(sums, "sum/")))
    return values


def _with_prefix(sums: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the gate's own entries by name: those with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in sums.items()
        if name.startswith(prefix)
    }
