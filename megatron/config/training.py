"""Config section `train`: batch sizes, length of the run, evaluation and logging intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron.config.batch_size import BatchSchedule
from megatron.config.fields import (
    option,
    require,
    require_at_most_one,
    require_not_negative,
    require_positive_integers,
    require_setting,
)
from megatron.config.needs import TRAINING, setting

LENGTH_FIELDS = {
    "iterations": "train_iters",
    "samples": "train_samples",
    "tokens": "train_tokens",
}
"""Units in which a position in a run is measured, and the field of the run's length in each"""


class RunLength(NamedTuple):
    """Length of a run in the unit that it was given in."""

    unit: str
    """a key of LENGTH_FIELDS"""
    total: int

    @property
    def field(self) -> str:
        """Name of the field of TrainConfig that set the length."""
        return LENGTH_FIELDS[self.unit]


@dataclass(frozen=True)
class TrainConfig:
    """Batch sizes, length of the run, and how often it evaluates and logs."""

    micro_batch_size: int = 4
    """samples per forward pass on one rank"""
    global_batch_size: int = 0
    """samples per optimizer step over all ranks; 0: micro-batch size x ranks"""
    rampup_batch_size: tuple[int, ...] = option(())
    """START INCREMENT SAMPLES: the global batch starts at START samples and grows by INCREMENT
    at equal intervals, to --global-batch-size after SAMPLES samples; none: constant"""
    train_iters: int = option(0, needs=TRAINING)
    """optimizer steps to train for; alternative to --train-samples and --train-tokens"""
    train_samples: int = option(0, needs=TRAINING)
    """samples to train on, of which an incomplete last global batch is left out; alternative
    to --train-iters and --train-tokens"""
    train_tokens: int = option(0, needs=TRAINING)
    """tokens to train on, rounded up to a full step; alternative to --train-iters and
    --train-samples"""
    seed: int = 1234
    """random seed of weight initialisation, data order and dropout"""
    eval_interval: int = option(1000, needs=(TRAINING, setting("eval_iters")))
    """optimizer steps between evaluations on the validation split; 0: only at the start and
    the end of the run"""
    eval_iters: int = 10
    """batches of the global batch size per evaluation; 0: no evaluation"""
    skip_train: bool = option(False, needs=setting("load") | setting("init_from_hf"))
    """only evaluate the checkpoint of --load, or the model of --init-from-hf, on the validation
    and test sets"""
    log_interval: int = option(10, needs=TRAINING)
    """optimizer steps between log lines"""
    recompute_activations: bool = False
    """activation recomputation: store only the input of each block and run its forward pass
    again during the backward pass"""

    def __post_init__(self):
        require_positive_integers(self, "micro_batch_size", "log_interval")
        require_not_negative(
            self,
            "global_batch_size",
            "train_iters",
            "train_samples",
            "train_tokens",
            "eval_interval",
            "eval_iters",
        )
        require_at_most_one(self, *LENGTH_FIELDS.values())
        require_setting(
            self,
            "eval_iters",
            not (self.skip_train and self.eval_iters == 0),
            "a positive integer with --skip-train, which only evaluates",
        )
        if self.rampup_batch_size:
            self._check_rampup()

    def _check_rampup(self) -> None:
        """Raise ValueError if the ramp-up is not one, or does not lead to the global batch."""
        ramp = self.rampup_batch_size
        require_setting(
            self,
            "rampup_batch_size",
            len(ramp) == 3 and min(ramp) > 0,
            "three positive integers: the samples of the first step, by how many they grow, and "
            "the samples that the ramp-up takes",
        )
        if self.global_batch_size:
            self._check_rampup_end(self.global_batch_size)

    def _check_rampup_end(self, global_batch: int) -> None:
        start, increment, _ = self.rampup_batch_size
        require_setting(
            self,
            "rampup_batch_size",
            start < global_batch and (global_batch - start) % increment == 0,
            f"a first batch below the global batch of {global_batch} samples, and an increment "
            "that divides the difference",
        )

    def global_batch(self, world_size: int) -> int:
        """Return the number of samples per optimizer step.

        Raises:
            ValueError: the global batch is not a multiple of micro-batch size x ranks.
        """
        step = self.micro_batch_size * world_size
        size = self.global_batch_size or step
        require(
            size % step == 0,
            "--global-batch-size",
            size,
            f"a multiple of --micro-batch-size {self.micro_batch_size} x {world_size} ranks",
        )
        return size

    def batch_schedule(self, world_size: int) -> BatchSchedule:
        """Return the number of samples of each optimizer step.

        Raises:
            ValueError: a batch is not a multiple of micro-batch size x ranks, or the ramp-up
                does not lead to the global batch.
        """
        final = self.global_batch(world_size)
        if not self.rampup_batch_size:
            return BatchSchedule(final)
        self._check_rampup_end(final)
        start, increment, samples = self.rampup_batch_size
        step = self.micro_batch_size * world_size
        require_setting(
            self,
            "rampup_batch_size",
            start % step == 0 and increment % step == 0,
            f"a first batch and an increment that are multiples of --micro-batch-size "
            f"{self.micro_batch_size} x {world_size} ranks",
        )
        return BatchSchedule(final, start, increment, samples)

    @property
    def length(self) -> RunLength | None:
        """Length of the run in the unit that it was given in; None if it was not given."""
        for unit, name in LENGTH_FIELDS.items():
            if getattr(self, name):
                return RunLength(unit, getattr(self, name))
        return None
