"""Final figures of groups: held-out losses with confidence intervals, speed, length."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron.analysis.compare.seed_statistics import SeedStatistics
from megatron.analysis.report.groups import RunGroup
from megatron.analysis.report.runs import TRAIN, ReportRun
from megatron.analysis.report.series import rows_of_kind


def final_loss(group: RunGroup, kind: str) -> SeedStatistics:
    """Return a group's loss in the last evaluation of a kind, over the seeds that have a number."""
    return SeedStatistics.of([last_loss(run, kind) for run in group.runs])


def last_loss(run: ReportRun, kind: str) -> float:
    """Return a run's loss in its last row of a kind; NaN if it is NaN, or without rows."""
    rows = rows_of_kind(run, kind)
    return rows.last("loss") if rows else float("nan")


def held_out_kinds(groups: Iterable[RunGroup]) -> list[str]:
    """List the kinds of evaluations of all runs, in the order of their first appearance."""
    kinds: dict[str, None] = {}
    for group in groups:
        for run in group.runs:
            kinds.update(dict.fromkeys(run.held_out))
    return list(kinds)


def main_held_out_kind(kinds: list[str]) -> str:
    """Return the kind that the summary uses: validation, else the first there is, else ''."""
    if "eval" in kinds:
        return "eval"
    return kinds[0] if kinds else ""


def kind_title(kind: str) -> str:
    """Return the name of a kind in words."""
    names = {"train": "training", "eval": "validation", "test": "test"}
    return names.get(kind, kind.removeprefix("eval/"))


def metric_median(run: ReportRun, metric: str) -> float:
    """Return the median of a training metric over a run's rows; NaN without the metric."""
    values_R = run.train.values.get(metric)
    if values_R is None or not np.isfinite(values_R).any():
        return float("nan")
    return float(np.nanmedian(values_R))


def metric_quantiles(
    group: RunGroup, metric: str, shares: tuple[float, ...]
) -> list[float] | None:
    """Return quantiles of a training metric over all rows of a group; None: no run has it."""
    columns = [run.train.values[metric] for run in group.runs if metric in run.train.values]
    if not columns:
        return None
    values = np.concatenate(columns)
    values = values[np.isfinite(values)]
    return [float(value) for value in np.quantile(values, shares)] if len(values) else None


def constant_value(groups: Iterable[RunGroup], metric: str, kind: str = TRAIN) -> float | None:
    """Return the value that a metric has in all rows of a kind of all runs; None: it varies."""
    bounds = []
    for group in groups:
        for run in group.runs:
            rows = rows_of_kind(run, kind)
            values_R = rows.values.get(metric, np.empty(0)) if rows else np.empty(0)
            if np.isfinite(values_R).any():
                bounds += [float(np.nanmin(values_R)), float(np.nanmax(values_R))]
    return bounds[0] if bounds and min(bounds) == max(bounds) else None
