"""Config section `train`: batch sizes, length of the run, evaluation and logging intervals."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    require,
    require_not_negative,
    require_positive_integers,
    require_setting,
)


@dataclass(frozen=True)
class TrainConfig:
    """Batch sizes, length of the run, and how often it evaluates and logs."""

    micro_batch_size: int = 4
    """samples per forward pass on one rank"""
    global_batch_size: int = 0
    """samples per optimizer step over all ranks; 0: micro-batch size x ranks"""
    train_iters: int = 0
    """optimizer steps to train for; alternative to --train-tokens"""
    train_tokens: int = 0
    """tokens to train on; alternative to --train-iters"""
    seed: int = 1234
    """random seed of weight initialisation, data order and dropout"""
    eval_interval: int = 1000
    """optimizer steps between evaluations on the validation split; 0: only at the start and
    the end of the run"""
    eval_iters: int = 10
    """batches of the global batch size per evaluation; 0: no evaluation"""
    log_interval: int = 10
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
            "train_tokens",
            "eval_interval",
            "eval_iters",
        )
        require_setting(
            self,
            "train_tokens",
            not (self.train_iters and self.train_tokens),
            "only without --train-iters",
            "Use one of the two.",
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

    def iterations(self, seq_length: int, world_size: int) -> int:
        """Return the number of optimizer steps of the complete run.

        Raises:
            ValueError: neither --train-iters nor --train-tokens is set.
        """
        require_setting(
            self,
            "train_iters",
            bool(self.train_iters or self.train_tokens),
            "a positive integer",
            "Or set --train-tokens.",
        )
        if self.train_iters:
            return self.train_iters
        tokens_per_step = self.global_batch(world_size) * seq_length
        return -(-self.train_tokens // tokens_per_step)
