"""SpikeDetector against its definition and on constructed losses."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from megatron.training.loss_spikes import LEAST_DEVIATION, SpikeDetector


def test_spike_statistics_match_the_definition():
    """A z-score against the last losses that were not spikes."""
    rng = random.Random(0)
    threshold = 2.0
    window = 40
    detector = SpikeDetector(threshold, window)
    normal_losses: list[float] = []
    spikes = 0
    for step in range(300):
        loss = rng.gauss(3.0, 0.2) + (4.0 if step % 29 == 28 else 0.0)
        spike = detector.update(loss)
        if len(normal_losses) >= window // 4:
            mean = statistics.mean(normal_losses)
            deviation = max(statistics.pstdev(normal_losses), LEAST_DEVIATION * mean)
            z = (loss - mean) / deviation
            if z > threshold:
                expected = pytest.approx((z, mean, deviation))
                assert (spike.z, spike.mean, spike.deviation) == expected
                spikes += 1
                continue
        assert spike is None
        normal_losses = [*normal_losses, loss][-window:]
    assert spikes > 10


def test_early_and_low_losses_are_normal():
    """No spikes before a quarter of the window is filled, and none downwards."""
    detector = SpikeDetector(3.0, 16)
    assert [detector.update(loss) for loss in (1.0, 100.0, 1.0, 100.0)] == [None] * 4
    detector = SpikeDetector(3.0, 16)
    assert [detector.update(loss) for loss in (5.0, 5.0, 5.0, 5.0, 0.1)] == [None] * 5
    assert detector.update(50.0) is not None


@pytest.mark.parametrize("loss, is_spike", [(2.05, False), (2.07, True)])
def test_flat_losses_have_a_least_deviation(loss, is_spike):
    """It is 1 % of the mean, and the threshold three times that."""
    detector = SpikeDetector(3.0, 8)
    for _ in range(8):
        assert detector.update(2.0) is None
    assert (detector.update(loss) is not None) == is_spike


def test_lasting_spikes_are_a_level_shift():
    """After a quarter of the window; a normal loss in between restarts the count."""
    detector = SpikeDetector(4.0, 16)
    for i in range(16):
        detector.update(2.0 + 0.01 * (i % 2))
    losses = (9.0, 9.1, 9.0, 2.0, 9.0, 9.1, 9.0, 9.1, 9.0, 9.1, 30.0)
    spikes = [detector.update(loss) for loss in losses]
    assert [s and (s.consecutive, s.level_shift) for s in spikes] == [
        (1, False),
        (2, False),
        (3, False),
        None,
        (1, False),
        (2, False),
        (3, False),
        (4, True),
        None,
        None,
        (1, False),
    ]


def test_spikes_without_deviation_or_threshold():
    """Losses of zero give an infinite z-score; a threshold of zero finds nothing."""
    detector = SpikeDetector(4.0, 8)
    for _ in range(4):
        assert detector.update(0.0) is None
    assert detector.update(1e-9).z == math.inf
    off = SpikeDetector(0.0, 8)
    assert not any(off.update(loss) for loss in (1.0, 1.0, 1.0, 1.0, 1e9))
