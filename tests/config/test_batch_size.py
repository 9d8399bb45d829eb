"""BatchSchedule against Megatron's rule, evaluated after every sample."""

from __future__ import annotations

import pytest

from megatron.config.batch_size import BatchSchedule
from megatron.config.training import TrainConfig


def megatron_batch(consumed: int, final: int, start: int, increment: int, samples: int) -> int:
    """Return the current global batch size of Megatron's calculator, with its fp64 divisions."""
    if consumed > samples:
        return final
    samples_per_increment = samples / ((final - start) // increment)
    return start + increment * int(consumed / samples_per_increment)


# (global batch size, start, increment, samples of the ramp-up). In the last three the fp64
# quotient at the end of the ramp-up is just below the number of increments.
RAMPS = [
    (32, 8, 8, 300),
    (32, 8, 24, 1),
    (9, 1, 1, 7),
    (1024, 16, 8, 3000),
    (50, 1, 1, 83),
    (45, 1, 1, 6_250_000),
    (64, 15, 1, 3),
]


@pytest.mark.parametrize("ramp", RAMPS)
def test_rampup_has_megatrons_sizes(ramp):
    final, start, increment, samples = ramp
    batches = BatchSchedule(final, start, increment, samples)
    near = [
        samples * k // ((final - start) // increment) + offset
        for k in range((final - start) // increment + 1)
        for offset in (-1, 0, 1, 2)
    ]
    for consumed in sorted({*range(min(samples, 400)), *near, samples, samples + 1, 10**9}):
        if consumed >= 0:
            assert batches.at(consumed) == megatron_batch(consumed, *ramp), consumed
    assert batches.at(0) == start
    assert batches.at(samples + 1) == final


@pytest.mark.parametrize("ramp", [ramp for ramp in RAMPS if ramp[3] < 10_000])
def test_next_change_is_the_first(ramp):
    batches = BatchSchedule(*ramp)
    sizes = [batches.at(n) for n in range(ramp[3] + 3)]
    changes = [n for n in range(1, len(sizes)) if sizes[n] != sizes[n - 1]]
    for consumed in range(len(sizes)):
        expected = next((n for n in changes if n > consumed), None)
        assert batches.next_change(consumed) == expected


def test_rounding_is_that_of_fp64():
    """6,250,000 / (6,250,000 / 44) is 43.99...: the last increment is one sample later."""
    batches = BatchSchedule(45, 1, 1, 6_250_000)
    assert [batches.at(6_250_000 + i) for i in (0, 1)] == [44, 45]
    assert batches.next_change(6_249_999) == 6_250_001


def test_batch_without_rampup_is_constant():
    batches = TrainConfig(global_batch_size=12, micro_batch_size=2).batch_schedule(3)
    assert [batches.at(n) for n in (0, 1, 10**12)] == [12, 12, 12]
    assert batches.next_change(0) is None


def test_flags_make_the_rampup():
    train = TrainConfig(global_batch_size=32, micro_batch_size=2, rampup_batch_size=(8, 4, 100))
    assert train.batch_schedule(2) == BatchSchedule(32, 8, 4, 100)
