"""Learning-rate schedule: a pure function of what a run has consumed, so there is nothing to
save and a resumed run continues exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from megatron.checkpoint.metadata import Position
from megatron.config.fields import flag_name, require
from megatron.config.schema import OptimizerConfig
from megatron.training.plan import TrainingPlan

_DECAY_FIELDS = {
    "iterations": "lr_decay_iters",
    "samples": "lr_decay_samples",
    "tokens": "lr_decay_tokens",
}
_WARMUP_FIELDS = {
    "iterations": "lr_warmup_iters",
    "samples": "lr_warmup_samples",
    "tokens": "lr_warmup_tokens",
}


def _cosine(p: float) -> float:
    return (1 + math.cos(math.pi * p)) / 2


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": lambda p: 1 - p,
    "exponential": lambda p: 2 * 0.5**p - 1,
    "minus_sqrt": lambda p: 1 - math.sqrt(p),
}
"""Factors that fall from 1 to 0 while p rises from 0 to 1"""


class LRSchedule:
    """Linear warm-up followed by a decay to the minimum learning rate.

    The decay is measured in the unit of `--lr-decay-iters`, `-samples` or `-tokens`, or else in
    that of the run's length, and the warm-up in the unit of its flag; `--lr-warmup-fraction` is
    of the decay, and in its unit. Progress in a unit is what the run has really consumed, so
    neither the batch nor the number of ranks moves the schedule. With n the progress before the
    step about to be taken, n' the progress after it, a warm-up of w and a decay that ends at d,
    warm-up included:

        n < w     lr min(n', w) / w       in iterations or tokens: no step has a rate of zero
        n <= w    lr n / w                in samples, as in Megatron: the first rate is zero
        n < d     min + shape(p) (lr - min)          p = (n - w) / (d - w), as in Megatron
        n >= d    min                                (constant: lr)

    shape(p) is (1 + cos(pi p)) / 2 for cosine, 1 - p for linear, 1 for constant.
    inverse-square-root is max(min, lr sqrt(w / n)), also at n = d, as in Megatron; without a
    warm-up w is one iteration or one sample. wsd (warm-up, stable, decay: Hu et al. 2024,
    MiniCPM) holds 1 and falls to 0 over the last `lr_wsd_decay_fraction` of d. With p the
    completed share of that part, `lr_wsd_decay_style` is

        linear         1 - p, as in Haegele et al. 2024
        cosine         (1 + cos(pi p)) / 2
        exponential    2 (1/2)^p - 1
        minus_sqrt     1 - sqrt(p)

    If the units of warm-up and decay differ, the warm-up ends in the unit of the decay where
    the run passes w, by its history or its plan.

    Args:
        optimizer: the flags of the schedule.
        plan: length of the run, and its positions in all units.

    Raises:
        ValueError: the warm-up, or the warm-up and the decay of wsd together, takes
            longer than d.
    """

    def __init__(self, optimizer: OptimizerConfig, plan: TrainingPlan):
        self.peak = optimizer.lr
        self.minimum = optimizer.min_lr
        self.style = optimizer.lr_decay_style
        self.wsd_style = optimizer.lr_wsd_decay_style
        decay = _first_set(optimizer, _DECAY_FIELDS) or plan.length
        self.unit = decay.unit
        self.decay_end = decay.total
        decay_flag = flag_name(decay.field)
        self.warmup_unit, self.warmup = self._warmup_of(optimizer)
        convert = plan.timeline.convert
        self.warmup_end = convert(self.warmup, self.warmup_unit, self.unit)
        self._check_warmup(optimizer, decay_flag)
        self.decay_start = self.warmup_end
        if self.style == "wsd":
            fraction = optimizer.lr_wsd_decay_fraction
            self.decay_start = self.decay_end - round(fraction * self.decay_end)
            require(
                self.warmup_end <= self.decay_start,
                "--lr-wsd-decay-fraction",
                fraction,
                f"what the {math.ceil(self.warmup_end)} warm-up {self.unit} leave of "
                f"{self.decay_end}",
                "Shorten one of the two.",
            )
        # Without a warm-up, inverse-square-root starts from the first iteration or sample.
        self._smallest = plan.seq_length if self.unit == "tokens" else 1

    def _check_warmup(self, optimizer: OptimizerConfig, decay_flag: str) -> None:
        """Raise ValueError if the warm-up takes longer than the decay, of which it is a part."""
        given = _first_set(optimizer, _WARMUP_FIELDS)
        if given is None or self.warmup_end <= self.decay_end:
            return
        amount = f"{given.total} {given.unit}"
        if given.unit != self.unit:
            amount += f", or {math.ceil(self.warmup_end)} {self.unit}"
        warmup_flag = flag_name(given.field)
        raise ValueError(
            f"{warmup_flag} is {amount}; allowed: at most the {self.decay_end} {self.unit} of "
            f"{decay_flag}, of which the warm-up is a part. Lower {warmup_flag} or raise "
            f"{decay_flag}"
        )

    def _warmup_of(self, optimizer: OptimizerConfig) -> tuple[str, int | Fraction]:
        """Return the warm-up, from whichever of its flags is set, and its unit."""
        given = _first_set(optimizer, _WARMUP_FIELDS)
        if given is not None:
            return given.unit, given.total
        fraction = optimizer.lr_warmup_fraction
        if self.unit == "iterations":
            # round, not ceil: 0.07 * 100 is 7.000000000000001.
            return self.unit, round(fraction * self.decay_end)
        return self.unit, Fraction(repr(fraction)) * self.decay_end

    def lr(self, done: Position, step: Position) -> float:
        """Return the learning rate of a step.

        Args:
            done: position of the run before the step.
            step: size of the step.
        """
        warmup_rate = self._warmup_rate(done, step)
        if warmup_rate is not None:
            return warmup_rate
        n = getattr(done, self.unit)
        if self.style == "constant":
            return self.peak
        if self.style == "inverse-square-root":
            return self._inverse_square_root(n)
        if n < self.decay_start:
            return self.peak
        if n >= self.decay_end:
            return self.minimum
        p = float(Fraction(n - self.decay_start) / (self.decay_end - self.decay_start))
        shape = self.wsd_style if self.style == "wsd" else self.style
        return self.minimum + _SHAPES[shape](p) * (self.peak - self.minimum)

    def _warmup_rate(self, done: Position, step: Position) -> float | None:
        """Return the rate of a step within the warm-up; None after it."""
        n = getattr(done, self.warmup_unit)
        if self.warmup_unit == "samples":
            if n > self.warmup or not self.warmup:
                return None
            return self.peak * n / float(self.warmup)
        if n >= self.warmup:
            return None
        # Counted in steps of this size, the rates in tokens equal those in iterations exactly.
        size = getattr(step, self.warmup_unit)
        reached = min(n + size, self.warmup)
        return self.peak * (reached / size) / (self.warmup / size)

    def _inverse_square_root(self, n: int) -> float:
        if n > self.decay_end:
            return self.minimum
        start = max(float(self.warmup_end), self._smallest)
        rate = self.peak * math.sqrt(start) / math.sqrt(max(n, self._smallest))
        return max(self.minimum, rate)


class _Amount(NamedTuple):
    """Value of a field that is set, like `megatron.config.training.RunLength`."""

    unit: str
    total: int
    field: str


def _first_set(optimizer: OptimizerConfig, names: dict[str, str]) -> _Amount | None:
    """Return the value of the field that is set, of one per unit; None: none is."""
    for unit, name in names.items():
        if getattr(optimizer, name):
            return _Amount(unit, getattr(optimizer, name), name)
    return None
