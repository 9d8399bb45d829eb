"""TrainingPlan: where a run ends, in all units, also resumed with another batch."""

from __future__ import annotations

import itertools

import pytest

from megatron.checkpoint.metadata import Position, TrainingProgress
from megatron.config.schema import TrainConfig
from megatron.training.plan import TrainingPlan
from megatron.training.timeline import Timeline

SEQ_LENGTH = 32


def plan_of(done=None, built_samples=0, world_size=1, **train) -> TrainingPlan:
    config = TrainConfig(micro_batch_size=2, **train)
    done = done or TrainingProgress()
    return TrainingPlan.of(config, SEQ_LENGTH, world_size, done, built_samples)


def advance(plan: TrainingPlan, done: TrainingProgress, steps: int) -> list[Position]:
    """Take steps of a plan. Returns the positions after them."""
    positions = []
    for _ in range(steps):
        done.add_step(plan.step_after(done))
        positions.append(done.position)
    return positions


@pytest.mark.parametrize(
    "train, done, iterations",
    [
        (TrainConfig(train_iters=7), TrainingProgress(3, 12, 384), 7),
        (TrainConfig(micro_batch_size=2, train_tokens=2560), TrainingProgress(), 20),
        (TrainConfig(micro_batch_size=2, train_tokens=2561), TrainingProgress(), 21),
        (
            TrainConfig(micro_batch_size=2, train_tokens=2560),
            TrainingProgress(10, 40, 1280),
            20,
        ),
        (
            TrainConfig(micro_batch_size=2, global_batch_size=8, train_tokens=2560),
            TrainingProgress(10, 40, 1280),
            15,
        ),
        (
            TrainConfig(micro_batch_size=2, train_tokens=2560),
            TrainingProgress(20, 80, 2560),
            20,
        ),
    ],
)
def test_plan_counts_remaining_tokens(train, done, iterations):
    """Two ranks, 32 tokens per sample: 128 tokens per step, 256 after the batch doubled."""
    assert TrainingPlan.of(train, 32, 2, done).iterations == iterations


@pytest.mark.parametrize(
    ("samples", "iterations"), [(8, 1), (15, 1), (16, 2), (40, 5), (47, 5)]
)
def test_incomplete_last_batch_is_left_out(samples, iterations):
    plan = plan_of(train_samples=samples, global_batch_size=8)
    assert plan.iterations == iterations
    assert plan.built_samples == plan.end.samples == 8 * iterations <= samples


LENGTHS = {
    "train_iters": lambda at, total: at.iterations >= total,
    "train_samples": lambda at, total: at.samples + at.next_batch > total,
    "train_tokens": lambda at, total: at.tokens >= total,
}
"""Whether a run has reached its length, as a loop over steps finds it"""


class Steps:
    """Positions of a run, counted step by step."""

    def __init__(self):
        self.iterations = self.samples = self.tokens = self.next_batch = 0

    def run(self, batch_after, name: str, total: int, limit: int = 10**6) -> None:
        """Take steps until the length is reached or the iteration is."""
        self.next_batch = batch_after(self.samples)
        while not LENGTHS[name](self, total) and self.iterations < limit:
            self.iterations += 1
            self.samples += self.next_batch
            self.tokens += self.next_batch * SEQ_LENGTH
            self.next_batch = batch_after(self.samples)


RAMP = (4, 4, 60)


def ramped(samples: int) -> int:
    """Return the batch of RAMP, which leads to 16 in three increments."""
    return 16 if samples > 60 else 4 + 4 * (samples // 20)


@pytest.mark.parametrize("name, total", [("train_iters", 41), ("train_samples", 321)])
@pytest.mark.parametrize("name_total_in_tokens", [False, True])
@pytest.mark.parametrize("first", [8, 16, "ramp"])
@pytest.mark.parametrize("second", [4, 16, "ramp"])
@pytest.mark.parametrize("stopped_at", [0, 3, 11])
def test_resumed_plan_equals_a_step_loop(
    name, total, name_total_in_tokens, first, second, stopped_at
):
    """Every combination of the length's unit, the batch before and after, and the stop."""
    if name_total_in_tokens:
        name = "train_tokens"
        total *= SEQ_LENGTH
    flags = {
        4: {"global_batch_size": 4},
        8: {"global_batch_size": 8},
        16: {"global_batch_size": 16},
        "ramp": {"global_batch_size": 16, "rampup_batch_size": RAMP},
    }
    rules = {size: (lambda samples, size=size: size) for size in (4, 8, 16)}
    rules["ramp"] = ramped
    done = TrainingProgress()
    plan = plan_of(**flags[first], **{name: total})
    advance(plan, done, min(stopped_at, plan.iterations))
    plan = plan_of(done, **flags[second], **{name: total})
    expected = Steps()
    expected.run(rules[first], name, total, limit=stopped_at)
    assert done.position == (expected.iterations, expected.samples, expected.tokens)
    expected.run(rules[second], name, total)
    assert plan.end == (expected.iterations, expected.samples, expected.tokens)
    positions = advance(plan, done, plan.iterations - done.iteration)
    assert positions[-1] == plan.end if positions else done.position == plan.end
    assert plan.built_samples == expected.samples


def test_timeline_converts_as_a_step_loop():
    """Values are rounded up, and those of a run's steps are exact, in the past and the plan."""
    done = TrainingProgress()
    positions = [Position(0, 0, 0)]
    positions += advance(plan_of(global_batch_size=6, train_iters=99), done, 5)
    positions += advance(plan_of(done, global_batch_size=2, train_iters=99), done, 4)
    plan = plan_of(done, global_batch_size=16, rampup_batch_size=RAMP, train_iters=99)
    timeline = plan.timeline
    positions += advance(plan, done, 20)
    for unit, to in itertools.permutations(Position._fields, 2):
        for at in positions:
            assert timeline.convert(getattr(at, unit), unit, to) == getattr(at, to)
    for n in range(1, done.consumed_samples):
        (iterations,) = {at.iterations for at in positions if at.samples >= n}.intersection(
            {1 + at.iterations for at in positions if at.samples < n}
        )
        assert timeline.convert(n, "samples", "iterations") == iterations
        assert timeline.convert(n * SEQ_LENGTH - 1, "tokens", "samples") == n
    assert timeline.convert(7, "samples", "samples") == 7
    assert timeline == Timeline.of(
        TrainingProgress(9, 38, 38 * SEQ_LENGTH, [Position(5, 30, 30 * SEQ_LENGTH)]),
        plan.batches,
        SEQ_LENGTH,
    )


def test_progress_records_changes_of_batch():
    done = TrainingProgress()
    for samples, tokens in [(4, 8), (4, 8), (2, 4), (2, 4), (2, 6), (4, 12)]:
        done.add_step(Position(1, samples, tokens))
    assert done.batch_changes == [(2, 8, 16), (4, 12, 24), (5, 14, 30)]
    assert done.position == (6, 18, 42)
    assert TrainingProgress.from_state({"progress": done.to_state()}) == done


@pytest.mark.parametrize("batch", [2, 8, 16])
@pytest.mark.parametrize(
    "length", [{"train_iters": 20}, {"train_samples": 160}, {"train_tokens": 160 * 32}]
)
def test_other_batch_does_not_move_progress(length, batch):
    """Half of the run is done before and after the batch changes, in the unit of its length."""
    done = TrainingProgress()
    plan = plan_of(global_batch_size=8, **length)
    advance(plan, done, 10)
    assert plan.fraction_done(done) == 0.5
    plan = plan_of(done, global_batch_size=batch, world_size=batch // 2, **length)
    assert plan.fraction_done(done) == 0.5
    advance(plan, done, plan.iterations - 10)
    assert plan.fraction_done(done) == 1.0


def test_progress_is_at_most_one():
    done = TrainingProgress()
    plan = plan_of(train_tokens=100, global_batch_size=4)
    advance(plan, done, 1)
    assert done.consumed_tokens == 128
    assert plan.fraction_done(done) == 1.0
    assert plan.amount_done(done) == 100


def test_data_of_longer_plan_are_kept():
    """A resumed run that needs fewer samples than its data have keeps their order."""
    done = TrainingProgress(10, 80, 80 * SEQ_LENGTH)
    assert plan_of(done, 160, train_iters=20, global_batch_size=4).built_samples == 160
    assert plan_of(done, 160, train_iters=20, global_batch_size=16).built_samples == 240


@pytest.mark.parametrize(
    "train, message",
    [
        (
            {},
            "--train-iters is 0; allowed: a positive integer. Or set --train-samples or --train-",
        ),
        (
            {"train_samples": 7, "global_batch_size": 8},
            "--train-samples is 7; allowed: at least the 8 samples of the first step",
        ),
        (
            {"train_iters": 9, "rampup_batch_size": (2, 2, 9), "global_batch_size": 8},
            r"--rampup-batch-size is \[2, 2, 9\]; allowed: a first batch and an increment that are "
            "multiples of --micro-batch-size 2 x 2 ranks",
        ),
        (
            {"train_iters": 9, "rampup_batch_size": (4, 4, 9)},
            r"--rampup-batch-size is \[4, 4, 9\]; allowed: a first batch below the global batch of "
            "4 samples",
        ),
    ],
)
def test_impossible_plans_are_refused(train, message):
    with pytest.raises(ValueError, match=message):
        plan_of(world_size=2, **train)
