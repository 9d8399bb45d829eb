"""Data sets of a report's charts, as blocks (see page.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.analysis.report.finals import final_loss, last_loss
from megatron.analysis.report.groups import RunGroup
from megatron.analysis.report.history import LayerHistory, bucket_edges
from megatron.analysis.report.page import rounded
from megatron.analysis.report.runs import ReportRun
from megatron.analysis.report.series import Series, group_series

DataBlock = dict[str, Any]

MOST_CELLS = 120_000
"""Cells of all heat maps of a page, of about 4 bytes each"""

EXTREME_DIGITS = 4
"""Significant digits of minima and maxima"""

FEWEST_COLUMNS = 8
"""Columns in time below which a heat map shows nothing: layers are left out instead"""

SMALLEST_SHARE = 5e-4
"""Share of tokens below which the ends of a histogram are left out"""

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
    for place, kind, series in found:
        columns: dict[str, list[Any]] = {"mean": rounded(series.mean)}
        if has_spread:
            columns["low"] = rounded(series.low)
            columns["high"] = rounded(series.high)
            columns["seeds"] = [int(count) for count in series.num_seeds]
        if has_extremes:
            columns["least"] = rounded(series.least, EXTREME_DIGITS)
            columns["most"] = rounded(series.most, EXTREME_DIGITS)
        # Metrics of one kind have the same rows, so the same points.
        name = f"{place} {kind} {most_points}"
        shared[name] = _position_columns(series, unit)
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


def histogram_blocks(groups: list[RunGroup]) -> list[DataBlock]:
    """Return the last distribution of experts per token of each group, a mean over its runs."""
    blocks = []
    for group in groups:
        lists = [run.experts_per_token.last_N for run in group.runs if run.experts_per_token]
        if not lists:
            continue
        longest = max(map(len, lists))
        share_N = np.mean([np.pad(share, (0, longest - len(share))) for share in lists], axis=0)
        first, stop = _support(share_N)
        columns = {
            "experts": list(range(first, stop)),
            "share": rounded(share_N[first:stop], 4),
        }
        blocks.append({"constants": {"group": group.label}, "columns": columns})
    return blocks


def histogram_grid(
    run: ReportRun, constants: dict[str, str], most_cells: int
) -> DataBlock | None:
    """Return the distribution of experts per token of a run over its training."""
    history = run.experts_per_token
    if history is None:
        return None
    first, stop = _support(history.value_CN.max(axis=0))
    most_columns = max(most_cells // (stop - first), FEWEST_COLUMNS)
    value_CN = history.value_CN[:, first:stop]
    merged = _merged(history.start_C, history.end_C, value_CN, most_columns)
    return {
        "constants": constants,
        "along": {"start": rounded(merged[0], 9), "end": rounded(merged[1], 9)},
        "down": {"experts": list(range(first, stop))},
        "cells": {"share": rounded(merged[2].ravel(), 3)},
    }


def expert_grids(history: LayerHistory, run: str, most_cells: int) -> list[DataBlock]:
    """Return the shares of a run's experts, relative to their mean, one block per layer.

    With more layers than fit into `most_cells`, some of them, evenly spaced, are left out.
    """
    num_experts = max(value_CE.shape[1] for value_CE in history.layers.values())
    most_layers = max(most_cells // (num_experts * FEWEST_COLUMNS), 1)
    layers = sorted(history.layers)
    if len(layers) > most_layers:
        places = np.linspace(0, len(layers) - 1, most_layers).round().astype(int)
        layers = [layers[place] for place in places]
    most_columns = max(most_cells // (num_experts * len(layers)), FEWEST_COLUMNS)
    blocks = []
    for layer in layers:
        share_CE = history.layers[layer]
        start_C, end_C, share_CE = _merged(
            history.start_C, history.end_C, share_CE, most_columns
        )
        mean_C1 = share_CE.mean(axis=1, keepdims=True)
        relative_CE = np.divide(
            share_CE, mean_C1, out=np.full(share_CE.shape, np.nan), where=mean_C1 > 0
        )
        blocks.append(
            {
                "constants": {"run": run, "layer": str(layer)},
                "along": {"start": rounded(start_C, 9), "end": rounded(end_C, 9)},
                "down": {"expert": list(range(share_CE.shape[1]))},
                "cells": {"relative": rounded(relative_CE.ravel(), 3)},
            }
        )
    return blocks


def _merged(
    start_C: np.ndarray, end_C: np.ndarray, value_CN: np.ndarray, most_columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge columns in time until there are at most `most_columns`; (starts, ends, means)."""
    edges = bucket_edges(len(start_C), most_columns)
    sum_CN = np.add.reduceat(value_CN, edges[:-1], axis=0)
    return start_C[edges[:-1]], end_C[edges[1:] - 1], sum_CN / np.diff(edges)[:, None]


def _support(share_N: np.ndarray) -> tuple[int, int]:
    """Return the range of a histogram without its nearly empty ends."""
    filled = np.flatnonzero(share_N >= SMALLEST_SHARE)
    if not len(filled):
        return 0, len(share_N)
    return int(filled[0]), int(filled[-1]) + 1


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
