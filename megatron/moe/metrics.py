"""Reads the layers' counters, reduces them over ranks, and gives gates their step's loads. The one place that does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.moe.gate import Gate
from megatron.moe.layer import MoELayer
from megatron.moe.routing import StepTotals
from megatron.parallel.groups import Groups, all_reduce_sum


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The mixture layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, MoELayer)]


class MoEMetrics:
    """Collects what the mixture layers of a model counted.

    `post_optimizer_step` once per optimizer step, `read` once per log line: one all-reduce each, and `post_optimizer_step` has none
    when no gate asks for totals.
    """

    def __init__(self, model: nn.Module, groups: Groups):
        self.layers, self.groups = moe_layers(model), groups
        self._gates_with_state = [
            layer.gate
            for layer in self.layers
            if type(layer.gate).post_optimizer_step is not Gate.post_optimizer_step
        ]

    @torch.no_grad()
    def post_optimizer_step(self, skipped: bool = False) -> None:
        """End an optimizer step: give each gate what was counted since the last one, over ranks and micro-batches.

        Args:
            skipped: the step changed no weights, because a gradient overflowed; then it changes no gate's state either.
        """
        if self._gates_with_state and not skipped and all(m.step_sums for m in self.layers):
            totals = self._reduce([m.step_sums for m in self.layers])
            load_LE = torch.stack([sums["load_E"] for sums in totals]).float()
            for layer, sums, load_E in zip(self.layers, totals, load_LE, strict=True):
                layer.gate.post_optimizer_step(
                    StepTotals(load_E, sums["tokens"].float(), _named(sums, "sum/"), load_LE)
                )
        for layer in self.layers:
            layer.end_step()

    def _reduce(
        self, sums: list[dict[str, Tensor]], *, to_host: bool = False
    ) -> list[dict[str, Tensor]]:
        """The sums of each layer over all ranks: one all-reduce, in fp64, and one copy to the host if asked."""
        names = list(sums[0])
        shapes = [sums[0][n].shape for n in names]
        rows = torch.stack([torch.cat([layer[n].flatten() for n in names]) for layer in sums])
        rows = all_reduce_sum(rows, self.groups)
        rows = (rows.cpu() if to_host else rows).split(
            [shape.numel() for shape in shapes], dim=1
        )
        return [
            {n: part[i].view(shape) for n, part, shape in zip(names, rows, shapes, strict=True)}
            for i in range(len(sums))
        ]

    @torch.no_grad()
    def read(self, training: bool = True) -> dict[str, float | list[float]]:
        """Means over ranks and over all forwards since the last reading, which is then forgotten.

        Returns:
            experts_per_token_before_capacity / _kept (routed and local choices a token asked for / got), dropped_assignment_fraction (of
            assignments), tokens_with_drops_fraction (tokens that lost a choice), load_imbalance_max_over_mean (of routed
            experts, kept, mean over layers), local_fraction (of the kept choices, those on local paths; with such
            paths), moe_aux_loss (mean over layers), the gate's stats and what it makes of its sums, each also as a
            list `..._by_layer`, and experts_per_token_histogram (share of tokens that got 0, 1, 2, ... experts). Empty
            without mixture layers or forwards.
        """
        if not self.layers or not self.layers[0].counters[training]:
            return {}
        totals = self._reduce([m.counters[training] for m in self.layers], to_host=True)
        for m in self.layers:
            m.counters[training].clear()
        return _summarise(self.layers, totals)


def _layer_values(layer: MoELayer, sums: dict[str, Tensor]) -> dict[str, Tensor | float]:
    """Ratios of one layer's sums."""
    tokens, wanted, kept = sums["tokens"], sums["assigned_C"].sum(), sums["dispatched_C"].sum()
    load = sums["dispatched_C"][: layer.gate.num_experts]
    values = {
        "experts_per_token_before_capacity": wanted / tokens,
        "experts_per_token": kept / tokens,
        "dropped_assignment_fraction": (wanted - kept) / wanted.clamp_min(1),
        "tokens_with_drops_fraction": sums["lost_tokens"] / tokens,
        "load_imbalance_max_over_mean": load.max() / load.mean().clamp_min(1 / len(load)),
        "moe_aux_loss": sums["aux_loss"] / sums["forwards"],
    }
    if len(layer.gate.zero_computation_experts):
        values["local_fraction"] = 1 - load.sum() / kept.clamp_min(1)
    stats = {name: value / sums["forwards"] for name, value in _named(sums, "stat/").items()}
    return {**values, **stats, **layer.gate.summarise(_named(sums, "sum/"))}


def _named(sums: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What a gate put in: its `stats` or its `sums`, under its own names."""
    return {
        name.removeprefix(prefix): value
        for name, value in sums.items()
        if name.startswith(prefix)
    }


def _summarise(
    layers: list[MoELayer], totals: list[dict[str, Tensor]]
) -> dict[str, float | list[float]]:
    """Per-layer values, and their means over layers."""
    by_layer: dict[str, list[float]] = {}
    histogram = torch.zeros(())
    for layer, sums in zip(layers, totals, strict=True):
        for name, value in _layer_values(layer, sums).items():
            by_layer.setdefault(name, []).append(float(value))
        histogram = histogram + sums["kept_histogram"]
    means = {name: sum(v) / len(v) for name, v in by_layer.items()}
    return {
        **means,
        "experts_per_token_histogram": (histogram / histogram.sum()).tolist(),
        **{f"{name}_by_layer": v for name, v in by_layer.items()},
    }
