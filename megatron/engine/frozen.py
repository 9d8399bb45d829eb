"""Frozen parameters (`requires_grad` is False) under DeepSpeed 0.19.8.

Code that has the model freezes parameters before it builds the engine. They have no optimizer
state, and ZeRO 3 shards them like others. DeepSpeed expects three things of a model that frozen
parameters may not fulfil: some experts are trained if there are any, something else is trained too,
and under ZeRO 3 the input of each block has a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from megatron.config.fields import require
from megatron.engine.zero_shards import GlobalLayout
from megatron.model.block import Block

_NORM_OF_TENSORS = bf16_optimizer.get_global_norm_of_tensors


def require_trained_parameters(model: nn.Module) -> None:
    """Check that something is trained.

    Raises:
        ValueError: All parameters are frozen.
    """
    number = sum(p.requires_grad for p in model.parameters())
    require(
        number > 0,
        "the number of trained parameters",
        number,
        "1 or more",
        "Leave requires_grad of a parameter True.",
    )


@contextlib.contextmanager
def allow_frozen_parameters(model: nn.Module, zero_stage: int) -> Iterator[None]:
    """Let DeepSpeed start with any set of trained parameters; for `deepspeed.initialize`.

    ZeRO 1 and 2 assert that the optimizer has a group of experts if the model has MoE layers. When
    all experts are frozen, the optimizer is built as for a model without: the weights have been
    distributed before, and no gradient of an expert is reduced. ZeRO 3 does not assert it, and its
    optimizer finds the ranks that share an expert by `has_moe_layers`.
    """
    bf16_optimizer.get_global_norm_of_tensors = _norm_of_tensors
    trains_experts = any(is_moe_param(p) for p in model.parameters() if p.requires_grad)
    if trains_experts or zero_stage == 3:
        yield
        return
    configure_optimizer = DeepSpeedEngine._configure_optimizer

    def configure_dense_optimizer(engine: DeepSpeedEngine, *args: Any) -> None:
        engine.has_moe_layers = False
        configure_optimizer(engine, *args)

    DeepSpeedEngine._configure_optimizer = configure_dense_optimizer
    try:
        yield
    finally:
        DeepSpeedEngine._configure_optimizer = configure_optimizer


def _norm_of_tensors(input_tensors: list[Tensor], **options: Any) -> Tensor:
    """Compute the norm of the gradients outside experts: 0 if only experts are trained."""
    if not input_tensors:
        return torch.zeros(())
    return _NORM_OF_TENSORS(input_tensors=input_tensors, **options)


def require_gradients_of_inputs(model: nn.Module) -> None:
    """Make the inputs of blocks with trained parameters require gradients, for ZeRO 3.

    It releases the weights of a block when the gradient of its input is computed. The input has
    none if everything before the block is frozen; the weights would be released too early.
    """
    if all(p.requires_grad for p in model.parameters()):
        return
    for block in model.modules():
        if isinstance(block, Block) and any(p.requires_grad for p in block.parameters()):
            block.register_forward_pre_hook(_require_gradient)


def _require_gradient(block: nn.Module, inputs: tuple) -> None:
    if torch.is_grad_enabled():
        inputs[0].requires_grad_()


@dataclass(frozen=True)
class FrozenShard:
    """A contiguous range of a flattened frozen parameter, which this rank saves."""

    name: str
    """Name of the parameter"""
    start: int
    """First element of the shard in the flattened full tensor"""
    length: int
    """Number of elements"""
    parameter: nn.Parameter
    """The parameter of the forward pass"""
    local_start: int
    """First element of the shard in the flattened parameter of this rank"""
    exact: Tensor | None = None
    """The elements in fp32, as they were before the engine rounded them; None: it did not"""

    @property
    def model(self) -> Tensor:
        """1-D view of the elements in the parameter, in its dtype."""
        if hasattr(self.parameter, "ds_tensor"):  # ZeRO 3
            return self.parameter.ds_tensor[: self.length]
        elements = self.parameter.detach().view(-1)
        return elements[self.local_start : self.local_start + self.length]

    def weight(self) -> Tensor:
        """Return the fp32 weights: the exact ones, unless the model's were changed since."""
        model = self.model
        if self.exact is not None and torch.equal(self.exact.to(model.dtype), model.cpu()):
            return self.exact
        return model.to("cpu", torch.float32)


class FrozenWeights:
    """Frozen parameters for checkpoints, which store them in fp32 as they were loaded.

    So that saving and loading never change a frozen weight, what rounding to 16 bits changes is
    kept on the host: 4 bytes for each element of such a tensor, divided over the ranks.

    Args:
        model: The model before `deepspeed.initialize` replaces its tensors.
        layout: Its layout.
    """

    def __init__(self, model: nn.Module, layout: GlobalLayout):
        self._layout = layout
        self._originals = {}
        for name, p in model.named_parameters():
            if name in layout.frozen:
                self._originals[name] = p.data
        self.shards: list[FrozenShard] = []
        """Shards that this rank saves; empty before `attach`"""

    def attach(self, engine: DeepSpeedEngine) -> None:
        """Find the shards of this rank in the engine's model, and release everything else.

        They divide a parameter evenly over the ranks that hold the same elements of it, as
        DeepSpeed does under ZeRO 3. At stage 0, rank 0 saves everything.
        """
        stage = engine.zero_optimization_stage()
        for name, p in engine.module.named_parameters():
            if name not in self._layout.frozen:
                continue
            rank, num_ranks = self._layout.frozen[name]
            number = p.numel()
            if stage == 3:
                rank = p.ds_zero_partition_rank
                number = p.ds_numel
            size = -(-number // num_ranks)
            start = rank * size
            if stage == 0:
                size = number
                start = 0
            length = min(size, number - start)  # the last ranks may have less, or nothing
            if length > 0:
                global_start = self._layout.global_offset[name] + start
                shard = FrozenShard(name, global_start, length, p, start)
                self.shards.append(replace(shard, exact=self._exact(shard)))
        self._originals = {}

    def _exact(self, shard: FrozenShard) -> Tensor | None:
        """Return a copy of the elements in fp32 if the engine has rounded them."""
        rounded = shard.model
        if rounded.dtype == torch.float32:
            return None
        original = self._originals[shard.name].view(-1)
        original = original[shard.local_start : shard.local_start + shard.length]
        if torch.equal(original, rounded.to(original.device, torch.float32)):
            return None
        return original.clone()
