"""Curves of a run's metrics against tokens, training FLOPs and seconds, from metrics.jsonl.

Shape suffixes: R rows of one kind, P points at which a curve is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.training.metrics_file import read_metrics, without_repeated_steps

AXES = ("tokens", "flops", "seconds")
"""What a curve can be drawn against"""


@dataclass(frozen=True)
class MetricCurve:
    """One metric of the rows of one kind, in the order of the run; arrays are fp64 [R]."""

    kind: str
    """kind of the rows: train, eval, eval/NAME or test"""
    metric: str
    """name in metrics.jsonl, such as loss"""
    iteration_R: np.ndarray
    """completed optimizer steps"""
    tokens_R: np.ndarray
    """tokens of all ranks since the start of training"""
    flops_R: np.ndarray | None
    """model FLOPs of forward and backward since the start; None if a training row lacks them"""
    seconds_R: np.ndarray | None
    """time of the training steps, without evaluations and start-up; None like flops_R"""
    value_R: np.ndarray
    """the metric; NaN where the run has written NaN"""

    def __len__(self) -> int:
        return len(self.value_R)

    def axis(self, name: str) -> np.ndarray | None:
        """Return the positions of the rows on an axis of AXES; None if the run lacks it.

        Raises:
            ValueError: there is no such axis.
        """
        if name not in AXES:
            raise ValueError(f"the axis is {name!r}; allowed: {', '.join(AXES)}")
        return getattr(self, f"{name}_R")

    def end(self, axis: str) -> float:
        """Return the last position on an axis; NaN without rows or without this axis."""
        position_R = self.axis(axis)
        if position_R is None or not len(position_R):
            return float("nan")
        return float(position_R[-1])

    def at(self, axis: str, position: float) -> float:
        """Return the metric at a position, interpolated linearly between the rows around it.

        Returns:
            NaN outside of the curve's range, next to a row that is NaN, and without this axis:
            a curve is never extrapolated.
        """
        position_R = self.axis(axis)
        if position_R is None or not len(position_R):
            return float("nan")
        # A relative tolerance: cumulated FLOPs of two equal runs differ in the last bits.
        tolerance = 1e-9 * abs(position_R[-1])
        if not position_R[0] - tolerance <= position <= position_R[-1] + tolerance:
            return float("nan")
        position = float(np.clip(position, position_R[0], position_R[-1]))
        right = int(np.searchsorted(position_R, position))
        if position_R[right] == position:
            # The last of the rows at this position.
            right = int(np.searchsorted(position_R, position, side="right")) - 1
            return float(self.value_R[right])
        left = right - 1
        share = (position - position_R[left]) / (position_R[right] - position_R[left])
        return float((1 - share) * self.value_R[left] + share * self.value_R[right])


@dataclass(frozen=True)
class RunCurves:
    """The curves of one run; steps that a resumed run repeated count once."""

    rows: list[dict[str, Any]]
    """rows of metrics.jsonl without repeated steps"""
    _positions: _TrainingPositions = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> RunCurves:
        """Read a metrics file.

        Raises:
            OSError: it cannot be read.
        """
        return cls.from_rows(read_metrics(path))

    @classmethod
    def from_rows(cls, rows: list[dict[str, Any]]) -> RunCurves:
        """Build the curves from rows in the order of the file, as `read_metrics` returns them."""
        rows = without_repeated_steps(rows)
        return cls(rows, _TrainingPositions.of(_rows_of_kind(rows, "train")))

    @property
    def kinds(self) -> list[str]:
        """Kinds of rows with a loss, in the order of their first row."""
        return list(dict.fromkeys(row["kind"] for row in self.rows if "loss" in row))

    def curve(self, kind: str, metric: str = "loss") -> MetricCurve:
        """Return a metric of the rows of a kind that have it as a number; it may have none."""
        rows = [row for row in _rows_of_kind(self.rows, kind) if is_number(row.get(metric))]
        iteration_R = _column(rows, "iteration")
        tokens_R = _column(rows, "consumed_tokens")
        return MetricCurve(
            kind=kind,
            metric=metric,
            iteration_R=iteration_R,
            tokens_R=tokens_R,
            flops_R=self._positions.flops_at(tokens_R),
            seconds_R=self._positions.seconds_at(iteration_R),
            value_R=_column(rows, metric),
        )


def largest_common_position(curves: Iterable[MetricCurve], axis: str) -> float:
    """Return the largest position that all curves reach; NaN if one has no rows or no such axis.

    Losses at this position compare runs at equal tokens, equal FLOPs or equal time.
    """
    ends = [curve.end(axis) for curve in curves]
    # min() of Python and NaN depends on their order.
    return float(np.min(ends)) if ends else float("nan")


@dataclass(frozen=True)
class _TrainingPositions:
    """Cumulated FLOPs and seconds at the training rows, with the start of training in front."""

    iteration_R: np.ndarray
    tokens_R: np.ndarray
    flops_R: np.ndarray | None
    seconds_R: np.ndarray | None

    @classmethod
    def of(cls, train_rows: list[dict[str, Any]]) -> _TrainingPositions:
        """Cumulate over training rows.

        Each row's rates hold for all steps since the previous row. Those of the first row hold
        since the start of training, also when the file begins in its middle.
        """
        iteration_R = np.append(0.0, _column(train_rows, "iteration"))
        tokens_R = np.append(0.0, _column(train_rows, "consumed_tokens"))
        return cls(
            iteration_R,
            tokens_R,
            flops_R=_cumulated(train_rows, "flops_per_token", np.diff(tokens_R)),
            seconds_R=_cumulated(train_rows, "step_time_ms", np.diff(iteration_R) / 1000),
        )

    def flops_at(self, tokens_R: np.ndarray) -> np.ndarray | None:
        """Return the FLOPs spent at these numbers of tokens, at most those of the last row."""
        if self.flops_R is None:
            return None
        return np.interp(tokens_R, self.tokens_R, self.flops_R)

    def seconds_at(self, iteration_R: np.ndarray) -> np.ndarray | None:
        """Return the seconds spent at these iterations, at most those of the last row."""
        if self.seconds_R is None:
            return None
        return np.interp(iteration_R, self.iteration_R, self.seconds_R)


def _cumulated(
    rows: list[dict[str, Any]], rate: str, amount_R: np.ndarray
) -> np.ndarray | None:
    """Return 0 and the running sums of rate x amount; None if a row lacks the rate."""
    if not all(is_number(row.get(rate)) for row in rows):
        return None
    return np.append(0.0, np.cumsum(_column(rows, rate) * amount_R))


def _rows_of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("kind") == kind]


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row.get(name, np.nan) for row in rows], dtype=np.float64)


def is_number(value: Any) -> bool:
    """Return whether a value of a row is a number; NaN is one, a boolean is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
