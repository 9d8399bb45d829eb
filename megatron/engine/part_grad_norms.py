"""Gradient norms of the parts of the model, at any ZeRO stage (DeepSpeed 0.19.8).

DeepSpeed frees the gradients within its step. They are read where torch's optimizer gets
them: complete, averaged over ranks and micro-batches, in fp32, unscaled, and clipped. ZeRO
calls the optimizer once per parameter group or sub-group, so the squares add up over calls.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron.engine.zero_shards import GlobalLayout, TensorShard, ZeroShards
from megatron.log import warn_on_rank0
from megatron.model.parameter_count import MODEL_PARTS, part_of
from megatron.parallel.groups import Groups, all_reduce_sum

_PARTS = tuple(MODEL_PARTS)


class PartGradNorms:
    """Measures the gradient norm of each part of the model in single optimizer steps.

    Args:
        optimizer: torch's optimizer, which DeepSpeed's engine calls.
        deepspeed_engine: DeepSpeed's engine.
        layout: layout of its model.
        groups: the data-parallel ranks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        deepspeed_engine: Any,
        layout: GlobalLayout,
        groups: Groups,
    ):
        self._engine = deepspeed_engine
        self._layout = layout
        self._groups = groups
        self._is_measuring = False
        self._is_supported = True
        self._squares: Tensor | None = None
        """fp64 [parts], sums of squares of this rank's shards; None: no step was measured"""
        self._shards: dict[int, list[TensorShard]] | None = None
        optimizer.register_step_pre_hook(self._before_optimizer)

    def start_step(self, measure: bool) -> None:
        """Forget the last step, and set whether the one that begins is measured."""
        if measure and self._shards is None:
            # Not inside of the step, where ZeRO shows the optimizer one group at a time.
            self._shards = self._shards_by_buffer()
        self._is_measuring = measure and self._is_supported
        self._squares = None

    def read(self, grad_norm: float | None) -> dict[str, float]:
        """Return the norm of each part that is trained, before clipping.

        A collective: all ranks must call it.

        Args:
            grad_norm: global norm of the step before clipping, which undoes the clipping;
                None: DeepSpeed did not compute it, and did not clip.
        Returns:
            `grad_norm/<part>`, with underscores in the names of MODEL_PARTS; empty if the last
            step was not measured or was skipped.
        """
        if self._squares is None:
            return {}
        squares = all_reduce_sum(self._squares, self._groups).tolist()
        self._squares = None
        total = sum(squares)
        if not math.isfinite(total):
            return {}
        scale = 1.0
        if grad_norm is not None and total > 0:
            scale = grad_norm / math.sqrt(total)
        trained = self._layout.shapes.keys() - self._layout.frozen.keys()
        parts = {part_of(name) for name in trained}
        return {
            f"grad_norm/{part.replace(' ', '_')}": scale * math.sqrt(square)
            for part, square in zip(_PARTS, squares, strict=True)
            if part in parts
        }

    @torch.no_grad()
    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kw: Any) -> None:
        """Add the squares of the gradients that the optimizer is about to use."""
        if not self._is_measuring:
            return
        if self._squares is None:
            self._squares = torch.zeros(
                len(_PARTS), dtype=torch.float64, device=self._groups.device
            )
        for group in optimizer.param_groups:
            for buffer in group["params"]:
                if buffer.grad is not None:
                    self._add(self._shards.get(id(buffer), []), buffer.grad.view(-1))

    def _add(self, shards: list[TensorShard], gradient: Tensor) -> None:
        """Add the squares of a flat gradient to the parts of its shards."""
        for shard in shards:
            part = gradient[shard.offset : shard.offset + shard.length]
            norm = torch.linalg.vector_norm(part, dtype=torch.float32)
            square = norm.double().square() / self._copies()
            self._squares[_PARTS.index(part_of(shard.name))] += square.to(self._squares.device)

    def _copies(self) -> int:
        """Return how many ranks hold the gradient of the same elements."""
        if self._engine.zero_optimization_stage() > 0:
            return 1
        return self._groups.world_size  # without ZeRO, a model has no experts

    def _shards_by_buffer(self) -> dict[int, list[TensorShard]]:
        """Return this rank's shards by the id of the tensor that the optimizer updates.

        Empty where an option of DeepSpeed moves gradients to where they cannot be read; all
        ranks have the same options.
        """
        shards: dict[int, list[TensorShard]] = {}
        try:
            zero_shards = ZeroShards(self._engine, self._layout)
        except ValueError as error:
            warn_on_rank0(
                "gradient norms of the parts of the model are not logged, because they cannot be "
                "read where --deepspeed-config moves them: %s",
                error,
            )
            self._is_supported = False
            return shards
        for shard in zero_shards.shards:
            shards.setdefault(id(shard.flat_buffer), []).append(shard)
        return shards
