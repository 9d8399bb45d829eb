"""Conversion between the units of a run: iterations, samples and tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from megatron.checkpoint.metadata import Position, TrainingProgress
from megatron.config.batch_size import BatchSchedule


@dataclass(frozen=True)
class Timeline:
    """Positions of a run at its steps: as they were so far, and as they are planned.

    It is piecewise linear: between two knots, and after the last one, all steps have one size.
    """

    knots: tuple[Position, ...]
    """positions where the size of a step may change, in ascending order; the first is the start"""
    last_step: Position
    """size of the steps after the last knot"""

    @staticmethod
    def of(done: TrainingProgress, batches: BatchSchedule, seq_length: int) -> Timeline:
        """Return the timeline of a run that has progressed to `done` and continues with `batches`.

        Of a checkpoint of an earlier version, all steps so far count as equally large.
        """
        knots = sorted({Position(0, 0, 0), *done.batch_changes, done.position})
        at = done.position
        change = batches.next_change(at.samples)
        while change is not None:
            size = batches.at(at.samples)
            steps = -(-(change - at.samples) // size)
            samples = steps * size
            at = _add(at, Position(steps, samples, samples * seq_length))
            knots.append(at)
            change = batches.next_change(at.samples)
        return Timeline(tuple(knots), Position(1, batches.final, batches.final * seq_length))

    def convert(self, value: int | Fraction, unit: str, to: str) -> int | Fraction:
        """Return the smallest integer of `to` at which the run has reached `value` of `unit`.

        Units are the fields of `Position`. A value stays as it is in its own unit.
        """
        if unit == to:
            return value
        knots = self.knots
        number = 0
        while number + 1 < len(knots) and getattr(knots[number + 1], unit) <= value:
            number += 1
        start = knots[number]
        end = _add(start, self.last_step)
        if number + 1 < len(knots):
            end = knots[number + 1]
        passed = value - getattr(start, unit)
        length = getattr(end, unit) - getattr(start, unit)
        converted_length = getattr(end, to) - getattr(start, to)
        passed_steps = Fraction(passed) * converted_length / length
        return getattr(start, to) + math.ceil(passed_steps)


def _add(a: Position, b: Position) -> Position:
    return Position(a.iterations + b.iterations, a.samples + b.samples, a.tokens + b.tokens)
