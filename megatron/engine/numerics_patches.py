"""Corrections of DeepSpeed 0.19.8 where its numbers differ from plain AdamW (private API)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import stage3
from torch import Tensor, nn

_defragment = stage3.defragment


class _BufferPerDtype:
    """Stands for ZeRO 3's one buffer of all parameters where there is one buffer per dtype."""

    def __init__(self, buffers: Iterable[Tensor]):
        self.buffers = list(buffers)

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """Return a range of the buffers' concatenation that lies within one of them."""
        for buffer in self.buffers:
            if start < buffer.numel():
                return buffer.narrow(dim, start, length)
            start -= buffer.numel()
        raise IndexError(f"the buffers end {start} elements before the range")


def _defragment_by_dtype(tensors: list[Tensor]) -> Tensor | _BufferPerDtype:
    runs = itertools.groupby(tensors, key=lambda tensor: tensor.dtype)
    buffers = [_defragment(list(run)) for _, run in runs]
    if len(buffers) == 1:
        return buffers[0]
    return _BufferPerDtype(buffers)


def let_zero3_partition_several_dtypes() -> None:
    """Let ZeRO 3 keep fp32 parameters, which are in a group of their own, with others in bf16.

    DeepSpeed gathers and reduces parameters of several dtypes already, but moves all partitions
    into one buffer, of which every parameter group is a range. A group has one dtype, so there can
    be one buffer per dtype. `offload_param` has another buffer and is not covered.
    """
    stage3.defragment = _defragment_by_dtype


@contextlib.contextmanager
def skip_dummy_step() -> Iterator[None]:
    """Build DeepSpeed's optimizer without ZeRO (`FP16_UnfusedOptimizer`) without a first step.

    DeepSpeed allocates the optimizer's state by a step with zero gradients. Adam then starts at
    step 2 (its first update is 0.735 of the right one with betas 0.9 and 0.95), and the step
    decays the weights once. Our optimizer allocates its state in its first step.
    """
    original = FP16_UnfusedOptimizer.initialize_optimizer_states
    FP16_UnfusedOptimizer.initialize_optimizer_states = lambda optimizer: None
    try:
        yield
    finally:
        FP16_UnfusedOptimizer.initialize_optimizer_states = original


def accumulate_in_fp32(model: nn.Module) -> None:
    """Sum the gradients of micro-batches in fp32 where DeepSpeed leaves that to autograd.

    Without ZeRO, DeepSpeed reduces `grad` as it is, and the optimizer converts it to fp32. Here a
    micro-batch's gradient is rounded to bf16, as under ZeRO, and then added to an fp32 sum.
    DeepSpeed would round that sum again before it takes the norm.
    """

    def widen(parameter: nn.Parameter) -> None:
        # Autograd adds the following micro-batches to this tensor in place.
        if parameter.grad.dtype != torch.float32:
            parameter.grad.data = parameter.grad.data.float()

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(widen)
    unfused_optimizer.split_params_grads_into_shared_and_expert_params = _gradients


def _gradients(parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of dense parameters and, as there are none without ZeRO, of experts."""
    return [p.grad for p in parameters if p.grad is not None], []


def reduce_in_fp32_buckets(zero_optimizer: Any) -> None:
    """Let ZeRO 2 collect gradients for the reduction in fp32.

    Its buckets have the dtype of the first parameter group otherwise, which rounds the gradients
    of fp32 parameters to bf16, whatever `communication_data_type` is.
    """
    zero_optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32
