"""What the metrics of one cell of a study show: losses, step times, balance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.analysis.compare.measured import mean_of_last_part
from megatron.analysis.compare.results import CellResult
from megatron.analysis.curves import MetricCurve, RunCurves

ROUTING_METRICS = (
    "max_violation",
    "load_cv",
    "dead_expert_fraction",
    "zero_computation_fraction",
    "dropped_assignment_fraction",
)
"""metrics of training rows that are averaged; a run may lack some of them"""


@dataclass(frozen=True)
class CellMeasures:
    """Measures of one cell, from its metrics.jsonl."""

    cell: CellResult
    held_out: MetricCurve
    """held-out loss of the evaluations; without rows if the cell has none"""
    final_loss: float
    """held-out loss at the end of the training; NaN if `problem` is not empty"""
    step_times_ms: tuple[float, ...]
    """time of an optimizer step in each logging interval but the first, in which kernels and
    buffers are made"""
    routing: dict[str, float]
    """mean of each of ROUTING_METRICS over the last part of the training; NaN: not logged"""
    problem: str
    """why the cell is not part of the comparison, in one line; empty if it is"""

    @staticmethod
    def of(cell: CellResult, held_out: str) -> CellMeasures:
        """Read the metrics of a cell, in whatever state it is.

        Args:
            held_out: kind of the rows with the held-out loss.
        """
        try:
            curves = RunCurves.read(cell.metrics_path)
        except OSError:
            # A cell that has not started has none.
            curves = RunCurves.from_rows([])
        curve = curves.curve(held_out)
        problem = _problem(cell, curve)
        iterations = max((row.get("iteration", 0) for row in curves.rows), default=0)
        routing = {}
        for name in ROUTING_METRICS:
            routing[name] = mean_of_last_part(curves.rows, name, iterations)
        return CellMeasures(
            cell=cell,
            held_out=curve,
            final_loss=math.nan if problem else float(curve.value_R[-1]),
            step_times_ms=tuple(curves.curve("train", "step_time_ms").value_R[1:].tolist()),
            routing=routing,
            problem=problem,
        )


def _problem(cell: CellResult, held_out: MetricCurve) -> str:
    if not cell.is_finished:
        return ": ".join(filter(None, (cell.state, cell.error)))
    if not len(held_out):
        return f"there is no row of kind {held_out.kind} with a loss in {cell.metrics_path}"
    last = float(held_out.value_R[-1])
    if not math.isfinite(last):
        return f"diverged: the held-out loss at the end is {last}"
    return ""


@dataclass(frozen=True)
class Quartiles:
    """Median and spread of measured times; NaN without any."""

    median: float
    low: float
    """25 % quantile"""
    high: float
    """75 % quantile"""

    @staticmethod
    def of(values: Sequence[float]) -> Quartiles:
        """Compute the quartiles, interpolated linearly."""
        if not values:
            return Quartiles(math.nan, math.nan, math.nan)
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return Quartiles(median, low, high)
