"""LRSchedule, value by value: formulas, edges, and the same rates in all units."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.checkpoint.metadata import Position, TrainingProgress
from megatron.config.optimizer import DECAY_STYLES, WSD_DECAY_STYLES, OptimizerConfig
from megatron.config.training import TrainConfig
from megatron.training.lr_schedule import LRSchedule
from megatron.training.plan import TrainingPlan

SEQ_LENGTH = 5


def plan_of(length: dict[str, int], batch: int = 2, done=None, ramp=()) -> TrainingPlan:
    """Plan a run on one rank whose samples have SEQ_LENGTH tokens."""
    train = TrainConfig(
        micro_batch_size=1, global_batch_size=batch, rampup_batch_size=ramp, **length
    )
    return TrainingPlan.of(train, SEQ_LENGTH, 1, done or TrainingProgress())


def run_rates(schedule: LRSchedule, plan: TrainingPlan, steps: int, done=None) -> list[float]:
    """Return the rates of the next steps, and advance `done`."""
    done = done or TrainingProgress()
    rates = []
    for _ in range(steps):
        step = plan.step_after(done)
        rates.append(schedule.lr(done.position, step))
        done.add_step(step)
    return rates


def lrs(iterations, steps=None, **options):
    """Return the rates of the first steps of a run by iterations, with a peak of 1.

    A step takes 2 samples of 5 tokens.
    """
    plan = plan_of({"train_iters": iterations})
    schedule = LRSchedule(OptimizerConfig(lr=1.0, **options), plan)
    return run_rates(schedule, plan, steps or iterations)


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
        (
            {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 2, "min_lr": 0.1},
            [0.5, 1, 1, math.sqrt(2 / 3), math.sqrt(2 / 4), 0.1],
        ),
        (
            {"lr_decay_style": "inverse-square-root", "min_lr": 0.6},
            [1, 1, math.sqrt(1 / 2), 0.6, 0.6, 0.6],
        ),
    ],
)
def test_schedule_has_the_expected_values(options, expected):
    assert lrs(4, 6, **options) == pytest.approx(expected)


def former_rate(i, *, warmup, end, style, fraction, lr, minimum):
    """Return the rate of iteration i in versions that knew iterations only."""
    if i < warmup:
        return lr * (i + 1) / warmup
    start = warmup
    if style == "wsd":
        start = end - round(fraction * end)
    if style == "constant" or i < start:
        return lr
    if i >= end:
        return minimum
    p = (i - start) / (end - start)
    shape = (1 + math.cos(math.pi * p)) / 2 if style == "cosine" else 1 - p
    return minimum + shape * (lr - minimum)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("unit", ["iters", "tokens"])
def test_rates_stay_bit_for_bit(style, unit):
    """Flags of earlier versions give the same bits, also in tokens of full steps."""
    scale = {"iters": 1, "tokens": 2 * SEQ_LENGTH}[unit]
    plan = plan_of({f"train_{unit}": 97 * scale})
    for warmup, end, fraction in [(0, 0, 0.2), (9, 0, 0.31), (7, 60, 0.5), (60, 60, 0.0)]:
        flags = {f"lr_warmup_{unit}": warmup * scale, f"lr_decay_{unit}": end * scale}
        optimizer = OptimizerConfig(
            lr=3e-4,
            min_lr=1.7e-5,
            lr_decay_style=style,
            # Of the iterations, the fraction is rounded.
            lr_wsd_decay_fraction=round(fraction * (end or 97)) / (end or 97),
            **flags,
        )
        expected = [
            former_rate(
                i,
                warmup=warmup,
                end=end or 97,
                style=style,
                fraction=fraction,
                lr=3e-4,
                minimum=1.7e-5,
            )
            for i in range(100)
        ]
        assert run_rates(LRSchedule(optimizer, plan), plan, 100) == expected


def megatron_rate(n, *, style, wsd_style, warmup, end, wsd, lr, minimum):
    """Return Megatron's rate after n samples, with counts in samples."""
    if warmup > 0 and n <= warmup:
        return lr * n / warmup
    if style == "constant":
        return lr
    if n > end:
        return minimum
    if style == "inverse-square-root":
        return max(minimum, lr * max(warmup, 1) ** 0.5 / max(n, 1) ** 0.5)
    p = (n - warmup) / (end - warmup)
    if style == "wsd":
        if n <= end - wsd:
            return lr
        p = (n - end + wsd) / wsd
        style = wsd_style
    shape = {
        "linear": 1 - p,
        "cosine": 0.5 * (math.cos(math.pi * p) + 1),
        "exponential": 2 * 0.5**p - 1,
        "minus_sqrt": 1 - math.sqrt(p),
    }[style]
    return minimum + shape * (lr - minimum)


@pytest.mark.parametrize("wsd_style", WSD_DECAY_STYLES)
@pytest.mark.parametrize("style", DECAY_STYLES)
@pytest.mark.parametrize(
    "warmup", [{}, {"lr_warmup_samples": 12}, {"lr_warmup_fraction": 0.07}]
)
def test_sample_schedule_has_megatrons_values(style, wsd_style, warmup):
    """At every sample up to the end of the decay and behind it, whatever the step's size."""
    plan = plan_of({"train_samples": 120})
    optimizer = OptimizerConfig(
        lr=0.5,
        min_lr=0.01,
        lr_decay_style=style,
        lr_wsd_decay_style=wsd_style,
        lr_wsd_decay_fraction=0.25,
        lr_decay_samples=100,
        **warmup,
    )
    schedule = LRSchedule(optimizer, plan)
    samples = warmup.get("lr_warmup_samples", 100 * warmup.get("lr_warmup_fraction", 0))
    for n in range(125):
        done = Position(n // 2, n, 7 * n)
        expected = megatron_rate(
            n,
            style=style,
            wsd_style=wsd_style,
            warmup=samples,
            end=100,
            wsd=25,
            lr=0.5,
            minimum=0.01,
        )
        for size in (1, 64):
            rate = schedule.lr(done, Position(1, size, 7 * size))
            assert rate == pytest.approx(expected, rel=1e-12, abs=1e-17), n


def test_sample_schedule_at_its_edges():
    optimizer = OptimizerConfig(
        lr=0.5, min_lr=0.1, lr_decay_style="linear", lr_warmup_samples=10, lr_decay_samples=30
    )
    schedule = LRSchedule(optimizer, plan_of({"train_samples": 40}))
    at = [schedule.lr(Position(0, n, 0), Position(1, 1, 1)) for n in (0, 1, 10, 20, 30, 31)]
    assert at == [0.0, 0.05, 0.5, pytest.approx(0.3), pytest.approx(0.1), 0.1]


UNITS = {"iters": 1, "samples": 2, "tokens": 2 * SEQ_LENGTH}


@pytest.mark.parametrize(
    ("length", "warmup", "decay"), list(itertools.product(UNITS, UNITS, UNITS))
)
@pytest.mark.parametrize("style", DECAY_STYLES)
def test_units_of_warmup_and_decay_agree(length, warmup, decay, style):
    """With steps of one size, the unit of the run, of the warm-up and of the decay is free.

    A warm-up in samples starts at 0, so it is a step behind.
    """
    expected = lrs(20, 22, lr_decay_style=style, lr_warmup_iters=4, lr_decay_iters=15)
    if warmup == "samples":
        expected[:4] = [0, 0.25, 0.5, 0.75]
    plan = plan_of({f"train_{length}": 20 * UNITS[length]})
    flags = {
        f"lr_warmup_{warmup}": 4 * UNITS[warmup],
        f"lr_decay_{decay}": 15 * UNITS[decay],
    }
    schedule = LRSchedule(OptimizerConfig(lr=1.0, lr_decay_style=style, **flags), plan)
    assert plan.iterations == 20
    assert run_rates(schedule, plan, 22) == pytest.approx(expected, rel=1e-12)


def test_warmup_fraction_is_of_the_decay():
    """As in Megatron, it is not of the run when the decay is shorter, and not rounded up."""
    expected = lrs(20, lr_warmup_iters=2, lr_decay_iters=10)
    assert lrs(20, lr_warmup_fraction=0.2, lr_decay_iters=10) == expected
    assert lrs(20, lr_warmup_fraction=0.2, lr_decay_tokens=100) == expected
    # 0.07 x 100 is 7.000000000000001 in floating point.
    assert lrs(100, lr_warmup_fraction=0.07) == lrs(100, lr_warmup_iters=7)


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("unit", ["samples", "tokens"])
@pytest.mark.parametrize("length_unit", ["iters", "samples", "tokens"])
def test_other_batch_does_not_move_rate(unit, batch, length_unit):
    """A run that decays over tokens keeps its rate of 0.5 when the batch changes half-way."""
    scale = {"samples": 1, "tokens": SEQ_LENGTH}[unit]
    optimizer = OptimizerConfig(
        lr=1.0, lr_decay_style="linear", **{f"lr_decay_{unit}": 80 * scale}
    )
    length = {f"train_{length_unit}": {"iters": 20, "samples": 80, "tokens": 400}[length_unit]}
    done = TrainingProgress()
    plan = plan_of(length, batch=4)
    run_rates(LRSchedule(optimizer, plan), plan, 10, done)
    plan = plan_of(length, batch, done)
    rates = run_rates(LRSchedule(optimizer, plan), plan, 2, done)
    assert rates == pytest.approx([0.5, 0.5 - batch / 80])


def test_mixed_units_remember_the_history():
    """A warm-up in iterations ended at 40 samples; a later batch does not move that."""
    optimizer = OptimizerConfig(
        lr=1.0, lr_decay_style="linear", lr_warmup_iters=10, lr_decay_samples=80
    )
    done = TrainingProgress()
    length = {"train_iters": 100}
    plan = plan_of(length, batch=4)
    assert run_rates(LRSchedule(optimizer, plan), plan, 12, done)[9:] == [1, 1, 0.9]
    plan = plan_of(length, batch=1, done=done)
    assert run_rates(LRSchedule(optimizer, plan), plan, 3, done) == pytest.approx(
        [0.8, 0.775, 0.75]
    )
    # Resumed again, from what state.json holds of the progress.
    saved = TrainingProgress.from_state({"progress": done.to_state()})
    plan = plan_of(length, batch=16, done=saved)
    assert run_rates(LRSchedule(optimizer, plan), plan, 2, saved) == pytest.approx(
        [0.725, 0.325]
    )


def test_mixed_units_during_batch_rampup():
    """Steps of 2, 2, 4, 6, 8, ... samples: a warm-up of 4 iterations ends at 14 samples."""
    plan = plan_of({"train_iters": 10}, batch=8, ramp=(2, 2, 12))
    sizes = []
    done = TrainingProgress()
    while done.iteration < plan.iterations:
        step = plan.step_after(done)
        sizes.append(step.samples)
        done.add_step(step)
    assert sizes == [2, 2, 4, 6, 8, 8, 8, 8, 8, 8]
    optimizer = OptimizerConfig(
        lr=1.0, lr_decay_style="linear", lr_warmup_iters=4, lr_decay_tokens=60 * SEQ_LENGTH
    )
    consumed = [0, 2, 4, 8, 14, 22, 30, 38, 46, 54]
    expected = [0.25, 0.5, 0.75, 1.0, *[(60 - n) / 46 for n in consumed[4:]]]
    assert run_rates(LRSchedule(optimizer, plan), plan, 10) == pytest.approx(expected)
    optimizer = OptimizerConfig(
        lr=1.0, lr_decay_style="linear", lr_warmup_tokens=8 * SEQ_LENGTH
    )
    expected = [0.25, 0.5, 1.0, *[(10 - i) / 7 for i in range(3, 10)]]
    assert run_rates(LRSchedule(optimizer, plan), plan, 10) == pytest.approx(expected)


def test_schedule_of_the_reference_recipe():
    rates = lrs(60_000, lr_warmup_fraction=0.1, min_lr=0.01)
    assert rates[0] == 1 / 6000 and rates[5999] == rates[6000] == 1.0
    assert rates[33_000] == pytest.approx(0.505)
    assert rates[-1] == pytest.approx(0.01, abs=1e-6)


@given(
    st.sampled_from(DECAY_STYLES),
    st.sampled_from(WSD_DECAY_STYLES),
    st.integers(1, 50),
    st.integers(0, 50),
    st.floats(0, 0.5),
)
def test_schedule_rises_then_falls(style, wsd_style, decay, warmup, fraction):
    """It is positive at every step and monotone on both sides of the peak."""
    options = {
        "lr_decay_style": style,
        "lr_warmup_iters": min(warmup, decay) // 2,
        "lr_wsd_decay_fraction": fraction,
        "lr_wsd_decay_style": wsd_style,
    }
    rates = lrs(decay, decay + 3, **options)
    peak = rates.index(1.0)
    assert all(0 < rate <= 1 for rate in rates[:decay])
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[decay + 1 :] == [1.0 if style == "constant" else 0.0] * 2


def test_schedule_has_no_state():
    schedule = LRSchedule(OptimizerConfig(lr_warmup_iters=5), plan_of({"train_iters": 20}))
    positions = [Position(i, 2 * i, 10 * i) for i in range(20)]
    step = Position(1, 2, 10)
    forward = [schedule.lr(position, step) for position in positions]
    assert [schedule.lr(position, step) for position in positions[::-1]] == forward[::-1]


def test_warmup_may_not_exceed_decay():
    """The message names the flags that are in use, and the warm-up in the decay's unit."""
    with pytest.raises(
        ValueError,
        match="^--lr-warmup-iters is 11 iterations; allowed: at most the 10 iterations of "
        "--train-iters, of which the warm-up is a part. Lower --lr-warmup-iters or raise "
        "--train-iters$",
    ):
        lrs(10, lr_warmup_iters=11)
    with pytest.raises(
        ValueError,
        match="^--lr-warmup-tokens is 60 tokens, or 6 iterations; allowed: at most the 5 "
        "iterations of --lr-decay-iters, .* or raise --lr-decay-iters$",
    ):
        lrs(10, lr_warmup_tokens=60, lr_decay_iters=5)
    with pytest.raises(
        ValueError,
        match="^--lr-warmup-iters is 6 iterations, or 12 samples; allowed: at most the 11 "
        "samples of --lr-decay-samples, ",
    ):
        lrs(10, lr_warmup_iters=6, lr_decay_samples=11)
    with pytest.raises(
        ValueError,
        match="^--lr-warmup-samples is 12 samples, or 60 tokens; allowed: at most the 50 "
        "tokens of --train-tokens, .* Lower --lr-warmup-samples or raise --train-tokens$",
    ):
        LRSchedule(OptimizerConfig(lr_warmup_samples=12), plan_of({"train_tokens": 50}))
    assert lrs(10, lr_warmup_iters=10)[-1] == 1.0


def test_wsd_fits_warmup_and_decay():
    with pytest.raises(
        ValueError,
        match="--lr-wsd-decay-fraction is 0.5; allowed: what the 6 warm-up iterations",
    ):
        lrs(10, lr_decay_style="wsd", lr_warmup_iters=6, lr_wsd_decay_fraction=0.5)
