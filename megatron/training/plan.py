"""Sizes of a training run: how many iterations, of how many samples and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.checkpoint.metadata import TrainingProgress
from megatron.config.schema import TrainConfig


@dataclass(frozen=True)
class TrainingPlan:
    """Sizes of a run."""

    iterations: int
    """optimizer steps at the end of the schedule, including those before a resume"""
    global_batch: int
    """samples of one optimizer step, over all ranks"""
    micro_steps: int
    """micro-batches of one optimizer step on one rank"""
    seq_length: int

    @staticmethod
    def of(
        train: TrainConfig, seq_length: int, world_size: int, done: TrainingProgress
    ) -> TrainingPlan:
        """Return the plan of a run that has progressed to `done`, perhaps with another batch.

        Raises:
            ValueError: the global batch is not a multiple of micro-batch x ranks, or neither
                --train-iters nor --train-tokens is set.
        """
        batch = train.global_batch(world_size)
        if train.train_tokens:
            tokens_left = max(0, train.train_tokens - done.consumed_tokens)
            iterations = done.iteration + -(-tokens_left // (batch * seq_length))
        else:
            iterations = train.iterations(seq_length, world_size)
        micro_steps = batch // (train.micro_batch_size * world_size)
        return TrainingPlan(iterations, batch, micro_steps, seq_length)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_length

    @property
    def samples(self) -> int:
        """Samples of the full schedule."""
        return self.iterations * self.global_batch
