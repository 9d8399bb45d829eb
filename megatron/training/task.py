"""What is trained: where the micro-batches come from, and what their loss is.

A task is the only thing that differs between pretraining and the kinds of post-training; the
Trainer and the Engine are the same for all of them. `pretrain.train(config, build_task=...)`
trains another task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.batch_size import BatchSchedule
from megatron.config.schema import DataConfig, TrainConfig
from megatron.data.loader import Batch, BatchLoader, DataParallelShard
from megatron.data.sampling.blend import Samples
from megatron.model.gpt import target_mask
from megatron.parallel.groups import Groups
from megatron.tokenizer.base import Tokenizer
from megatron.training.plan import TrainingPlan

LM_LOSS = "lm_loss"
"""Term that is logged as `loss`, watched for spikes and evaluated."""
AUX_LOSS = "aux_loss"
"""Term of the gates' auxiliary losses."""


class Task(ABC):
    """Gives the Trainer its micro-batches, and the Engine the loss terms of one micro-batch.

    Each loss term is a sum and a normalizer; see `megatron.engine.loss`. Every task has the
    terms LM_LOSS and AUX_LOSS. A micro-batch is any object with a method `to(device)`.
    """

    @abstractmethod
    def train_batches(self, consumed_samples: int) -> Iterable[Any]:
        """Return this rank's training micro-batches, continuing after `consumed_samples`.

        Each step takes as many as `plan.micro_steps_after` says; too few are an error.
        """

    @abstractmethod
    def eval_splits(self) -> list[str]:
        """Return the names of the splits to evaluate on, in this order.

        They are "valid", "valid/NAME" for each named validation set, and "test", or some of
        them.
        """

    @abstractmethod
    def eval_batches(self, split: str) -> Iterable[Any]:
        """Return this rank's micro-batches of one evaluation, the same ones every time."""

    @abstractmethod
    def normalizers(self, batch: Any) -> Mapping[str, Tensor]:
        """Return what each term's sum is divided by, 0-d, from the batch alone."""

    @abstractmethod
    def loss_sums(self, model: nn.Module, batch: Any, progress: float) -> Mapping[str, Tensor]:
        """Return each term's sum over the micro-batch, 0-d and differentiable."""


class NextTokenLoss:
    """The loss of next-token prediction, for tasks whose micro-batches are `Batch` records.

    The cross-entropy is summed over the loss mask and divided by the number of target tokens of
    the global batch. The auxiliary loss is averaged over micro-batches and ranks that have
    tokens: those of padding only do not count.
    """

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        mask_BS = target_mask(batch.labels_BS, batch.loss_mask_BS, batch.padding_BS)
        num_target_tokens = mask_BS.sum()
        has_tokens = torch.ones_like(num_target_tokens)
        if batch.padding_BS is not None:
            has_tokens = _has_tokens(batch.padding_BS)
        return {LM_LOSS: num_target_tokens, AUX_LOSS: has_tokens}

    def loss_sums(self, model: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        out = model(
            tokens_BS=batch.tokens_BS,
            labels_BS=batch.labels_BS,
            loss_mask_BS=batch.loss_mask_BS,
            position_ids_BS=batch.position_ids_BS,
            segments_BS=batch.segments_BS,
            padding_BS=batch.padding_BS,
            progress=progress,
        )
        aux_loss = out.aux_loss
        if batch.padding_BS is not None:  # losses of weights alone are not 0 without tokens
            aux_loss = aux_loss * _has_tokens(batch.padding_BS)
        return {LM_LOSS: out.lm_loss_sum, AUX_LOSS: aux_loss}


def _has_tokens(padding_BS: Tensor) -> Tensor:
    """Return 1.0 if a position is not padding, else 0.0, without waiting for the device."""
    return padding_BS.logical_not().any().float()


class PretrainingTask(NextTokenLoss, Task):
    """Next-token prediction on the samples of a run.

    Args:
        data: what batches are made of besides tokens, such as document masks.
        train: sizes of micro-batches and evaluations.
        plan: sizes of the run.
        tokenizer: its end-of-document id separates documents.
        vocab_size: token ids from here on are an error.
        splits: samples by split; None for a split that the run does not have.
        groups: this rank's place among the data-parallel ranks.
    """

    def __init__(
        self,
        data: DataConfig,
        train: TrainConfig,
        plan: TrainingPlan,
        tokenizer: Tokenizer,
        vocab_size: int,
        splits: Mapping[str, Samples | None],
        groups: Groups,
    ):
        self.data = data
        self.train = train
        self.plan = plan
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.splits = splits
        self.groups = groups

    def train_batches(self, consumed_samples: int) -> Iterable[Batch]:
        return self._loader("train", consumed_samples, self.plan.batches)

    def eval_splits(self) -> list[str]:
        return [
            name
            for name, samples in self.splits.items()
            if name != "train" and samples is not None
        ]

    def eval_batches(self, split: str) -> Iterable[Batch]:
        num_batches = self.train.eval_iters * self.plan.micro_steps
        return islice(self._loader(split, consumed_samples=0), num_batches)

    def _loader(
        self, split: str, consumed_samples: int, rampup: BatchSchedule | None = None
    ) -> BatchLoader:
        shard = DataParallelShard(
            micro_batch_size=self.train.micro_batch_size,
            global_batch_size=self.plan.global_batch,
            rank=self.groups.rank,
            world_size=self.groups.world_size,
            rampup=rampup,
        )
        return BatchLoader(
            self.splits[split],
            shard,
            consumed_samples=consumed_samples,
            data=self.data,
            eod=self.tokenizer.eod,
            vocab_size=self.vocab_size,
        )
