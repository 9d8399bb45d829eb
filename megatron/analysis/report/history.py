"""Lists of a run's metrics over its training, in few columns: loads of experts, histograms.

Shape suffixes: R rows, C columns in time, L MoE layers, E experts, N numbers of experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ListHistory:
    """Means of a metric that is a list, such as a histogram, over intervals of the training."""

    start_C: np.ndarray
    """iteration after which each column begins"""
    end_C: np.ndarray
    """its last iteration"""
    value_CN: np.ndarray
    """mean of its rows; shorter lists end in zeros"""
    last_N: np.ndarray
    """the list of the last row"""

    @staticmethod
    def of_rows(
        rows: list[dict[str, Any]], metric: str, most_columns: int
    ) -> ListHistory | None:
        """Collect a metric of training rows; None: no row has it."""
        rows = [row for row in rows if _is_list_of_numbers(row.get(metric))]
        if not rows:
            return None
        longest = max(len(row[metric]) for row in rows)
        value_RN = np.zeros((len(rows), longest))
        for i, row in enumerate(rows):
            value_RN[i, : len(row[metric])] = row[metric]
        columns = TimeColumns.of(rows, most_columns)
        return ListHistory(
            columns.start_C, columns.end_C, columns.means(value_RN), last_N=value_RN[-1]
        )


@dataclass(frozen=True)
class LayerHistory:
    """Means of a metric with one value per layer and expert, over intervals of the training."""

    start_C: np.ndarray
    """iteration after which each column begins"""
    end_C: np.ndarray
    """its last iteration"""
    layers: dict[int, np.ndarray]
    """[C, E] by the index of the MoE layer, of layers that have the metric"""

    @staticmethod
    def of_rows(
        rows: list[dict[str, Any]], metric: str, most_columns: int
    ) -> LayerHistory | None:
        """Collect a metric of training rows, lists over layers, then experts; None: it is missing.

        A layer that does not have the metric is null in its rows. Rows whose numbers of experts
        differ from the last one's, such as those before an upcycling, are left out.
        """
        rows = [row for row in rows if isinstance(row.get(metric), list)]
        if not rows:
            return None
        shape = _shape(rows[-1][metric])
        rows = [row for row in rows if _shape(row[metric]) == shape]
        columns = TimeColumns.of(rows, most_columns)
        layers = {}
        for layer, num_experts in enumerate(shape):
            if num_experts:
                value_RE = np.array([row[metric][layer] for row in rows], dtype=np.float64)
                layers[layer] = columns.means(value_RE)
        return LayerHistory(columns.start_C, columns.end_C, layers) if layers else None


@dataclass(frozen=True)
class TimeColumns:
    """Division of rows into at most a number of columns with equally many rows each."""

    edges: np.ndarray
    """index of each column's first row, and the number of rows: [C + 1]"""
    start_C: np.ndarray
    end_C: np.ndarray

    @staticmethod
    def of(rows: list[dict[str, Any]], most_columns: int) -> TimeColumns:
        """Divide rows; each covers the iterations since the previous one."""
        iteration_R = np.array([row.get("iteration", 0) for row in rows], dtype=np.float64)
        edges = bucket_edges(len(rows), most_columns)
        end_C = iteration_R[edges[1:] - 1]
        start_C = np.append(0.0, end_C[:-1])
        return TimeColumns(edges, start_C, end_C)

    def means(self, value_RN: np.ndarray) -> np.ndarray:
        """Return the means [C, N] of the rows of each column."""
        sum_CN = np.add.reduceat(value_RN, self.edges[:-1], axis=0)
        return sum_CN / np.diff(self.edges)[:, None]


def bucket_edges(length: int, most: int) -> np.ndarray:
    """Divide `length` > 0 rows into min(length, most) contiguous buckets of nearly equal size.

    Returns:
        Index of the first row of each bucket, and `length` at the end.
    """
    count = min(length, most)
    return np.arange(count + 1) * length // count


def _shape(layers: list[Any]) -> tuple[int, ...]:
    """Return the number of experts of each layer; 0 for a layer without the metric."""
    return tuple(len(layer) if _is_list_of_numbers(layer) else 0 for layer in layers)


def _is_list_of_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, int | float) for item in value)
    )
