"""Peak of activations of one micro-batch, from running the model on `meta`.

The forward and the backward pass run with the model's own code, without values, and the live
tensors are counted: an option of attention, a norm or an activation counts as it is. MoE layers
are the exception, because what they do depends on values. A stand-in allocates what
`megatron.analysis.moe_activations` says.

Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.analysis.live_memory import LiveMemory
from megatron.analysis.moe_activations import LayerActivations
from megatron.first_order import first_order_only
from megatron.model import cross_entropy
from megatron.model.gpt import GPT
from megatron.moe.ffn import FFNContext, FFNOutput
from megatron.moe.layer import MoELayer


@dataclass(frozen=True)
class ActivationPeaks:
    """Bytes above what is there between micro-batches."""

    kept: int
    """alive between the forward and the backward pass"""
    forward: int
    """peak of the forward pass"""
    backward: int
    """peak of the backward pass when every gradient is consumed as soon as it is there"""
    backward_with_gradients: int
    """peak of the backward pass when all gradients stay until its end"""
    gradients: int
    """the gradients that then stay"""


def trace_activations(
    model: GPT,
    layers: dict[int, LayerActivations],
    *,
    batch_size: int,
    seq_length: int,
    device: str = "cpu",
    gradient_itemsize: int = 0,
) -> ActivationPeaks:
    """Run a micro-batch on `meta` and return its peaks.

    Args:
        model: a model on `meta` in its training dtypes; its MoE layers are replaced.
        layers: bytes of the MoE layer of each block.
        device: type of the device that the run is planned for.
        gradient_itemsize: bytes of a number in the gradients that stay; 0: the parameter's.
    """
    for i, activations in layers.items():
        block = model.layers[i]
        block.mlp = _StandIn(block.mlp, activations)
    model.train()
    memory = LiveMemory("meta")
    memory.add_all(model.parameters())
    memory.add_all(model.buffers())
    hooks = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            hook = _consume_gradient(memory, gradient_itemsize)
            hooks.append(parameter.register_post_accumulate_grad_hook(hook))
    with _as_on_device(device), memory, torch.device("meta"):
        tokens_BS = torch.empty(batch_size, seq_length, dtype=torch.int64)
        mask_BS = torch.empty(batch_size, seq_length)
        start = memory.bytes
        memory.reset_peak()
        out = model(tokens_BS, tokens_BS, loss_mask_BS=mask_BS)
        loss = out.lm_loss + out.aux_loss
        del out
        kept = memory.bytes - start
        forward = memory.reset_peak() - start
        loss.backward()
        backward = memory.peak - start
        with_gradients = memory.peak_with_kept - start
    for hook in hooks:
        hook.remove()
    return ActivationPeaks(kept, forward, backward, with_gradients, memory.kept)


def _consume_gradient(memory: LiveMemory, itemsize: int) -> Callable[[Tensor], None]:
    def consume(parameter: Tensor) -> None:
        memory.kept += parameter.numel() * (itemsize or parameter.itemsize)
        memory.peak_with_kept = max(
            memory.peak_with_kept, memory.bytes + memory.kept - parameter.grad.nbytes
        )
        parameter.grad = None

    return consume


@contextmanager
def _as_on_device(device: str) -> Iterator[None]:
    """Let operations on `meta` allocate what they would on a device of this type."""
    sizes = cross_entropy.chunk_sizes(torch.device(device))
    attention = F.scaled_dot_product_attention

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        if device == "cpu" and kwargs.get("dropout_p"):
            return attention(*args, **kwargs)  # no fused kernel: `meta` has the same operations
        return _flash_attention(*args, **kwargs)

    chunks = mock.patch.object(cross_entropy, "chunk_sizes", lambda _: sizes)
    with chunks, mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


def _flash_attention(
    q_BHSK: Tensor,
    k_BGLK: Tensor,
    v_BGLK: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention that saves its operands, its output and one number per query."""
    return _FlashAttention.apply(q_BHSK, k_BGLK, v_BGLK, attn_mask)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # Kernels return [B, S, H, K] in memory, as the output projection reads it.
        y = torch.empty_like(q.transpose(1, 2).contiguous()).transpose(1, 2)
        log_sum = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, mask, y, log_sum)
        return y

    @staticmethod
    @first_order_only
    def backward(ctx, grad: Tensor) -> tuple:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _StandIn(nn.Module):
    """Stands for an MoE layer: dense parts run, the others allocate what they would.

    Args:
        layer: the layer whose parameters and dense parts this has.
        activations: bytes of its gate, dispatch and experts.
    """

    def __init__(self, layer: MoELayer, activations: LayerActivations):
        super().__init__()
        self.gate = layer.gate
        self.experts = layer.experts
        self.shared = layer.shared
        self.shared_gate = layer.shared_gate
        self.latent = nn.ModuleList(layer.latent_projections)
        self.activations = activations
        self.carry_key = layer.carry_key
        self._under_recomputation = False
        self._held: list[Tensor] = []

    def forward(self, x_BSD: Tensor, context: FFNContext | None = None) -> FFNOutput:
        """Allocate what the layer would, and return an output of its shape."""
        a = self.activations
        if self._under_recomputation:
            self._held.append(_bytes(a.kept_under_recomputation, x_BSD.device))
        rows = self.latent[0](x_BSD) if self.latent else x_BSD
        routers = list(self.gate.parameters())
        tables = list(self.experts.parameters())
        y = _Layer.apply(rows, a.kept, a.forward, a.backward, *routers, *tables)
        if self.latent:
            y = self.latent[1](y)
        if self.shared is not None:
            shared = self.shared(x_BSD, context).y
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(x_BSD)) * shared
            y = y + shared
        return FFNOutput(y, torch.zeros((), device=y.device), None)

    def recompute_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """As `MoELayer.recompute_contexts`: the first pass records what the second repeats."""
        return self._recording(), nullcontext()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        self._under_recomputation = True
        try:
            yield
        finally:
            self._under_recomputation = False


def _bytes(number: int, device: torch.device) -> Tensor:
    return torch.empty(number, dtype=torch.uint8, device=device)


class _Layer(torch.autograd.Function):
    """Allocates what a layer keeps and what it frees again, forward and backward."""

    @staticmethod
    def forward(
        ctx, x: Tensor, kept: int, forward: int, backward: int, *parameters: Tensor
    ) -> Tensor:
        saved = _bytes(kept, x.device)
        ctx.save_for_backward(x, saved, *parameters)
        ctx.bytes = backward
        y = torch.empty_like(x)
        temporary = _bytes(forward, x.device)
        del temporary
        return y

    @staticmethod
    @first_order_only
    def backward(ctx, grad: Tensor) -> tuple:
        x, _, *parameters = ctx.saved_tensors
        grads = [torch.empty_like(p) if p.requires_grad else None for p in parameters]
        temporary = _bytes(ctx.bytes, x.device)
        del temporary
        return torch.empty_like(x), None, None, None, *grads
