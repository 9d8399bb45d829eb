"""Curves of groups: mean and spread over seeds, in few points that keep the extremes.

Shape suffixes: S runs (seeds) of a group, I iterations at which a run has a row, P points drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron.analysis.report.groups import RunGroup
from megatron.analysis.report.history import bucket_edges
from megatron.analysis.report.runs import PROBE, TRAIN, KindRows, ReportRun

POSITIONS = ("iteration", "tokens", "flops", "seconds")
"""What curves can be drawn against"""

MOST_POINTS = 400
"""Points of a loss curve when there are few: more than the pixels that a phone gives it"""

LOSS_POINTS = 12_000
"""Points of all curves of losses; one takes up to 80 bytes of the page"""

MOST_METRIC_POINTS = 200
METRIC_POINTS = 30_000
"""Points of all groups and all other metrics; one takes up to 40 bytes"""

FEWEST_POINTS = 10


@dataclass(frozen=True)
class Series:
    """One metric of a group over its training; arrays are [P], NaN where there is no value."""

    positions: dict[str, np.ndarray]
    """by name of POSITIONS; a position that a run of the group lacks is missing"""
    mean: np.ndarray
    """mean over the seeds, and over the rows of the point"""
    low: np.ndarray
    """mean minus one standard deviation over seeds, a mean over rows; NaN with one seed"""
    high: np.ndarray
    least: np.ndarray
    """smallest value of a row of any seed among the rows of the point"""
    most: np.ndarray
    num_seeds: np.ndarray
    """seeds that have the point"""
    rows_per_point: int
    """rows of a run that a point stands for, at most"""

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def has_spread(self) -> bool:
        """Whether a point has several seeds."""
        return bool(np.isfinite(self.low).any())


def points_of_losses(num_curves: int) -> int:
    """Return how many points a loss curve may have, so that all of them together stay small.

    Args:
        num_curves: groups x kinds of rows.
    """
    return int(np.clip(LOSS_POINTS // max(num_curves, 1), FEWEST_POINTS, MOST_POINTS))


def points_of_metrics(num_curves: int) -> int:
    """Return how many points a curve of another metric may have.

    Args:
        num_curves: groups x metrics.
    """
    return int(np.clip(METRIC_POINTS // max(num_curves, 1), FEWEST_POINTS, MOST_METRIC_POINTS))


def rows_of_kind(run: ReportRun, kind: str) -> KindRows | None:
    """Return a run's rows of a kind; None: it has none."""
    if kind == TRAIN:
        return run.train if len(run.train) else None
    if kind == PROBE:
        return run.probe
    return run.held_out.get(kind)


def is_recorded(groups: Iterable[RunGroup], kinds: Iterable[str], metric: str) -> bool:
    """Return whether a run has a metric in rows of one of these kinds, be it NaN."""
    found = [
        rows_of_kind(run, kind) for kind in kinds for group in groups for run in group.runs
    ]
    return any(metric in rows.values for rows in found if rows is not None)


def group_series(
    group: RunGroup, kind: str, metric: str, most_points: int = MOST_POINTS
) -> Series | None:
    """Return a metric of a group; None: no run has it.

    Its positions are those of all rows of the kind, the same for all metrics.

    Seeds are joined by iteration: a point is the mean of the seeds that have a row there. Its
    position in tokens, FLOPs and seconds follows from `_mean_positions`. Of more rows than
    points, each point stands for equally many consecutive rows: it keeps their mean, minimum and
    maximum.
    """
    tables = [rows_of_kind(run, kind) for run in group.runs]
    tables = [table for table in tables if table is not None]
    if not any(metric in table.values for table in tables):
        return None
    iteration_I = np.unique(np.concatenate([table.iteration_R for table in tables]))
    place_SR = [np.searchsorted(iteration_I, table.iteration_R) for table in tables]

    def joined(columns: Iterable[np.ndarray]) -> np.ndarray:
        value_SI = np.full((len(tables), len(iteration_I)), np.nan)
        for s, column_R in enumerate(columns):
            value_SI[s, place_SR[s]] = column_R
        return value_SI

    value_SI = joined(table.values.get(metric, np.full(len(table), np.nan)) for table in tables)
    positions = {"iteration": iteration_I}
    for name in POSITIONS[1:]:
        columns = [getattr(table, f"{name}_R") for table in tables]
        if all(column is not None for column in columns):
            positions[name] = _mean_positions(iteration_I, tables, columns)
    return _in_points(value_SI, positions, most_points)


def _mean_positions(
    iteration_I: np.ndarray, tables: list[KindRows], columns: list[np.ndarray]
) -> np.ndarray:
    """Return the mean position of seeds at iterations [I], which never decreases.

    It grows by the mean of what the seeds need from one iteration to the next. A mean of their
    positions would fall where a slow seed ends, or has no row.

    Args:
        columns: position of each seed at its rows, [R]; between them it is interpolated.
    """
    step_SI = np.full((len(tables), len(iteration_I)), np.nan)
    for s, (table, position_R) in enumerate(zip(tables, columns, strict=True)):
        known_R = np.isfinite(position_R)
        if known_R.any():
            ends = np.append(0.0, table.iteration_R[known_R])
            at_I = np.interp(iteration_I, ends, np.append(0.0, position_R[known_R]))
            at_I[iteration_I > ends[-1]] = np.nan
            step_SI[s] = np.diff(at_I, prepend=0.0)
    return np.cumsum(mean_of_numbers(step_SI))


def _in_points(
    value_SI: np.ndarray, positions: dict[str, np.ndarray], most_points: int
) -> Series:
    edges = bucket_edges(value_SI.shape[1], most_points)
    starts = edges[:-1]
    mean = _means(mean_of_numbers(value_SI), starts)
    spread = _means(_standard_deviation(value_SI), starts)
    num_seeds_I = np.isfinite(value_SI).sum(axis=0)
    return Series(
        positions={name: _means(value_I, starts) for name, value_I in positions.items()},
        mean=mean,
        low=mean - spread,
        high=mean + spread,
        # fmin and fmax ignore NaN where there is a number.
        least=np.fmin.reduceat(np.fmin.reduce(value_SI), starts),
        most=np.fmax.reduceat(np.fmax.reduce(value_SI), starts),
        num_seeds=np.maximum.reduceat(num_seeds_I, starts),
        rows_per_point=int(np.diff(edges).max()),
    )


def mean_of_numbers(value_SI: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis of the values that are numbers; NaN if none is."""
    return _divide(np.nansum(value_SI, axis=0), np.isfinite(value_SI).sum(axis=0))


def _standard_deviation(value_SI: np.ndarray) -> np.ndarray:
    """Return the standard deviation over seeds (n - 1); NaN where fewer than two have a value."""
    deviation_SI = value_SI - mean_of_numbers(value_SI)
    count_I = np.isfinite(value_SI).sum(axis=0)
    return np.sqrt(_divide(np.nansum(deviation_SI**2, axis=0), np.maximum(count_I - 1, 0)))


def _means(value_I: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the means of the numbers in consecutive parts of an array."""
    sum_P = np.add.reduceat(np.nan_to_num(value_I), starts)
    return _divide(sum_P, np.add.reduceat(np.isfinite(value_I).astype(np.int64), starts))


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return total / count; NaN where the count is 0."""
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
