"""Config section `fault_tolerance`: what ends a run before its schedule does."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    option,
    require_choices,
    require_not_negative,
    require_positive_numbers,
    require_setting,
)
from megatron.config.needs import TRAINING, setting

_YEAR_MINUTES = 366 * 24 * 60


@dataclass(frozen=True)
class FaultToleranceConfig:
    """Planned early exits, and reactions to bad steps, loss spikes and hanging ranks."""

    exit_interval: int = option(0, needs=TRAINING)
    """save and stop at iterations divisible by this number, before the schedule ends;
    0: never"""
    exit_duration_in_mins: float = option(0.0, needs=TRAINING)
    """save and stop after the first step that ends this many minutes after the process
    started; 0: never"""
    max_bad_steps: int = 20
    """consecutive steps skipped because of a NaN or infinite loss or gradient after which
    the run fails; 0: no limit"""
    loss_spike_threshold: float = 6.0
    """a loss this many standard deviations above the mean of the last --loss-spike-window
    steps counts as a spike and is logged; 0: no spike detection"""
    loss_spike_window: int = option(100, needs=setting("loss_spike_threshold"))
    """number of previous steps a loss is compared with; detection starts when a quarter of
    them are available"""
    loss_spike_action: str = option(
        "log", choices=("log", "stop"), needs=setting("loss_spike_threshold")
    )
    """reaction to a loss spike: log it, or stop the run without writing a checkpoint"""
    timeout_minutes: float = 10.0
    """the run fails when a collective takes longer than this, or when loading one batch
    takes longer than four fifths of this"""

    def __post_init__(self):
        require_not_negative(
            self,
            "exit_interval",
            "exit_duration_in_mins",
            "max_bad_steps",
            "loss_spike_threshold",
        )
        require_choices(self)
        require_setting(self, "loss_spike_window", self.loss_spike_window >= 8, "8 or more")
        require_positive_numbers(self, "timeout_minutes")
        require_setting(
            self, "timeout_minutes", self.timeout_minutes <= _YEAR_MINUTES, "up to a year"
        )

    def last_iteration(self, done: int, iterations: int) -> int:
        """Return the iteration after which this run ends, with --exit-interval in mind.

        Args:
            done: iterations completed when this run starts.
            iterations: iterations of the complete schedule.
        """
        if not self.exit_interval:
            return iterations
        next_exit = (done // self.exit_interval + 1) * self.exit_interval
        return min(iterations, next_exit)
