"""Read metrics.jsonl, also of runs of earlier versions, under today's metric names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_BY_LAYER = "_by_layer"

_NEW_NAMES = {
    "experts_per_token_wanted": "experts_per_token_before_capacity",
    "experts_per_token_kept": "experts_per_token",
    "drop_fraction": "dropped_assignment_fraction",
    "lost_token_fraction": "tokens_with_drops_fraction",
    "kept_experts_histogram": "experts_per_token_histogram",
    "moved_fraction": "bias_changed_fraction",
    "local_fraction": "zero_computation_fraction",
}
"""Metric names of version 0.1.0 by their present names; `<name>_by_layer` changed alike"""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file.

    Lines that are not JSON objects are skipped: a killed run leaves a part of its last line, to
    which a resumed run adds the end of the line.

    Returns:
        Rows in the order of the file, under today's metric names. NaN and infinities are floats.
    """
    rows = []
    content = Path(path).read_text(encoding="utf-8", errors="replace")
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append({current_name(name): value for name, value in row.items()})
    return rows


def without_repeated_steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of one curve: those that a resumed run logged again replace the first ones.

    A run that was killed after its last checkpoint repeats the steps since then. It announces
    the iteration from which it continues in its row of kind `run`; in files without such rows, a
    training row whose iteration does not exceed the previous one's shows it.
    """
    kept: list[dict[str, Any]] = []
    last_trained = -1
    for row in rows:
        iteration = row.get("iteration", 0)
        if row.get("kind") == "run":
            # A start from scratch repeats the evaluation of the initial weights, too.
            last_kept = iteration if iteration > 0 else -1
            kept = [earlier for earlier in kept if earlier.get("iteration", 0) <= last_kept]
            last_trained = iteration
        elif row.get("kind") == "train":
            if iteration <= last_trained:
                kept = [earlier for earlier in kept if earlier.get("iteration", 0) < iteration]
            last_trained = iteration
        kept.append(row)
    return kept


def current_name(name: str) -> str:
    """Return today's name of a metric; names that did not change are returned as they are."""
    if name.endswith(_BY_LAYER):
        base = name.removesuffix(_BY_LAYER)
        return _NEW_NAMES.get(base, base) + _BY_LAYER
    return _NEW_NAMES.get(name, name)
