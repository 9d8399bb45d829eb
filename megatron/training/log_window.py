"""Accumulates losses, time and events of the steps between two log lines."""

from __future__ import annotations

from megatron.checkpoint.metadata import Position
from megatron.training.graceful_stop import StepConsensus


class LogWindow:
    """The steps since the last log line.

    Losses are means over the steps that were not skipped. If all were skipped they are means
    over those, so that a NaN is shown.
    """

    def __init__(self):
        self.steps = 0
        self.tokens = 0
        self.global_batch_size = 0
        """samples of the last step"""
        self.bad_steps = 0
        """skipped steps"""
        self.loss_spikes = 0
        self.seconds = 0.0
        """time of all steps on this rank"""
        self.lr = 0.0
        """learning rate of the last step"""
        self._lm_loss_sums = {True: 0.0, False: 0.0}
        """language-model losses, summed over skipped and over other steps"""
        self._aux_loss_sums = {True: 0.0, False: 0.0}

    def add(
        self, consensus: StepConsensus, step: Position, lr: float, seconds: float, skipped: bool
    ) -> None:
        """Add a step of this size."""
        self.steps += 1
        self.tokens += step.tokens
        self.global_batch_size = step.samples
        self.bad_steps += skipped
        self.seconds += seconds
        self.lr = lr
        self._lm_loss_sums[skipped] += consensus.lm_loss
        self._aux_loss_sums[skipped] += consensus.aux_loss

    def mean_lm_loss(self) -> float:
        return self._mean(self._lm_loss_sums)

    def mean_aux_loss(self) -> float:
        return self._mean(self._aux_loss_sums)

    def _mean(self, sums: dict[bool, float]) -> float:
        good_steps = self.steps - self.bad_steps
        if good_steps:
            return sums[False] / good_steps
        return sums[True] / self.bad_steps
