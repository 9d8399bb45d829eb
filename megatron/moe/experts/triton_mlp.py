"""Autograd functions on the Triton kernels: a grouped product, and all experts' MLPs with the sum of their outputs.

Shape suffixes: T tokens, D hidden, E experts, H expert width, S rows (assignments) sorted by expert.

    y_t = sum over the rows s of token t of  w2[e] (weight_s * act(w1[e] x_t) [* w3[e] x_t])

The weight is applied between the two products, where a row has H numbers. Tokens are gathered inside the products, so
no [S, D] copy of them is made; the experts' outputs [S, D] live until they are summed. For the backward pass the
pre-activations [S, H] are kept, and the rest is recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.config.schema import ACTIVATIONS, require
from megatron.moe.dispatch.plan import PermutedTokens
from megatron.moe.experts.activations import is_gated
from megatron.moe.experts.triton_grouped_gemm import (
    grouped_data_grad,
    grouped_weight_grad,
    triton_grouped_gemm,
    weighted_activation,
    weighted_activation_grad,
    weighted_combine,
)


def triton_mlp(
    x_TD: Tensor,
    weight_S: Tensor,
    w1: Tensor,
    w3: Tensor | None,
    w2: Tensor,
    rows: PermutedTokens,
    activation: str,
) -> Tensor:
    """Weighted sum of each token's experts, repeatable bit for bit. Nothing waits for the device.

    Args:
        x_TD: bf16, fp16 or fp32.
        weight_S: fp32, of the sorted rows.
        w1, w3: [E, H, D] in the dtype of x; w3 for the gated activations only.
        w2: [E, D, H] likewise.
        rows: the assignments, sorted by expert.
    Returns:
        [T, D] in the dtype of x.
    Raises:
        ValueError: unknown activation, or fp64.
    """
    require(activation in ACTIVATIONS, "activation", activation, " ".join(ACTIVATIONS))
    assert (w3 is not None) == is_gated(activation), (
        f"{activation} and the up projection do not go together"
    )
    assert weight_S.dtype == torch.float32, (
        f"the weights of the rows are fp32, not {weight_S.dtype}"
    )
    return _ExpertMLP.apply(
        x_TD,
        weight_S,
        w1,
        w3,
        w2,
        rows.token_S,
        rows.unpermute_index_S,
        rows.token_offsets_T1,
        rows.expert_offsets_E,
        activation,
    )


class TritonGroupedLinear(torch.autograd.Function):
    """`grouped_linear` of x [S, D], weight [E, H, D] and expert_offsets_E."""

    @staticmethod
    def forward(ctx, x_SD: Tensor, weight_EHD: Tensor, expert_offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_SD, weight_EHD, expert_offsets_E)
        return triton_grouped_gemm(x_SD, weight_EHD, expert_offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SH: Tensor) -> tuple:
        x_SD, weight_EHD, expert_offsets_E = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = grouped_data_grad(grad_SH, weight_EHD, expert_offsets_E) if need_x else None
        return (
            grad_x,
            grouped_weight_grad(grad_SH, x_SD, expert_offsets_E) if need_weight else None,
            None,
        )


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_TD: Tensor,
        weight_S: Tensor,
        w1: Tensor,
        w3: Tensor | None,
        w2: Tensor,
        token_S: Tensor,
        unpermute_index_S: Tensor,
        token_offsets_T1: Tensor,
        expert_offsets_E: Tensor,
        activation: str,
    ) -> Tensor:
        weight_S = weight_S.contiguous()
        gate_SH = triton_grouped_gemm(x_TD, w1, expert_offsets_E, token_S)
        up_SH = None if w3 is None else triton_grouped_gemm(x_TD, w3, expert_offsets_E, token_S)
        ctx.save_for_backward(
            x_TD,
            weight_S,
            w1,
            w3,
            w2,
            token_S,
            unpermute_index_S,
            token_offsets_T1,
            expert_offsets_E,
            gate_SH,
            up_SH,
        )
        ctx.activation = activation
        hidden_SH = weighted_activation(gate_SH, up_SH, weight_S, expert_offsets_E, activation)
        return weighted_combine(
            triton_grouped_gemm(hidden_SH, w2, expert_offsets_E),
            unpermute_index_S,
            token_offsets_T1,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor) -> tuple:
        (
            x_TD,
            weight_S,
            w1,
            w3,
            w2,
            token_S,
            unpermute_index_S,
            token_offsets_T1,
            expert_offsets_E,
            gate_SH,
            up_SH,
        ) = ctx.saved_tensors
        need_x, need_weight, need_w1, need_w3, need_w2 = ctx.needs_input_grad[:5]
        grad_x = grad_weight = grad_w1 = grad_w3 = grad_w2 = None
        grad_TD = grad_TD.contiguous()
        if need_w2:
            hidden_SH = weighted_activation(
                gate_SH, up_SH, weight_S, expert_offsets_E, ctx.activation
            )
            grad_w2 = grouped_weight_grad(
                grad_TD, hidden_SH, expert_offsets_E, grad_gather_S=token_S
            )
            del hidden_SH
        if need_x or need_weight or need_w1 or need_w3:
            grad_gate_SH, grad_up_SH, grad_weight_S = weighted_activation_grad(
                grouped_data_grad(grad_TD, w2, expert_offsets_E, token_S),
                gate_SH,
                up_SH,
                weight_S,
                expert_offsets_E,
                ctx.activation,
            )
            if need_weight:
                grad_weight = grad_weight_S
            if need_x:
                plus = None if w3 is None else (grad_up_SH, w3)
                grad_SD = grouped_data_grad(grad_gate_SH, w1, expert_offsets_E, plus=plus)
                grad_x = weighted_combine(grad_SD, unpermute_index_S, token_offsets_T1)
                del grad_SD
            if need_w1:
                grad_w1 = grouped_weight_grad(grad_gate_SH, x_TD, expert_offsets_E, token_S)
            if need_w3:
                grad_w3 = grouped_weight_grad(grad_up_SH, x_TD, expert_offsets_E, token_S)
        return grad_x, grad_weight, grad_w1, grad_w3, grad_w2, *(None,) * 5
