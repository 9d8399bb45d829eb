"""Rows of metrics, which the metric writers receive.

A row is a dict: `kind` (train, eval, eval/NAME for a named validation set, test), `iteration`,
and metrics with their units in their names. docs/metrics.md lists them. A value is one of

- a number: loss, lr, experts_per_token, ...
- a list with a number for each layer, named <name>_by_layer; None: the layer has no such metric
- a histogram, named <name>_histogram: a list with the fraction of 0, 1, 2, ...
- a table, such as load_by_expert: for each layer a list with a share for each expert, or None

The row of kind `run` describes the run instead, see `megatron.training.run_row`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np

MetricsRow = dict[str, Any]

RUN_KIND = "run"
"""`kind` of the row that describes a run instead of its metrics"""

LOAD_BUCKETS = 30
"""buckets of the histogram of a layer's experts by their multiple of the mean"""

_HISTOGRAM = "_histogram"


def is_evaluation(row: MetricsRow) -> bool:
    """Whether a row has the metrics of an evaluation, which are rarer than those of training."""
    return row["kind"] not in ("train", RUN_KIND)


def scalars(row: MetricsRow) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of every number, and of every number of a list by layer."""
    for name, value in row.items():
        tag = f"{row['kind']}/{name}"
        if _is_list(value):
            if name.endswith(_HISTOGRAM):
                continue
            for i, element in enumerate(value):
                if isinstance(element, Real):  # else a layer without it, or a list of a table
                    yield f"{tag}/{i}", element
        elif name != "iteration" and isinstance(value, Real):
            yield tag, value


def histograms(row: MetricsRow) -> Iterator[tuple[str, Sequence[float]]]:
    """Yield (tag, fractions) of every histogram: the fraction of 0, 1, 2, ..."""
    for name, value in row.items():
        if name.endswith(_HISTOGRAM) and value and not any(map(_is_list, value)):
            yield f"{row['kind']}/{name}", value


def tables(row: MetricsRow) -> Iterator[tuple[str, Sequence[Sequence[float] | None]]]:
    """Yield (tag, rows) of every table of shares by layer and expert.

    Lists that are nested more deeply, such as co-activations, are in metrics.jsonl only.
    """
    for name, value in row.items():
        if not _is_list(value) or not any(map(_is_list, value)):
            continue
        is_flat = not any(_is_list(element) for layer in value for element in layer or ())
        if is_flat and name.endswith("_by_expert"):
            yield f"{row['kind']}/{name}", value


def multiples_of_mean(
    shares: Sequence[Sequence[float] | None],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (layer, [E] shares of its experts divided by their mean) of the rows of a table.

    The shares of a layer with zero-computation experts add up to less than 1. A row is left
    out if a share is not finite, or if all are 0, because no token was assigned.
    """
    for layer, shares_E in enumerate(shares):
        if not shares_E:
            continue
        mean = sum(shares_E) / len(shares_E)
        if mean > 0 and math.isfinite(mean):
            yield layer, np.asarray(shares_E, dtype=float) / mean


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
