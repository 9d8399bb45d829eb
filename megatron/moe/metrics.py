"""MoE metrics for the log: counters of the layers, reduced over ranks.

They only observe: what a gate learns from a step is in `megatron.moe.gate_update`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from megatron.moe.count_metrics import (
    LayerMetrics,
    detail_metrics,
    experts_per_token_percentiles,
    load_metrics,
    received_rows,
    shares_by_expert,
    state_metrics,
)
from megatron.moe.layer import MoELayer
from megatron.moe.layer_sums import all_reduce_layer_sums, entries_with_prefix, find_moe_layers
from megatron.moe.losses import reduce_over_layers
from megatron.moe.step_loads import StepLoads
from megatron.parallel.groups import Groups


class MoEMetrics:
    """Collects the counters of a model's MoE layers.

    Call `read` once per log line. It takes one all-reduce. A model without the attribute
    `aux_loss_reduction`, such as a single layer, counts as one that sums over layers.

    Args:
        routing_metrics: also return what --routing-metrics describes. The layers then
            measure the details of every forward pass, unless `count_details` says
            otherwise.
    """

    def __init__(self, model: nn.Module, groups: Groups, routing_metrics: bool = True):
        self.layers = find_moe_layers(model)
        self.groups = groups
        self.aux_loss_reduction = getattr(model, "aux_loss_reduction", "sum")
        self.routing_metrics = routing_metrics
        self._step_loads = [StepLoads() for _ in self.layers]
        for training in (True, False):
            self.count_details(training, True)

    def count_details(self, training: bool, enabled: bool) -> None:
        """Set whether following forward passes measure details (`megatron.moe.routing_details`).

        Args:
            training: of the forward passes in training, or of those in evaluation.
            enabled: has no effect without routing metrics, which never measure them.
        """
        for layer in self.layers:
            layer.counts_details[training] = enabled and self.routing_metrics

    @torch.no_grad()
    def end_step(self) -> None:
        """Keep the loads of an optimizer step. Call it before the layers' sums are reset.

        A collective after every 256th step without a reading: all ranks must call it.
        """
        if not self.routing_metrics:
            return
        for loads, layer in zip(self._step_loads, self.layers, strict=True):
            loads.append(layer.step_sums)
        if any(loads.is_full for loads in self._step_loads):
            sums = [loads.sums() for loads in self._step_loads]
            totals = all_reduce_layer_sums(sums, self.groups, to_host=True)
            for loads, total in zip(self._step_loads, totals, strict=True):
                loads.add(total)

    @torch.no_grad()
    def read(self, training: bool = True) -> dict[str, Any]:
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
            - the gate's `metric_means`, and the metrics it makes of its `metric_sums`,
            - with routing metrics, those of `megatron.moe.count_metrics`, and
              max_violation_batch: the mean over optimizer steps of the step's
              max_violation (in training, of layers with at most 1,024 experts);

            each also as a list `..._by_layer`; and experts_per_token_histogram, the
            share of tokens with 0, 1, 2, ... experts after capacity, over all layers.
            Routing metrics add load_by_expert and gate_mass_by_expert: by layer, each
            routed expert's share of the assignments before capacity, and of the absolute
            weights; None for a layer with more than 1,024 experts.

            The names are the union over layers. A mean is taken over the layers that have
            the metric, and the list has None for the others.
        """
        counters = [dict(layer.counters[training]) for layer in self.layers]
        if not any(counters):
            return {}
        if self.routing_metrics:
            self._add_routing_sums(counters, training)
        totals = all_reduce_layer_sums(counters, self.groups, to_host=True)
        for layer in self.layers:
            layer.counters[training].clear()
        return self._summarize(totals, training)

    def _add_routing_sums(self, counters: list[dict[str, Tensor]], training: bool) -> None:
        """Add to each layer's counters what else the ranks sum."""
        for layer, loads, sums in zip(self.layers, self._step_loads, counters, strict=True):
            if not sums:  # the layer has not run
                continue
            if training:
                sums |= loads.sums()
            if self.groups.ep_size > 1:
                num_experts = layer.gate.num_experts
                rows_P = received_rows(sums["dispatched_C"], num_experts, self.groups)
                sums["received_rows_P"] = rows_P

    def _summarize(self, totals: list[dict[str, Tensor]], training: bool) -> dict[str, Any]:
        """Return values per layer and their means over the layers that have them.

        The auxiliary losses are reduced as in the model.
        """
        by_layer: dict[str, list[float | None]] = {}
        loss_names: set[str] = set()
        histograms = []
        for i, (layer, sums) in enumerate(zip(self.layers, totals, strict=True)):
            if not sums:  # the layer has not run
                continue
            loss_names |= {f"moe_{name}" for name in entries_with_prefix(sums, "loss/")}
            values = _layer_values(layer, sums)
            if self.routing_metrics:
                values |= _routing_values(layer, sums)
            if self.routing_metrics and training:
                values |= _batch_violation(self._step_loads[i], sums)
            for name, value in values.items():
                by_layer.setdefault(name, [None] * len(self.layers))[i] = float(value)
            histograms.append(sums["experts_per_token_histogram"])
        means = {name: _mean(values) for name, values in by_layer.items()}
        for name in loss_names:
            losses = [value for value in by_layer[name] if value is not None]
            loss_L = torch.tensor(losses, dtype=torch.float64)
            means[name] = float(reduce_over_layers(loss_L, self.aux_loss_reduction))
        # The bins of a layer end with its gate's largest number of experts per token.
        histogram = pad_sequence(histograms, batch_first=True).sum(0)
        return {
            **means,
            "experts_per_token_histogram": (histogram / histogram.sum().clamp_min(1)).tolist(),
            **{f"{name}_by_layer": values for name, values in by_layer.items()},
            **self._shares_by_expert(totals),
        }

    def _shares_by_expert(self, totals: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Return the experts' shares by layer; a metric that no layer has is left out."""
        if not self.routing_metrics:
            return {}
        shares = {}
        names = {"load_by_expert": "assigned_C", "gate_mass_by_expert": "gate_mass_C"}
        for name, counter in names.items():
            by_layer = [
                shares_by_expert(sums.get(counter), layer.gate.num_experts)
                for layer, sums in zip(self.layers, totals, strict=True)
            ]
            if any(by_layer):
                shares[name] = by_layer
        return shares


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


def _routing_values(layer: MoELayer, sums: dict[str, Tensor]) -> LayerMetrics:
    """Return the metrics of one layer that --routing-metrics adds."""
    values = {
        **load_metrics(sums["assigned_C"], layer.gate.num_experts),
        **experts_per_token_percentiles(sums["experts_per_token_histogram"]),
        **detail_metrics(layer.gate, sums),
        **state_metrics(layer.gate),
    }
    if "received_rows_P" in sums:
        rows_P = sums["received_rows_P"]
        mean = rows_P.mean().clamp_min(1 / len(rows_P))
        values["rank_rows_max_over_mean"] = float(rows_P.max() / mean)
    return values


def _batch_violation(loads: StepLoads, totals: dict[str, Tensor]) -> LayerMetrics:
    """Return the mean over optimizer steps of their MaxVio, if any step ended."""
    loads.add(totals)
    mean = loads.pop_mean()
    if mean is None:
        return {}
    return {"max_violation_batch": mean}
