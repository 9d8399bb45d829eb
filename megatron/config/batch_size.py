"""Global batch size as a function of the samples that a run has consumed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSchedule:
    """Samples of each optimizer step over all ranks: constant, or growing during a ramp-up.

    The ramp-up of `--rampup-batch-size START INCREMENT SAMPLES` takes K increments,
    K = (final - START) / INCREMENT. A step before which n samples were consumed takes, as in
    Megatron,

        n <= SAMPLES    START + INCREMENT floor(n / (SAMPLES / K))
        n >  SAMPLES    final

    Both divisions are rounded to fp64, as in Megatron: the last increment may then come with
    the first step after SAMPLES instead of at SAMPLES.
    """

    final: int
    """samples of a step after the ramp-up"""
    start: int = 0
    """samples of the first step; 0: there is no ramp-up"""
    increment: int = 0
    ramp_samples: int = 0
    """samples that the ramp-up takes"""

    def at(self, consumed_samples: int) -> int:
        """Return the samples of the step that follows this many consumed samples."""
        if not self.start or consumed_samples > self.ramp_samples:
            return self.final
        samples_per_increment = self.ramp_samples / self._num_increments
        return self.start + self.increment * int(consumed_samples / samples_per_increment)

    def next_change(self, consumed_samples: int) -> int | None:
        """Return the number of consumed samples from which on steps are next larger.

        None if they no longer grow.
        """
        size = self.at(consumed_samples)
        if size == self.final:
            return None
        increments = (size - self.start) // self.increment + 1
        # Rounding moves the change by at most one sample.
        change = increments * self.ramp_samples // self._num_increments
        while self.at(change) == size:
            change += 1
        return change

    @property
    def _num_increments(self) -> int:
        return (self.final - self.start) // self.increment
