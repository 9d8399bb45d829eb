"""Sizes of a training run: its length, and how many samples and micro-batches a step has."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.checkpoint.metadata import Position, TrainingProgress
from megatron.config.batch_size import BatchSchedule
from megatron.config.fields import flag_name, require, require_setting
from megatron.config.schema import TrainConfig
from megatron.config.training import RunLength
from megatron.training.timeline import Timeline


@dataclass(frozen=True)
class TrainingPlan:
    """Sizes of a run.

    The progress of a run is measured in the unit of its length, from what was really consumed:
    resuming with another batch or number of ranks does not move it.
    """

    length: RunLength
    """length in the unit that it was given in"""
    end: Position
    """where the run ends: --train-samples rounded down to a step, as in Megatron, or
    --train-tokens rounded up to one"""
    batches: BatchSchedule
    """samples of each optimizer step, over all ranks"""
    micro_step_size: int
    """samples of one micro-batch, over all ranks"""
    seq_length: int
    timeline: Timeline
    built_samples: int
    """training samples that the data are built for, at least `end.samples`: their order
    depends on it, so a resumed run that needs fewer keeps the number of the checkpoint's"""

    @staticmethod
    def of(
        train: TrainConfig,
        seq_length: int,
        world_size: int,
        done: TrainingProgress,
        built_samples: int = 0,
    ) -> TrainingPlan:
        """Return the plan of a run that has progressed to `done`, perhaps with another batch.

        Args:
            built_samples: training samples that the data of the run so far were built for.

        Raises:
            ValueError: a batch is not a multiple of micro-batch x ranks, the length is shorter
                than a step, or none of --train-iters, --train-samples, --train-tokens is set.
        """
        length = train.length
        if length is None:
            advice = "Or set --train-samples or --train-tokens."
            require_setting(train, "train_iters", False, "a positive integer", advice)
        batches = train.batch_schedule(world_size)
        timeline = Timeline.of(done, batches, seq_length)
        end = _end(length, timeline)
        require(
            end.iterations > 0,
            flag_name(length.field),
            length.total,
            f"at least the {batches.at(0)} samples of the first step",
        )
        return TrainingPlan(
            length=length,
            end=end,
            batches=batches,
            micro_step_size=train.micro_batch_size * world_size,
            seq_length=seq_length,
            timeline=timeline,
            built_samples=max(end.samples, built_samples),
        )

    @property
    def iterations(self) -> int:
        """Optimizer steps at the end of the run, including those before a resume."""
        return self.end.iterations

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step, over all ranks, after the ramp-up."""
        return self.batches.final

    @property
    def micro_steps(self) -> int:
        """Micro-batches of one optimizer step on one rank, after the ramp-up."""
        return self.global_batch // self.micro_step_size

    def step_after(self, done: TrainingProgress) -> Position:
        """Return the size of the step that follows."""
        samples = self.batches.at(done.consumed_samples)
        return Position(1, samples, samples * self.seq_length)

    def micro_steps_after(self, done: TrainingProgress) -> int:
        """Return the number of micro-batches on one rank of the step that follows."""
        return self.step_after(done).samples // self.micro_step_size

    def amount_done(self, done: TrainingProgress) -> int:
        """Return the progress in the unit of the run's length, at most all of it."""
        return min(getattr(done.position, self.length.unit), self.length.total)

    def fraction_done(self, done: TrainingProgress) -> float:
        """Return the completed share of the run's length."""
        return self.amount_done(done) / self.length.total


def _end(length: RunLength, timeline: Timeline) -> Position:
    """Return the position at which a run of this length ends, between two steps."""
    if length.unit == "samples":
        # The last step that does not exceed the length precedes the first one that does.
        iterations = timeline.convert(length.total + 1, "samples", "iterations") - 1
    else:
        iterations = timeline.convert(length.total, length.unit, "iterations")
    samples = timeline.convert(iterations, "iterations", "samples")
    tokens = timeline.convert(iterations, "iterations", "tokens")
    return Position(iterations, samples, tokens)
