"""Flags of when a run stops before its end."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import require


@dataclass(frozen=True)
class FaultConfig:
    """What ends a run early, and how."""

    exit_interval: int = 0
    """stop (and save) at iterations divisible by this although the schedule goes on; 0: never"""
    max_bad_steps: int = 20
    """steps skipped in a row because of NaN or infinite gradients that end the run; 0: never"""
    timeout_minutes: float = 10.0
    """a collective that takes longer ends the run"""

    def check_faults(self) -> None:
        for name in ("exit_interval", "max_bad_steps"):
            require(getattr(self, name) >= 0, f"--{name.replace('_', '-')}", getattr(self, name), "0 or more")
        require(self.timeout_minutes > 0, "--timeout-minutes", self.timeout_minutes, "a positive number")
