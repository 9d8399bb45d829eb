"""Flags of when a run stops before its end."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import option, require


@dataclass(frozen=True)
class FaultConfig:
    """What ends a run early, and how."""

    exit_interval: int = 0
    """stop (and save) at iterations divisible by this although the schedule goes on; 0: never"""
    exit_duration_in_mins: float = 0.0
    """stop (and save) after the first step that ends this many minutes after the start of the process; 0: never"""
    max_bad_steps: int = 20
    """steps skipped in a row because of a NaN or infinite loss or gradient that end the run; 0: never"""
    loss_spike_threshold: float = 6.0
    """a step's loss this many standard deviations above the mean of the last --loss-spike-window steps is a spike, is
    logged and counted; 0: spikes are not looked for"""
    loss_spike_window: int = 100
    """steps that a loss is compared with; the first comparison needs a quarter of them"""
    loss_spike_action: str = option("log", choices=("log", "stop"))
    """what a spike does: stop ends the run without a checkpoint"""
    timeout_minutes: float = 10.0
    """a collective that takes longer ends the run, and so does a batch that takes four fifths of it to come"""

    def check_faults(self) -> None:
        for name in (
            "exit_interval",
            "exit_duration_in_mins",
            "max_bad_steps",
            "loss_spike_threshold",
        ):
            require(
                getattr(self, name) >= 0,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "0 or more",
            )
        require(
            self.loss_spike_window >= 8,
            "--loss-spike-window",
            self.loss_spike_window,
            "8 or more",
        )
        require(
            self.loss_spike_action == "log" or self.loss_spike_threshold > 0,
            "--loss-spike-action",
            self.loss_spike_action,
            "log without --loss-spike-threshold",
            "Set the threshold.",
        )
        require(
            self.timeout_minutes > 0,
            "--timeout-minutes",
            self.timeout_minutes,
            "a positive number",
        )
