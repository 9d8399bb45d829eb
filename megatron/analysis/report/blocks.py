"""Data sets of a report's charts, as blocks (see page.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.analysis.report.finals import final_loss, last_loss
from megatron.analysis.report.groups import RunGroup
from megatron.analysis.report.page import DataBlock, rounded
from megatron.analysis.report.series import Series, group_series

EXTREME_DIGITS = 4
"""Significant digits of minima and maxima"""

_TIME_UNITS = (
    (86400.0 * 3, "days", 86400.0),
    (7200.0, "hours", 3600.0),
    (300.0, "minutes", 60.0),
)


@dataclass(frozen=True)
class TimeUnit:
    """Unit of the axis of time."""

    name: str
    seconds: float

    @staticmethod
    def of(longest_seconds: float) -> TimeUnit:
        """Return the unit in which a time is a number that is easy to read."""
        for least, name, seconds in _TIME_UNITS:
            if longest_seconds >= least:
                return TimeUnit(name, seconds)
        return TimeUnit("seconds", 1.0)


@dataclass(frozen=True)
class CurveData:
    """Blocks of one metric of all groups."""

    blocks: list[DataBlock]
    has_spread: bool
    has_extremes: bool
    rows_per_point: int
    most_points: int
    """points of the longest curve"""
    shared: dict[str, dict[str, list[Any]]]
    """positions of the points by the name that blocks have for them"""


def curve_data(
    groups: list[RunGroup],
    kinds: Iterable[str],
    metric: str,
    unit: TimeUnit,
    most_points: int,
) -> CurveData | None:
    """Return the curves of a metric, one block per group and kind of rows; None: no run has it."""
    found: list[tuple[int, str, Series]] = []
    for kind in kinds:
        for place, group in enumerate(groups):
            series = group_series(group, kind, metric, most_points)
            if series is not None and np.isfinite(series.mean).any():
                found.append((place, kind, series))
    if not found:
        return None
    has_spread = any(series.has_spread for _, _, series in found)
    rows_per_point = max(series.rows_per_point for _, _, series in found)
    has_extremes = has_spread or rows_per_point > 1
    blocks = []
    shared = {}
    names: dict[str, str] = {}
    for place, kind, series in found:
        columns: dict[str, list[Any]] = {"mean": rounded(series.mean)}
        if has_spread:
            columns["low"] = rounded(series.low)
            columns["high"] = rounded(series.high)
            columns["seeds"] = [int(count) for count in series.num_seeds]
        if has_extremes:
            columns["least"] = rounded(series.least, EXTREME_DIGITS)
            columns["most"] = rounded(series.most, EXTREME_DIGITS)
        # Metrics of one kind have the same rows, so the same points; held-out sets often do.
        positions = _position_columns(series, unit)
        name = names.setdefault(json.dumps(positions), f"{place} {kind} {most_points}")
        shared[name] = positions
        constants = {"group": groups[place].label, "kind": kind}
        blocks.append({"constants": constants, "columns": columns, "shared": name})
    longest = max(len(series) for _, _, series in found)
    return CurveData(blocks, has_spread, has_extremes, rows_per_point, longest, shared)


def _position_columns(series: Series, unit: TimeUnit) -> dict[str, list[Any]]:
    columns = {}
    for name, values in series.positions.items():
        if name == "seconds":
            columns["time"] = rounded(values / unit.seconds)
        elif series.rows_per_point == 1:
            columns[name] = rounded(values, 9 if name == "iteration" else 6)
        else:
            columns[name] = rounded(values)
    return columns


def final_blocks(groups: list[RunGroup], kinds: list[str]) -> list[DataBlock]:
    """Return the final losses by group and kind: means with intervals, and single runs."""
    blocks = []
    for kind in kinds:
        for group in groups:
            found = final_loss(group, kind)
            if not found.n:
                continue
            constants = {"group": group.label, "kind": kind}
            interval = {
                "mean": rounded([found.mean], 6),
                "low": rounded([found.low], 6),
                "high": rounded([found.high], 6),
                "count": [found.n],
            }
            blocks.append({"constants": constants, "columns": interval})
            if len(group) > 1:
                values = [(last_loss(run, kind), run.seed) for run in group.runs]
                values = [(loss, seed) for loss, seed in values if math.isfinite(loss)]
                single = {
                    "value": rounded((loss for loss, _ in values), 6),
                    "seed": [seed for _, seed in values],
                }
                blocks.append({"constants": constants, "columns": single})
    return blocks


def interval_block(label: str, quantiles: list[float], count: int) -> DataBlock:
    """Return the block of a median with two other quantiles around it, in ascending order."""
    low, middle, high = rounded(quantiles)
    columns = {"mean": [middle], "low": [low], "high": [high], "count": [count]}
    return {"constants": {"group": label}, "columns": columns}


def experts_by_layer_blocks(groups: list[RunGroup]) -> list[DataBlock]:
    """Return the last mean of experts per token of each MoE layer: a mean over a group's runs."""
    blocks = []
    for group in groups:
        lists = [run.experts_per_token_by_layer for run in group.runs]
        lists = [values for values in lists if len(values) == len(lists[0]) > 0]
        if not lists:
            continue
        columns: dict[str, list[Any]] = {"layer": [], "value": []}
        for layer, values in enumerate(zip(*lists)):
            numbers = [value for value in values if value is not None]
            if numbers:
                columns["layer"].append(layer)
                columns["value"] += rounded([float(np.mean(numbers))])
        blocks.append({"constants": {"group": group.label}, "columns": columns})
    return blocks
