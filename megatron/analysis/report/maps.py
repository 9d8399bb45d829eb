"""Data of a report's heat maps and histograms, as blocks (see page.py), in few cells.

What does not fit is merged or left out, and `HeatMaps.reductions` says so: iterations are merged
first, then MoE layers left out, then neighbouring experts merged, then runs left out.

Shape suffixes: C columns in time, E experts, N numbers of experts per token, B rows of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.analysis.report.groups import RunGroup
from megatron.analysis.report.history import LayerHistory, ListHistory, bucket_edges
from megatron.analysis.report.page import DataBlock, rounded
from megatron.analysis.report.runs import ReportRun

EXPERT_CELLS = 120_000
"""Cells of the maps of experts of all runs, of about 6 bytes each"""

HISTOGRAM_CELLS = 30_000
"""Cells of the maps of experts per token of all runs"""

HISTOGRAM_POINTS = 12_000
"""Points of the last distributions of experts per token of all groups"""

FEWEST_COLUMNS = 8
"""Columns in time below which a heat map shows nothing"""

FEWEST_ROWS = 16
"""Rows up to which neighbours are not merged: runs are left out instead"""

SMALLEST_SHARE = 5e-4
"""Share of tokens below which the ends of a histogram are left out"""


@dataclass(frozen=True)
class HeatMaps:
    """Maps of all runs."""

    blocks: list[DataBlock]
    reductions: list[str]
    """what was merged or left out, one sentence each"""


@dataclass(frozen=True)
class MapRows:
    """Numbers from `first` to `stop` - 1 in rows of `per_row` neighbours, multiples of it."""

    first: int
    stop: int
    per_row: int

    @property
    def firsts(self) -> np.ndarray:
        """First number of each row: [B]."""
        start = self.first // self.per_row * self.per_row
        return np.arange(start, self.stop, self.per_row)

    def columns(self, name: str) -> dict[str, list[int]]:
        """Return the first number of each row and, where rows have several, the last one."""
        firsts = self.firsts
        if self.per_row == 1:
            return {name: firsts.tolist()}
        lasts = np.minimum(firsts + self.per_row, self.stop) - 1
        return {name: firsts.tolist(), "last": lasts.tolist()}

    def sums(self, value_CN: np.ndarray) -> np.ndarray:
        """Return the sum of each row's numbers: [C, B]."""
        return np.add.reduceat(value_CN[:, : self.stop], self.firsts, axis=1)

    def means(self, value_CN: np.ndarray) -> np.ndarray:
        """Return the mean of each row's numbers: [C, B]."""
        return self.sums(value_CN) / self.sums(np.ones((1, self.stop)))


def rows_per_map(count: int, most_rows: int) -> int:
    """Return how many neighbours of `count` a row has, a power of two, to have few rows."""
    per_row = 1
    while per_row * max(most_rows, FEWEST_ROWS) < count:
        per_row *= 2
    return per_row


def fitting_runs(runs: Sequence[ReportRun], most_cells: int) -> list[ReportRun]:
    """Return the runs whose maps fit: all of them, or some, evenly spaced."""
    most_runs = most_cells // (FEWEST_COLUMNS * FEWEST_ROWS)
    return [runs[place] for place in _evenly_spaced(len(runs), most_runs)]


def expert_maps(histories: Sequence[LayerHistory | None], most_cells: int) -> HeatMaps:
    """Return the shares of the experts of runs, relative to their mean, one block per layer.

    Args:
        histories: of each run; the number of its place is the block's constant `run`.
        most_cells: of one run, where it is not less than the fewest rows and columns have.
    """
    blocks = []
    reductions = {}
    for number, history in enumerate(histories):
        if history is None:
            continue
        found = _expert_grids(history, str(number), most_cells)
        blocks += found
        if len(found) < len(history.layers):
            reductions["layers"] = "Some of the MoE layers are left out."
    merged = _most_per_row(blocks, "expert")
    if merged > 1:
        reductions["experts"] = f"A row is the mean of up to {merged} neighbouring experts."
    return HeatMaps(blocks, list(reductions.values()))


def _expert_grids(history: LayerHistory, run: str, most_cells: int) -> list[DataBlock]:
    most_experts = max(share_CE.shape[1] for share_CE in history.layers.values())
    per_row = rows_per_map(most_experts, most_cells // FEWEST_COLUMNS)
    most_rows = -(-most_experts // per_row)
    layers = sorted(history.layers)
    most_layers = max(most_cells // (most_rows * FEWEST_COLUMNS), 1)
    layers = [layers[place] for place in _evenly_spaced(len(layers), most_layers)]
    most_columns = max(most_cells // (most_rows * len(layers)), FEWEST_COLUMNS)
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
        rows = MapRows(0, share_CE.shape[1], per_row)
        blocks.append(
            {
                "constants": {"run": run, "layer": str(layer)},
                "along": {"start": rounded(start_C, 9), "end": rounded(end_C, 9)},
                "down": rows.columns("expert"),
                "cells": {"relative": rounded(rows.means(relative_CE).ravel(), 3)},
            }
        )
    return blocks


def histogram_maps(histories: Sequence[ListHistory], most_cells: int) -> HeatMaps:
    """Return the distributions of experts per token of runs over their training.

    Args:
        histories: of each run; the number of its place is the block's constant `run`.
        most_cells: of one run, as for `expert_maps`.
    """
    blocks = []
    for number, history in enumerate(histories):
        first, stop = _support(history.value_CN.max(axis=0))
        per_row = rows_per_map(stop - first, most_cells // FEWEST_COLUMNS)
        rows = MapRows(first, stop, per_row)
        value_CB = rows.sums(history.value_CN)
        most_columns = max(most_cells // value_CB.shape[1], FEWEST_COLUMNS)
        start_C, end_C, value_CB = _merged(
            history.start_C, history.end_C, value_CB, most_columns
        )
        blocks.append(
            {
                "constants": {"run": str(number)},
                "along": {"start": rounded(start_C, 9), "end": rounded(end_C, 9)},
                "down": rows.columns("experts"),
                "cells": {"share": rounded(value_CB.ravel(), 3)},
            }
        )
    merged = _most_per_row(blocks, "experts")
    sentence = f"A row of the map has up to {merged} neighbouring numbers of experts."
    return HeatMaps(blocks, [sentence] if merged > 1 else [])


def last_histograms(groups: Sequence[RunGroup]) -> HeatMaps:
    """Return the last distribution of experts per token of each group, a mean over its runs.

    Of too many numbers, neighbours are merged, as many in all groups.
    """
    shares: dict[str, np.ndarray] = {}
    for group in groups:
        lists = [run.experts_per_token.last_N for run in group.runs if run.experts_per_token]
        if lists:
            longest = max(map(len, lists))
            padded = [np.pad(share_N, (0, longest - len(share_N))) for share_N in lists]
            shares[group.label] = np.mean(padded, axis=0)
    ranges = {label: _support(share_N) for label, share_N in shares.items()}
    longest = max((stop - first for first, stop in ranges.values()), default=1)
    per_row = rows_per_map(longest, HISTOGRAM_POINTS // max(len(shares), 1))
    blocks: list[DataBlock] = []
    for label, share_N in shares.items():
        rows = MapRows(*ranges[label], per_row)
        columns: dict[str, list[Any]] = rows.columns("experts")
        columns["share"] = rounded(rows.sums(share_N[None]).ravel(), 4)
        blocks.append({"constants": {"group": label}, "columns": columns})
    sentence = f"A point is the sum over {per_row} neighbouring numbers of experts."
    return HeatMaps(blocks, [sentence] if per_row > 1 else [])


def _most_per_row(blocks: list[DataBlock], name: str) -> int:
    """Return how many neighbours a row of the maps has at most."""
    sizes = [1]
    for block in blocks:
        down = block["down"]
        sizes.append(down.get("last", down[name])[0] - down[name][0] + 1)
    return max(sizes)


def _evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` places among `count`, the first and the last with them."""
    return np.linspace(0, count - 1, min(count, max(most, 1))).round().astype(int).tolist()


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
