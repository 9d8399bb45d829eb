"""What a finished cell measured: held-out loss, experts per token, active parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.analysis.compare.cell_size import CellSize
from megatron.analysis.curves import is_number
from megatron.training.metrics_file import read_metrics, without_repeated_steps

LAST_PART = 0.2
"""Share of the training, at its end, over which the experts per token are averaged"""


@dataclass(frozen=True)
class Measured:
    """Measurements of a finished run."""

    held_out_loss: float
    """of the last evaluation; nats"""
    held_out: str
    """kind of the rows that it is from"""
    experts_per_token: float | None
    """computing experts per token, mean over MoE layers; None: a dense model, or not logged"""
    active_parameters: float | None
    """parameters that a token used, with the measured experts per token of each layer; None: the
    gates decide how many there are, and the run has not logged it"""
    flops_per_token: float | None = None
    """model FLOPs of a training step per token, from the last training row; None: not logged"""


def completed_iterations(metrics_path: Path) -> int:
    """Return the last iteration in a run's metrics; 0: it has none."""
    return _last_iteration(_run_rows(metrics_path))


def measure(metrics_path: Path, size: CellSize, iterations: int, held_out: str) -> Measured:
    """Measure a run that has completed its schedule.

    Args:
        iterations: optimizer steps of the complete training.
        held_out: kind of the rows with the held-out loss.

    Raises:
        ValueError: the run has not evaluated on the held-out set at its end.
    """
    rows = _run_rows(metrics_path)
    loss = _last_loss(rows, metrics_path, held_out, iterations)
    by_layer = experts_by_layer(rows, len(size.routed), (1 - LAST_PART) * iterations)
    flops = [row["flops_per_token"] for row in rows if "flops_per_token" in row]
    mean = None
    active = size.planned_active(None)
    if by_layer:
        mean = math.fsum(by_layer) / len(by_layer)
        active = size.active(by_layer)
    return Measured(
        held_out_loss=loss,
        held_out=held_out,
        experts_per_token=mean,
        active_parameters=active,
        flops_per_token=next(reversed(flops), None),
    )


def held_out_loss(metrics_path: Path, held_out: str) -> float:
    """Return the loss of a finished run's last evaluation on a held-out set.

    Args:
        held_out: kind of its rows.

    Raises:
        ValueError: the run has not evaluated on this set at its end, or has no metrics.
    """
    rows = _run_rows(metrics_path)
    return _last_loss(rows, metrics_path, held_out, _last_iteration(rows))


def _run_rows(metrics_path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run without repeated steps; none if it has no metrics yet."""
    if not metrics_path.exists():
        return []
    return without_repeated_steps(read_metrics(metrics_path))


def _last_iteration(rows: Sequence[dict[str, Any]]) -> int:
    return max((row.get("iteration", 0) for row in rows), default=0)


def _last_loss(
    rows: Sequence[dict[str, Any]], metrics_path: Path, held_out: str, iterations: int
) -> float:
    losses = [
        row["loss"]
        for row in rows
        if row.get("kind") == held_out and row.get("iteration") == iterations and "loss" in row
    ]
    if not losses:
        raise ValueError(
            f"{metrics_path} has no loss of kind {held_out} at iteration {iterations}: the run "
            "has no such held-out set. Give it one (--split, --valid-data-path, --test-data-path, "
            "--valid-sets), or change eval.set of the study"
        )
    return losses[-1]


def experts_by_layer(
    rows: Sequence[dict[str, Any]], num_layers: int, after: float
) -> list[float]:
    """Return the computing experts per token of each MoE layer, after capacity.

    It is the mean over the steps of the training rows after an iteration, or of the last row if
    there is none. Zero-computation experts are not counted: they compute nothing.

    Args:
        rows: rows of metrics.jsonl without repeated steps.
        num_layers: MoE layers of the model.
        after: iteration after which rows count.
    """
    late = _late_rows(rows, "experts_per_token", after)
    if not late or not num_layers:
        return []
    means = []
    for layer in range(num_layers):
        means.append(_mean_over_steps([(_computing_experts(row, layer), n) for row, n in late]))
    return means


def mean_of_last_part(rows: Sequence[dict[str, Any]], metric: str, iterations: int) -> float:
    """Return a metric of the training rows, averaged over the steps of the last part.

    Args:
        rows: rows of metrics.jsonl without repeated steps.
        iterations: optimizer steps of the training.

    Returns:
        NaN if no row has the metric as a number.
    """
    late = _late_rows(rows, metric, (1 - LAST_PART) * iterations)
    return _mean_over_steps([(row[metric], steps) for row, steps in late])


def _late_rows(
    rows: Sequence[dict[str, Any]], metric: str, after: float
) -> list[tuple[dict[str, Any], int]]:
    """Return the training rows after an iteration, each with the number of its steps.

    Without any it is the last one. Rows that do not have the metric as a number do not count.
    """
    found = []
    previous = 0
    for row in rows:
        if row.get("kind") == "train" and is_number(row.get(metric)):
            found.append((row, max(1, row["iteration"] - previous)))
            previous = row["iteration"]
    return [entry for entry in found if entry[0]["iteration"] > after] or found[-1:]


def _mean_over_steps(values: Sequence[tuple[float, int]]) -> float:
    """Average values that hold for a number of steps each; NaN without any."""
    if not values:
        return math.nan
    total = sum(steps for _, steps in values)
    return math.fsum(value * steps for value, steps in values) / total


def _computing_experts(row: dict[str, Any], layer: int) -> float:
    experts = _of_layer(row, "experts_per_token", layer)
    return experts * (1 - _of_layer(row, "zero_computation_fraction", layer))


def _of_layer(row: dict[str, Any], name: str, layer: int) -> float:
    """Return a metric of a layer; 0: the layer does not have it."""
    values = row.get(f"{name}_by_layer")
    if values is None or layer >= len(values):
        return row.get(name, 0.0)
    return values[layer] or 0.0
