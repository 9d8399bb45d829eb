"""LRSchedule, value by value."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.schema import DECAY_STYLES, OptimizerConfig
from megatron.training.lr_schedule import LRSchedule


def lrs(iterations, steps=None, tokens_per_iteration=10, **options):
    """Learning rates of the first `steps` steps, with a peak of 1."""
    schedule = LRSchedule(
        OptimizerConfig(lr=1.0, **options),
        iterations=iterations,
        tokens_per_iteration=tokens_per_iteration,
    )
    return [schedule.lr(i) for i in range(steps or iterations)]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"lr_decay_style": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"lr_decay_style": "constant", "lr_warmup_iters": 2}, [0.5, 1, 1, 1, 1, 1]),
        ({"lr_decay_style": "linear", "min_lr": 0.2}, [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ({"lr_decay_style": "linear", "lr_warmup_iters": 2}, [0.5, 1, 1, 0.5, 0, 0]),
        ({"lr_decay_style": "linear", "lr_warmup_iters": 4}, [0.25, 0.5, 0.75, 1, 0, 0]),
        ({"lr_decay_style": "linear", "lr_decay_iters": 2}, [1, 0.5, 0, 0, 0, 0]),
        ({"lr_decay_style": "wsd", "lr_wsd_decay_fraction": 0.5}, [1, 1, 1, 0.5, 0, 0]),
        (
            {"lr_decay_style": "wsd", "lr_wsd_decay_fraction": 0.0, "lr_warmup_iters": 2},
            [0.5, 1, 1, 1, 0, 0],
        ),
        ({"lr_decay_style": "wsd", "lr_wsd_decay_fraction": 1.0}, [1, 0.75, 0.5, 0.25, 0, 0]),
        (
            {"lr_decay_style": "cosine", "min_lr": 0.1},
            [0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2 for p in (0, 0.25, 0.5, 0.75, 1, 1)],
        ),
    ],
)
def test_schedule_has_the_expected_values(options, expected):
    assert lrs(4, 6, **options) == pytest.approx(expected)


def test_units_of_warmup_and_decay_agree():
    """In iterations, in tokens (rounded up) and as a share of the run."""
    expected = lrs(20, lr_warmup_iters=4, lr_decay_iters=10)
    assert lrs(20, lr_warmup_tokens=31, lr_decay_tokens=100) == expected
    assert lrs(20, lr_warmup_fraction=0.2, lr_decay_iters=10) == expected
    # 0.07 x 100 is 7.000000000000001 in floating point.
    assert lrs(100, lr_warmup_fraction=0.07) == lrs(100, lr_warmup_iters=7)


def test_schedule_of_the_reference_recipe():
    rates = lrs(60_000, lr_warmup_fraction=0.1, min_lr=0.01)
    assert rates[0] == 1 / 6000 and rates[5999] == rates[6000] == 1.0
    assert rates[33_000] == pytest.approx(0.505)
    assert rates[-1] == pytest.approx(0.01, abs=1e-6)


@given(st.sampled_from(DECAY_STYLES), st.integers(1, 50), st.integers(0, 50), st.floats(0, 0.5))
def test_schedule_rises_then_falls(style, decay, warmup, fraction):
    """It is positive at every step and monotone on both sides of the peak."""
    options = {
        "lr_decay_style": style,
        "lr_warmup_iters": min(warmup, decay) // 2,
        "lr_wsd_decay_fraction": fraction,
    }
    rates = lrs(decay, decay + 3, **options)
    peak = rates.index(1.0)
    assert all(0 < rate <= 1 for rate in rates[:decay])
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[decay:] == [1.0 if style == "constant" else 0.0] * 3


def test_schedule_has_no_state():
    schedule = LRSchedule(
        OptimizerConfig(lr_warmup_iters=5), iterations=20, tokens_per_iteration=1
    )
    forward = [schedule.lr(i) for i in range(20)]
    assert [schedule.lr(i) for i in reversed(range(20))] == forward[::-1]


def test_warmup_may_not_exceed_decay():
    with pytest.raises(
        ValueError,
        match=r"--lr-warmup-\* is 11; allowed: at most the 10 iterations of the decay",
    ):
        lrs(10, lr_warmup_iters=11)
    with pytest.raises(
        ValueError, match=r"--lr-warmup-\* is 6; allowed: at most the 5 iterations"
    ):
        lrs(10, lr_warmup_tokens=60, lr_decay_iters=5)
    assert lrs(10, lr_warmup_iters=10)[-1] == 1.0


def test_wsd_fits_warmup_and_decay():
    with pytest.raises(
        ValueError,
        match="--lr-wsd-decay-fraction is 0.5; allowed: what the 6 warm-up iterations",
    ):
        lrs(10, lr_decay_style="wsd", lr_warmup_iters=6, lr_wsd_decay_fraction=0.5)
