"""Spikes of the loss: steps far above what the last steps were like."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

LEAST_DEVIATION = (
    0.01  # of the mean: a loss that has become flat does not alarm at every ripple
)


@dataclass(frozen=True)
class Spike:
    """A loss, and what it was compared with."""

    z: float
    """deviations above the mean"""
    mean: float
    deviation: float
    row: int
    """how many steps in a row, with this one, were spikes"""
    level_shift: bool
    """there were so many in a row that from now on losses are compared with these"""


class SpikeDetector:
    """Compares each loss with the last `window` that were no spikes: a z-score, upwards only.

    Nothing is a spike before a quarter of the window is there. The same number of spikes in a row is no spike any more
    but a new level (other data, another learning rate): the window starts again from them. The window is not part of a
    checkpoint: a resumed run starts with an empty one.

    Args:
        threshold: deviations above the mean from which a loss is a spike; 0: never.
        window: losses to compare with.
    """

    def __init__(self, threshold: float, window: int):
        self.threshold, self.needed = threshold, max(2, window // 4)
        self._usual: deque[float] = deque(maxlen=window)
        self._row: list[float] = []

    def see(self, loss: float) -> Spike | None:
        """Take the next finite loss; the answer says whether it is a spike."""
        if not self.threshold:
            return None
        if len(self._usual) >= self.needed:
            mean = statistics.fmean(self._usual)
            deviation = max(statistics.pstdev(self._usual, mean), LEAST_DEVIATION * abs(mean))
            if loss - mean > self.threshold * deviation:
                return self._spike(loss, mean, deviation)
        self._row.clear()
        self._usual.append(loss)
        return None

    def _spike(self, loss: float, mean: float, deviation: float) -> Spike:
        self._row.append(loss)
        row = len(self._row)
        if row == self.needed:
            self._usual.clear()
            self._usual.extend(self._row)
            self._row.clear()
        z = (loss - mean) / deviation if deviation else float("inf")
        return Spike(z, mean, deviation, row, level_shift=row == self.needed)
