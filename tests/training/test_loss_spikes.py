"""The spike detector against the definition, and on made-up losses."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from megatron.training.loss_spikes import LEAST_DEVIATION, SpikeDetector


def test_a_z_score_against_the_last_losses_that_were_no_spikes():
    rng, threshold, window = random.Random(0), 2.0, 40
    detector, usual, seen = SpikeDetector(threshold, window), [], 0
    for step in range(300):
        loss = rng.gauss(3.0, 0.2) + (4.0 if step % 29 == 28 else 0.0)
        spike = detector.update(loss)
        if len(usual) >= window // 4:
            mean = statistics.mean(usual)
            deviation = max(statistics.pstdev(usual), LEAST_DEVIATION * mean)
            z = (loss - mean) / deviation
            if z > threshold:
                assert (spike.z, spike.mean, spike.deviation) == pytest.approx(
                    (z, mean, deviation)
                )
                seen += 1
                continue
        assert spike is None
        usual = [*usual, loss][-window:]
    assert seen > 10


def test_nothing_before_a_quarter_of_the_window_and_nothing_downwards():
    detector = SpikeDetector(3.0, 16)
    assert [detector.update(loss) for loss in (1.0, 100.0, 1.0, 100.0)] == [None] * 4
    detector = SpikeDetector(3.0, 16)
    assert [detector.update(loss) for loss in (5.0, 5.0, 5.0, 5.0, 0.1)] == [None] * 5
    assert detector.update(50.0) is not None


@pytest.mark.parametrize("level, spikes", [(2.05, False), (2.07, True)])
def test_ripples_of_a_flat_loss_are_no_spikes(level, spikes):
    """The floor is 1 % of the mean, and the threshold three of it."""
    detector = SpikeDetector(3.0, 8)
    for _ in range(8):
        assert detector.update(2.0) is None
    assert (detector.update(level) is not None) == spikes


def test_a_level_that_stays_is_a_new_level():
    """After a quarter of the window in a row; an interruption starts the count again."""
    detector = SpikeDetector(4.0, 16)
    for i in range(16):
        detector.update(2.0 + 0.01 * (i % 2))
    rows = [
        (s.consecutive, s.level_shift) if (s := detector.update(loss)) else None
        for loss in (9.0, 9.1, 9.0, 2.0, 9.0, 9.1, 9.0, 9.1, 9.0, 9.1, 30.0)
    ]
    assert rows == [
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


def test_a_loss_of_zero_and_no_threshold():
    detector = SpikeDetector(4.0, 8)
    for _ in range(4):
        assert detector.update(0.0) is None
    assert detector.update(1e-9).z == math.inf
    off = SpikeDetector(0.0, 8)
    assert not any(off.update(loss) for loss in (1.0, 1.0, 1.0, 1.0, 1e9))
