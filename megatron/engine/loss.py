"""The seam between a training task and the engine: losses as sums and normalizers.

A step's loss is, for every term, the sum over all micro-batches and ranks divided by the sum
of the normalizers. Micro-batches with different numbers of target tokens then count by their
tokens, and a global batch of 8 gives the same step as 1 x 8, 2 x 4 or 8 x 1 micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.model.gpt import at_least_one
from megatron.parallel.groups import Groups, all_reduce_sum


class LossFunction(Protocol):
    """Computes the loss terms of one micro-batch. A training task is one."""

    def normalizers(self, batch: Any) -> Mapping[str, Tensor]:
        """Return what each term's sum is divided by, 0-d, from the batch alone.

        It must be known before the forward pass: the backward pass of the first micro-batch
        needs the normalizers of all.
        """

    def loss_sums(self, model: nn.Module, batch: Any, progress: float) -> Mapping[str, Tensor]:
        """Return each term's sum over the micro-batch, 0-d and differentiable."""


def term_weights(
    normalizers: Sequence[Mapping[str, Tensor]], groups: Groups
) -> list[dict[str, Tensor]]:
    """Return the weight of each micro-batch's mean in the mean over all micro-batches and ranks.

    With n_i the normalizer of micro-batch i, M micro-batches on each of W ranks and N the sum
    of all M x W normalizers, the weight is n_i M W / N: exactly 1 when all are equal. The
    average over micro-batches and ranks of weight x (sum / n_i) is then sum of sums / N, which
    is what gradient accumulation and data-parallel averaging compute.

    Args:
        normalizers: of each micro-batch of this rank, by term. All ranks have as many.
        groups: the ranks that average their gradients. One all-reduce.

    Returns:
        For each micro-batch, 0-d fp32 tensors by term; 0 for a term without any target.
    """
    names = list(normalizers[0])
    rows = torch.stack([torch.stack(list(n.values())) for n in normalizers]).double()
    totals = all_reduce_sum(rows.sum(0), groups)
    num_micro_batches = len(normalizers) * groups.world_size
    weights = rows * num_micro_batches / at_least_one(totals)
    return [dict(zip(names, row.float(), strict=True)) for row in weights]


def means(sums: Mapping[str, Tensor], normalizers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each term's mean over a micro-batch; 0 where its normalizer is 0."""
    return {name: loss_sum / at_least_one(normalizers[name]) for name, loss_sum in sums.items()}


class SumsByTerm:
    """Sums and normalizers of an evaluation, added up over its micro-batches and ranks.

    They are added in fp64, so that the result does not depend on how the samples were
    divided over micro-batches and ranks.
    """

    def __init__(self, groups: Groups):
        self._groups = groups
        self._rows: dict[str, Tensor] = {}
        """by term, fp64 [2]: the sum and the normalizer"""

    def add(self, sums: Mapping[str, Tensor], normalizers: Mapping[str, Tensor]) -> None:
        """Add a micro-batch."""
        for name, loss_sum in sums.items():
            row = torch.stack([loss_sum.double(), normalizers[name].double()])
            self._rows[name] = self._rows.get(name, 0) + row

    def means_over_ranks(self) -> dict[str, float]:
        """Return the mean of each term over all ranks; NaN where its normalizer is 0.

        All ranks call it, with the same terms. One all-reduce.

        Raises:
            ValueError: nothing was added.
        """
        if not self._rows:
            raise ValueError(
                "the task gave no micro-batch of an evaluation; allowed: one or more on each rank"
            )
        totals = all_reduce_sum(torch.stack(list(self._rows.values())), self._groups)
        results = {}
        for name, (total, normalizer) in zip(self._rows, totals.tolist(), strict=True):
            results[name] = total / normalizer if normalizer else math.nan
        return results
