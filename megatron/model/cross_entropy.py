"""The output layer and the cross-entropy of its logits as one operation that never has all logits.

Shape suffixes: N tokens, D hidden, V vocabulary (padded), n the tokens of one piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron import buffers


def linear_cross_entropy(
    h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, mask_N: Tensor
) -> Tensor:
    """sum_n mask_n * (logsumexp(W h_n) - (W h_n)[label_n]): 0-d fp32 (fp64 from fp64).

    Args:
        labels_N: int64 in [0, V).
        mask_N: fp32, without gradient.
    """
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (h_ND, weight_VD)]
    return _LinearCrossEntropy.apply(h_ND, weight_VD, labels_N, mask_N, *needs)


def pieces(device: torch.device) -> tuple[int, int]:
    """Tokens per product, and tokens whose softmax is taken at a time: what stays in a CPU's cache, and elsewhere
    enough to launch few kernels."""
    return (512, 64) if device.type == "cpu" else (1024, 1024)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss is the last thing a model computes, so its gradient is a number: d logits = mask (softmax - one-hot),
    and from it both gradients are made at once, while a piece's logits are there. The backward pass only scales them.

    Between the two there are [N, D] and [V, D], not [N, V]. Against a linear layer and a cross-entropy that keeps its
    logits in bf16 this took 0.7 of the time on the CPU (N 2048, D 256, V 50304), of which the products are 0.85.
    Sums over V and over pieces are in fp32. A piece's product is rounded to the compute dtype on the CPU, where fp16
    is refused; elsewhere that for W, a sum over tokens that knows no loss scale yet, is made in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        mask_N: Tensor,
        need_h: bool,
        need_weight: bool,
    ) -> Tensor:
        wide, device, num_tokens = (
            torch.promote_types(h_ND.dtype, torch.float32),
            h_ND.device,
            len(h_ND),
        )
        rows, some = pieces(device)
        logits = buffers.empty((min(rows, num_tokens), len(weight_VD)), h_ND.dtype, device)
        scratch = buffers.empty((min(some, num_tokens), len(weight_VD)), wide, device)
        grad_h_ND = torch.empty_like(h_ND) if need_h else None
        grad_weight_VD = (
            buffers.empty(weight_VD.shape, wide, device).zero_() if need_weight else None
        )
        product = {"out_dtype": wide} if device.type == "cuda" and wide != h_ND.dtype else {}
        loss_N = torch.empty(num_tokens, dtype=wide, device=device)
        for start in range(0, num_tokens, rows):
            piece = slice(start, start + rows)
            h_nD = h_ND[piece]
            logits_nV = torch.mm(h_nD, weight_VD.t(), out=logits[: len(h_nD)])
            for parts in zip(
                *(
                    t.split(some)
                    for t in (logits_nV, labels_N[piece], mask_N[piece], loss_N[piece])
                )
            ):
                _loss_and_gradient(*parts, scratch)
            if need_h:
                torch.mm(logits_nV, weight_VD, out=grad_h_ND[piece])
            if need_weight:
                grad_weight_VD += torch.mm(logits_nV.t(), h_nD, **product)
        ctx.save_for_backward(grad_h_ND, grad_weight_VD)
        ctx.dtype = h_ND.dtype
        return (loss_N * mask_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Multiplied in fp32: the loss scale of fp16 is no fp16 number.
        grads = [
            None
            if saved is None
            else torch.mul(
                saved.to(grad.dtype),
                grad,
                out=buffers.empty(saved.shape, ctx.dtype, saved.device),
            )
            for saved in ctx.saved_tensors
        ]
        return *grads, None, None, None, None


def _loss_and_gradient(
    logits_nV: Tensor, label_n: Tensor, mask_n: Tensor, loss_n: Tensor, scratch: Tensor
) -> None:
    """The loss of each row into `loss_n`, and its gradient with respect to the logits in their place."""
    x_nV, label_n1 = scratch[: len(logits_nV)].copy_(logits_nV), label_n.unsqueeze(1)
    peak_n1 = x_nV.amax(-1, keepdim=True)
    picked_n1 = x_nV.gather(1, label_n1)
    total_n1 = x_nV.sub_(peak_n1).exp_().sum(-1, keepdim=True)
    loss_n.copy_((peak_n1 + total_n1.log() - picked_n1).squeeze(1))
    mask_n1 = mask_n.unsqueeze(1).to(x_nV.dtype)
    logits_nV.copy_(x_nV.mul_(mask_n1 / total_n1).scatter_add_(1, label_n1, -mask_n1))
