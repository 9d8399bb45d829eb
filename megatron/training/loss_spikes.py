"""Detection of loss spikes: steps whose loss is far above that of the steps before."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

LEAST_DEVIATION = 0.01
"""Smallest standard deviation, as a share of the mean: a loss that has become flat does
not raise an alarm at every ripple."""


@dataclass(frozen=True)
class Spike:
    """A loss spike and the statistics it was compared with."""

    z: float
    """Distance of the loss from the mean, in standard deviations."""
    mean: float
    """Mean loss of the window."""
    deviation: float
    """Standard deviation in the window, at least `LEAST_DEVIATION` of the mean."""
    consecutive: int
    """Number of consecutive steps, this one included, that were spikes."""
    level_shift: bool
    """Whether so many steps were spikes that later losses are compared with these."""


class SpikeDetector:
    """Compares each loss with the last `window` losses that were not spikes.

    A spike is a z-score above the threshold; a loss below the mean is never one. There
    are no spikes before a quarter of the window is filled. The same number of
    consecutive spikes is a level shift (other data, another learning rate): the window
    restarts from them. The window is not part of a checkpoint, so a resumed run starts
    with an empty one.

    Args:
        threshold: z-score above which a loss is a spike; 0: never.
        window: number of losses to compare with.
    """

    def __init__(self, threshold: float, window: int):
        self.threshold = threshold
        self.min_losses = max(2, window // 4)
        self._window: deque[float] = deque(maxlen=window)
        self._consecutive: list[float] = []

    def update(self, loss: float) -> Spike | None:
        """Add the next finite loss; returns the spike if it is one."""
        if not self.threshold:
            return None
        if len(self._window) >= self.min_losses:
            mean = statistics.fmean(self._window)
            deviation = max(statistics.pstdev(self._window, mean), LEAST_DEVIATION * abs(mean))
            if loss - mean > self.threshold * deviation:
                return self._add_spike(loss, mean, deviation)
        self._consecutive.clear()
        self._window.append(loss)
        return None

    def _add_spike(self, loss: float, mean: float, deviation: float) -> Spike:
        self._consecutive.append(loss)
        consecutive = len(self._consecutive)
        level_shift = consecutive == self.min_losses
        if level_shift:
            self._window.clear()
            self._window.extend(self._consecutive)
            self._consecutive.clear()
        z = (loss - mean) / deviation if deviation else float("inf")
        return Spike(z, mean, deviation, consecutive, level_shift)
