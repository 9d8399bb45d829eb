"""Measurements of routing on a fixed probe batch, between training steps.

The probe runs the model in evaluation mode on the same tokens each time, so that a change of the
assignments is a change of the model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron.analysis.routing_changes import (
    TokenChoices,
    churn_sums,
    coactivation_counts,
    coactivation_rates,
    coactivation_summary,
    saturation_sums,
)
from megatron.analysis.weight_similarity import (
    all_gather_experts,
    pairwise_cosine,
    relative_distance,
    router_rows,
    router_weights,
    sampled_expert_weights,
)
from megatron.checkpoint.metadata import TrainingProgress
from megatron.engine.engine import Engine
from megatron.moe.layer import MoELayer
from megatron.moe.layer_sums import all_reduce_layer_sums, find_moe_layers
from megatron.moe.routing_record import record_routing
from megatron.parallel import rng
from megatron.parallel.groups import Groups
from megatron.training.metric_writers import MetricsRow, MetricsWriters
from megatron.training.task import Task

MAX_COACTIVATION_EXPERTS = 256
"""Experts of a layer up to which co-activation is counted: its matrix has their square"""
MAX_LOGGED_COACTIVATION_EXPERTS = 64
"""Experts of a layer up to which a row contains the matrix"""


@dataclass(frozen=True)
class RoutingSnapshot:
    """What later probes are compared with."""

    iteration: int
    choices: list[TokenChoices]
    """choices of this rank's probe tokens, for each MoE layer"""
    routers: list[Tensor | None]
    """weights of each layer's router on rank 0; empty on other ranks"""


class RoutingProbe:
    """Writes a row of kind `probe` about the routing of fixed tokens.

    The training is not changed: random streams, counters and the state of gates are as before.

    Args:
        interval: optimizer steps between probes; the training loop reads it.
        engine: runs the model.
        task: computes the loss of a micro-batch.
        batches: this rank's micro-batches of the probe, the same in the entire run.
        groups: the data-parallel ranks.
        metric_writers: receive the rows.
    """

    def __init__(
        self,
        interval: int,
        engine: Engine,
        task: Task,
        batches: list[Any],
        groups: Groups,
        metric_writers: MetricsWriters,
    ):
        self.interval = interval
        self.engine = engine
        self.task = task
        self.batches = batches
        self.groups = groups
        self.metric_writers = metric_writers
        self.layers = find_moe_layers(engine.model)
        self._previous: RoutingSnapshot | None = None
        """the last probe"""
        self._checkpoint: RoutingSnapshot | None = None
        """the last checkpoint, or the weights that the run started with"""

    def start(self, progress: TrainingProgress, fraction_done: float) -> None:
        """Take the weights that this run starts with as the reference. A collective.

        They are those of the last checkpoint when the run resumes. A run from the beginning
        writes its first row.
        """
        if progress.iteration == 0:
            self.evaluate(progress, fraction_done)
        else:
            self._previous = self._snapshot(progress, fraction_done)
        self._checkpoint = self._previous

    def checkpoint_saved(self, progress: TrainingProgress, fraction_done: float) -> None:
        """Take the present weights as the last checkpoint. A collective."""
        if self._previous is not None and self._previous.iteration == progress.iteration:
            self._checkpoint = self._previous
        else:
            self._checkpoint = self._snapshot(progress, fraction_done)

    def evaluate(self, progress: TrainingProgress, fraction_done: float) -> None:
        """Measure, and write a row. A collective: all ranks must call it.

        Args:
            progress: how far the run is.
            fraction_done: share of the training that is done, for gates that change over time.
        """
        start = time.monotonic()
        snapshot = self._snapshot(progress, fraction_done)
        row = {
            "kind": "probe",
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
        }
        if self._previous is not None:
            row["churn_steps"] = progress.iteration - self._previous.iteration
            row["saturation_steps"] = progress.iteration - self._checkpoint.iteration
        row |= self._metrics(snapshot)
        self._previous = snapshot
        row["probe_time_ms"] = 1000 * (time.monotonic() - start)
        self.metric_writers.write(row)

    def _snapshot(self, progress: TrainingProgress, fraction_done: float) -> RoutingSnapshot:
        with (
            torch.no_grad(),
            rng.preserved(),
            self.engine.evaluating() as model,
            record_routing(self.engine.model) as records,
        ):
            for batch in self.batches:
                batch = batch.to(self.groups.device)
                self.task.loss_sums(model, batch, fraction_done)
        choices = [TokenChoices.of(record) for record in records]
        routers = []
        for layer in self.layers:
            with self.engine.full_parameters(layer.gate.parameters()):
                if self.groups.is_rank0:
                    routers.append(router_weights(layer.gate))
        return RoutingSnapshot(progress.iteration, choices, routers)

    def _metrics(self, snapshot: RoutingSnapshot) -> MetricsRow:
        """Return the means over layers, and the values of each layer."""
        by_layer: dict[str, list[Any]] = {}
        sums = [self._layer_sums(i, snapshot) for i in range(len(self.layers))]
        totals = all_reduce_layer_sums(sums, self.groups, to_host=True)
        for i, layer in enumerate(self.layers):
            values = _routing_metrics(totals[i])
            values |= self._weight_metrics(layer)
            values |= self._drift(i, snapshot)
            for name, value in values.items():
                by_layer.setdefault(name, [None] * len(self.layers))[i] = value
        row: MetricsRow = {}
        matrices = by_layer.pop("coactivation", None)
        for name, values in by_layer.items():
            present = [value for value in values if value is not None]
            row[name] = sum(present) / len(present)
            row[f"{name}_by_layer"] = values
        if matrices is not None:
            row["coactivation"] = matrices
        return row

    def _layer_sums(self, i: int, snapshot: RoutingSnapshot) -> dict[str, Tensor]:
        """Return what is added over ranks: fp64, on the device of the process group."""
        choices = snapshot.choices[i]
        sums = {}
        if self._previous is not None:
            sums["churn"] = churn_sums(self._previous.choices[i], choices)
            sums["saturation"] = saturation_sums(self._checkpoint.choices[i], choices)
        num_experts = self.layers[i].gate.num_experts
        if num_experts <= MAX_COACTIVATION_EXPERTS:
            sums["coactivation"] = coactivation_counts(choices, num_experts)
        # There is always something to reduce, also in the first probe of PEER.
        sums["tokens"] = torch.tensor(float(choices.num_tokens), dtype=torch.float64)
        return {name: value.to(self.groups.device) for name, value in sums.items()}

    def _weight_metrics(self, layer: MoELayer) -> dict[str, float]:
        """Return the similarity of experts and of the router's rows. A collective."""
        values = {}
        if layer.gate.expert_kind != "peer":  # a million experts have too many pairs
            with self.engine.full_parameters(layer.experts.parameters()):
                weight_EN = sampled_expert_weights(layer)
            weight_EN = all_gather_experts(weight_EN, layer.groups.ep_group)
            values |= _mean_and_max("expert_similarity", pairwise_cosine(weight_EN))
        with self.engine.full_parameters(layer.gate.parameters()):
            rows_ED = router_rows(layer.gate)
            if rows_ED is not None:
                values |= _mean_and_max("router_similarity", pairwise_cosine(rows_ED))
        return values

    def _drift(self, i: int, snapshot: RoutingSnapshot) -> dict[str, float]:
        """Return how far the router moved since the previous probe, on rank 0."""
        if self._previous is None or not snapshot.routers:
            return {}
        before = self._previous.routers[i]
        if before is None:
            return {}
        return {"router_drift": relative_distance(before, snapshot.routers[i])}


def _routing_metrics(sums: dict[str, Tensor]) -> dict[str, Any]:
    """Return the metrics of a layer from sums over ranks."""
    values: dict[str, Any] = {}
    for name, key in (("routing_churn", "churn"), ("router_saturation", "saturation")):
        if key in sums and sums[key][1] > 0:
            values[name] = float(sums[key][0] / sums[key][1])
    count_EE = sums.get("coactivation")
    if count_EE is None:
        return values
    values |= _mean_and_max("coactivation", coactivation_summary(count_EE))
    if len(count_EE) <= MAX_LOGGED_COACTIVATION_EXPERTS:
        values["coactivation"] = coactivation_rates(count_EE).tolist()
    return values


def _mean_and_max(name: str, pair: tuple[float, float] | None) -> dict[str, float]:
    if pair is None:
        return {}
    return {f"{name}_mean": pair[0], f"{name}_max": pair[1]}


def probe_batches(task: Task, num_batches: int) -> list[Any]:
    """Return this rank's first micro-batches of the validation set, or none without one.

    Random streams are as before.

    Args:
        num_batches: fewer are returned where an evaluation has fewer.
    """
    splits = [split for split in task.eval_splits() if split.split("/")[0] == "valid"]
    if not splits:
        return []
    with rng.preserved():
        return list(islice(task.eval_batches(splits[0]), num_batches))
