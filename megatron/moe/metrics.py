"""MoE metrics for the log: counters of the layers, reduced over ranks.

They only observe: what a gate learns from a step is in `megatron.moe.gate_update`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from megatron.moe.layer import MoELayer
from megatron.moe.layer_sums import all_reduce_layer_sums, entries_with_prefix, find_moe_layers
from megatron.moe.losses import reduce_over_layers
from megatron.parallel.groups import Groups


class MoEMetrics:
    """Collects the counters of a model's MoE layers.

    Call `read` once per log line. It takes one all-reduce. A model without the attribute
    `aux_loss_reduction`, such as a single layer, counts as one that sums over layers.
    """

    def __init__(self, model: nn.Module, groups: Groups):
        self.layers = find_moe_layers(model)
        self.groups = groups
        self.aux_loss_reduction = getattr(model, "aux_loss_reduction", "sum")

    @torch.no_grad()
    def read(self, training: bool = True) -> dict[str, float | list[float | None]]:
        """Return means over ranks and forward passes with tokens since the last call, then reset.

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
            - moe_aux_loss, which is not the mean but what the model adds to the loss:
              the layers' sum, unless it averages them; likewise the gate's `losses`, each
              as moe_<name>,
            - the gate's `metric_means`, and the metrics it makes of its `metric_sums`;

            each also as a list `..._by_layer`; and experts_per_token_histogram, the
            share of tokens with 0, 1, 2, ... experts after capacity, over all layers.

            The names are the union over layers. A mean is taken over the layers that have
            the metric, and the list has None for the others.
        """
        counters = [layer.counters[training] for layer in self.layers]
        if not any(counters):
            return {}
        totals = all_reduce_layer_sums(counters, self.groups, to_host=True)
        for layer in self.layers:
            layer.counters[training].clear()
        return _summarize(self.layers, totals, self.aux_loss_reduction)


def _summarize(
    layers: list[MoELayer], totals: list[dict[str, Tensor]], aux_loss_reduction: str
) -> dict[str, float | list[float | None]]:
    """Return values per layer and their means over the layers that have them.

    The auxiliary losses are reduced as in the model.
    """
    by_layer: dict[str, list[float | None]] = {}
    loss_names: set[str] = set()
    histograms = []
    for i, (layer, sums) in enumerate(zip(layers, totals, strict=True)):
        if not sums:  # the layer has not run
            continue
        loss_names |= {f"moe_{name}" for name in entries_with_prefix(sums, "loss/")}
        for name, value in _layer_values(layer, sums).items():
            by_layer.setdefault(name, [None] * len(layers))[i] = float(value)
        histograms.append(sums["experts_per_token_histogram"])
    means = {name: _mean(values) for name, values in by_layer.items()}
    for name in loss_names:
        losses = [value for value in by_layer[name] if value is not None]
        loss_L = torch.tensor(losses, dtype=torch.float64)
        means[name] = float(reduce_over_layers(loss_L, aux_loss_reduction))
    # The bins of a layer end with its gate's largest number of experts per token.
    histogram = pad_sequence(histograms, batch_first=True).sum(0)
    return {
        **means,
        "experts_per_token_histogram": (histogram / histogram.sum().clamp_min(1)).tolist(),
        **{f"{name}_by_layer": values for name, values in by_layer.items()},
    }


def _mean(values: list[float | None]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present)


def _layer_values(layer: MoELayer, sums: dict[str, Tensor]) -> dict[str, Tensor | float]:
    """Return the metrics of one layer, which are ratios of its sums."""
    tokens = sums["tokens"].clamp_min(1)
    assigned = sums["assigned_C"].sum()
    dispatched = sums["dispatched_C"].sum()
    load_E = sums["dispatched_C"][: layer.gate.num_experts]
    values = {
        "experts_per_token_before_capacity": assigned / tokens,
        "experts_per_token": dispatched / tokens,
        "dropped_assignment_fraction": (assigned - dispatched) / assigned.clamp_min(1),
        "tokens_with_drops_fraction": sums["tokens_with_drops"] / tokens,
        "load_imbalance_max_over_mean": load_E.max() / load_E.mean().clamp_min(1 / len(load_E)),
    }
    for name, value in entries_with_prefix(sums, "loss/").items():
        values[f"moe_{name}"] = value / sums["forwards"].clamp_min(1)
    if len(layer.gate.zero_computation_experts):
        values["zero_computation_fraction"] = 1 - load_E.sum() / dispatched.clamp_min(1)
    for name, value in entries_with_prefix(sums, "mean/").items():
        values[name] = value / tokens
    values.update(layer.gate.summarise(entries_with_prefix(sums, "sum/")))
    return values
