"""Read a run's metrics.jsonl for a report: curves, load history, commands and problems.

Shape suffixes: R rows of one kind, C columns in time of a heat map, L MoE layers, E experts,
N numbers of experts per token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.analysis.curves import RunCurves, is_number
from megatron.analysis.report.history import LayerHistory, ListHistory
from megatron.analysis.report.sources import RunSource

TRAIN = "train"
PROBE = "probe"

NOT_CURVES = {
    "iteration",
    "consumed_samples",
    "consumed_tokens",
    "elapsed_s",
    "global_batch_size",
    "flops_per_token",
}
"""Numbers of a row that are positions or inputs, not results"""


@dataclass(frozen=True)
class KindRows:
    """The rows of one kind of a run, by column; arrays are fp64 [R]."""

    kind: str
    """train, eval, eval/NAME, test or probe"""
    iteration_R: np.ndarray
    tokens_R: np.ndarray
    flops_R: np.ndarray | None
    """training FLOPs since the start; None: not recorded"""
    seconds_R: np.ndarray | None
    """training time since the start; None: not recorded"""
    values: dict[str, np.ndarray]
    """metrics by name; NaN where a row has none or NaN"""

    def __len__(self) -> int:
        return len(self.iteration_R)

    def last(self, metric: str) -> float:
        """Return the metric's last value; NaN without rows or without the metric."""
        values_R = self.values.get(metric)
        if values_R is None or not len(values_R):
            return float("nan")
        return float(values_R[-1])


@dataclass(frozen=True)
class ReportRun:
    """What a report shows of one run."""

    source: RunSource
    train: KindRows
    held_out: dict[str, KindRows]
    """rows of evaluations by kind, of kinds that have a loss"""
    probe: KindRows | None = None
    """rows of the routing probe; None: there are none"""
    starts: tuple[dict[str, Any], ...] = ()
    """rows of kind `run`: one per start or resume that belongs to the curve"""
    config: dict[str, Any] = field(default_factory=dict)
    """configuration of the last start in the layout of run.json; empty: not known"""
    loads: LayerHistory | None = None
    """share of each layer's assignments by expert, over the training; None: not recorded"""
    gate_masses: LayerHistory | None = None
    """share of each layer's total weight by expert, over the training; None: not recorded"""
    experts_per_token: ListHistory | None = None
    """share of tokens with 0, 1, 2, ... experts, over the training; None: not recorded"""
    experts_per_token_by_layer: tuple[float | None, ...] = ()
    """mean experts per token of each MoE layer, of the last row"""
    problem: str = ""
    """why the metrics cannot be read, in one line; empty if they can"""

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.source.name

    @property
    def first_config(self) -> dict[str, Any]:
        """Configuration of the first start, else that of the last one."""
        configs = [row["config"] for row in self.starts if isinstance(row.get("config"), dict)]
        return configs[0] if configs else self.config

    @property
    def seed(self) -> int | None:
        """Random seed; None: not known."""
        if self.source.seed is not None:
            return self.source.seed
        seed = self.config.get("train", {}).get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def is_empty(self) -> bool:
        """Whether the run has neither training rows nor evaluations."""
        return not len(self.train) and not self.held_out

    def start(self, key: str) -> Any:
        """Return a value of the last start's row that has it, such as world_size; else None."""
        for row in reversed(self.starts):
            if row.get(key) is not None:
                return row[key]
        return None


def read_run(source: RunSource, most_columns: int) -> ReportRun:
    """Read one run. A file that cannot be read is described in `problem`.

    Args:
        most_columns: columns in time that the histories keep at most.
    """
    try:
        curves = RunCurves.read(source.path)
    except FileNotFoundError:
        return _empty_run(source, f"there is no {source.path}")
    except OSError as error:
        return _empty_run(source, f"{source.path} cannot be read: {error}")
    rows = curves.rows
    if not all(isinstance(row.get("kind"), str) for row in rows):
        return _empty_run(source, f"{source.path} has rows without a kind: no metrics.jsonl")
    starts = tuple(row for row in rows if row.get("kind") == "run")
    train_rows = [row for row in rows if row.get("kind") == TRAIN]
    held_out = {kind: _kind_rows(curves, kind) for kind in curves.kinds if kind != TRAIN}
    probe = _kind_rows(curves, PROBE)
    last_lists = [row for row in rows if row.get("experts_per_token_by_layer")]
    by_layer = last_lists[-1]["experts_per_token_by_layer"] if last_lists else ()
    return ReportRun(
        source=source,
        train=_kind_rows(curves, TRAIN),
        held_out=held_out,
        probe=probe if len(probe) else None,
        starts=starts,
        config=_configuration(starts, source.path.parent),
        loads=_history_by_expert(curves, "load_by_expert", most_columns),
        gate_masses=_history_by_expert(curves, "gate_mass_by_expert", most_columns),
        experts_per_token=ListHistory.of_rows(
            train_rows, "experts_per_token_histogram", most_columns
        ),
        experts_per_token_by_layer=tuple(by_layer),
    )


def _history_by_expert(
    curves: RunCurves, metric: str, most_columns: int
) -> LayerHistory | None:
    """Collect a table of training rows; of many experts, only evaluations have it."""
    evaluations = [kind for kind in curves.kinds if kind.split("/")[0] == "eval"]
    for kind in (TRAIN, *evaluations):
        rows = [row for row in curves.rows if row.get("kind") == kind]
        history = LayerHistory.of_rows(rows, metric, most_columns)
        if history is not None:
            return history
    return None


def _empty_run(source: RunSource, problem: str) -> ReportRun:
    nothing = KindRows(TRAIN, np.empty(0), np.empty(0), None, None, {})
    return ReportRun(source, nothing, {}, problem=problem)


def _kind_rows(curves: RunCurves, kind: str) -> KindRows:
    # Every row has a number as iteration, so this curve has the positions of all of them.
    positions = curves.curve(kind, "iteration")
    rows = [
        row
        for row in curves.rows
        if row.get("kind") == kind and is_number(row.get("iteration"))
    ]
    names = dict.fromkeys(
        name
        for row in rows
        for name, value in row.items()
        if name not in NOT_CURVES and is_number(value)
    )
    return KindRows(
        kind,
        positions.iteration_R,
        positions.tokens_R,
        positions.flops_R,
        positions.seconds_R,
        {name: _column(rows, name) for name in names},
    )


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """Return a metric as an array [R]; rows that lack it, and infinities, are NaN."""
    values = [row.get(name) for row in rows]
    column_R = np.array([v if is_number(v) else np.nan for v in values], dtype=np.float64)
    column_R[np.isinf(column_R)] = np.nan
    return column_R


def _configuration(starts: tuple[dict[str, Any], ...], folder: Path) -> dict[str, Any]:
    """Return the configuration of the last start, else that of the newest checkpoint, else {}."""
    for row in reversed(starts):
        if isinstance(row.get("config"), dict):
            return row["config"]
    for path in sorted(folder.glob("checkpoints/iter_*/run.json"), reverse=True):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            return config
    return {}
