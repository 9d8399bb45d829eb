"""Autograd functions on the Triton kernels: a grouped product, and the experts' MLPs.

    y_t = sum over its rows s of  w2[e] (weight_s * act(w1[e] x_t) [* w3[e] x_t])

The weight is applied between the two products, where a row has H numbers. Tokens are
gathered inside the products, so they are not copied to [S, D]; the experts' outputs [S,
D] exist until they are summed. The pre-activations [S, H] are saved for the backward
pass, and everything else is recomputed.

Shape suffixes: T tokens, D hidden, E experts, H expert width, S rows (one per
assignment, sorted by expert).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.first_order import first_order_only
from megatron.moe.dispatch.plan import PermutedTokens
from megatron.moe.experts.activations import is_gated
from megatron.moe.experts.triton_activation import (
    weighted_activation,
    weighted_activation_grad,
)
from megatron.moe.experts.triton_combine import weighted_combine
from megatron.moe.experts.triton_grouped_gemm import (
    grouped_data_grad,
    grouped_weight_grad,
    triton_grouped_gemm,
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
    """Return the weighted sum of each token's experts, repeatable bit for bit.

    There is no device sync.

    Args:
        x_TD: bf16, fp16 or fp32.
        weight_S: fp32, one per sorted row.
        w1, w3: [E, H, D] in the dtype of x; w3 for gated activations only.
        w2: [E, D, H] in the dtype of x.
        rows: the assignments, sorted by expert.
    Returns:
        [T, D] in the dtype of x.
    Raises:
        ValueError: unknown activation, or fp64.
    """
    gated = is_gated(activation)
    assert (w3 is not None) == gated, f"{activation} and the up projection do not go together"
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
    @first_order_only
    def backward(ctx, grad_SH: Tensor) -> tuple:
        x_SD, weight_EHD, expert_offsets_E = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = None
        if need_x:
            grad_x = grouped_data_grad(grad_SH, weight_EHD, expert_offsets_E)
        grad_weight = None
        if need_weight:
            grad_weight = grouped_weight_grad(grad_SH, x_SD, expert_offsets_E)
        return grad_x, grad_weight, None


class _Saved(NamedTuple):
    """Tensors that `_ExpertMLP` saves for backward."""

    x_TD: Tensor
    weight_S: Tensor
    w1: Tensor
    w3: Tensor | None
    w2: Tensor
    token_S: Tensor
    unpermute_index_S: Tensor
    token_offsets_T1: Tensor
    expert_offsets_E: Tensor
    gate_SH: Tensor
    up_SH: Tensor | None


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
        up_SH = None
        if w3 is not None:
            up_SH = triton_grouped_gemm(x_TD, w3, expert_offsets_E, token_S)
        saved = _Saved(
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
        ctx.save_for_backward(*saved)
        ctx.activation = activation
        hidden_SH = weighted_activation(gate_SH, up_SH, weight_S, expert_offsets_E, activation)
        y_SD = triton_grouped_gemm(hidden_SH, w2, expert_offsets_E)
        return weighted_combine(y_SD, unpermute_index_S, token_offsets_T1)

    @staticmethod
    @first_order_only
    def backward(ctx, grad_TD: Tensor) -> tuple:
        s = _Saved(*ctx.saved_tensors)
        offsets_E = s.expert_offsets_E
        grad_TD = grad_TD.contiguous()
        need_x, need_weight, need_w1, need_w3, need_w2 = ctx.needs_input_grad[:5]
        grad_x = None
        grad_weight = None
        grad_w1 = None
        grad_w3 = None
        grad_w2 = None
        if need_w2:
            grad_w2 = _down_projection_grad(s, grad_TD, ctx.activation)
        if need_x or need_weight or need_w1 or need_w3:
            grad_gate_SH, grad_up_SH, grad_weight_S = weighted_activation_grad(
                grouped_data_grad(grad_TD, s.w2, offsets_E, s.token_S),
                s.gate_SH,
                s.up_SH,
                s.weight_S,
                offsets_E,
                ctx.activation,
            )
            if need_weight:
                grad_weight = grad_weight_S
            if need_x:
                grad_x = _input_grad(s, grad_gate_SH, grad_up_SH)
            if need_w1:
                grad_w1 = grouped_weight_grad(grad_gate_SH, s.x_TD, offsets_E, s.token_S)
            if need_w3:
                grad_w3 = grouped_weight_grad(grad_up_SH, s.x_TD, offsets_E, s.token_S)
        return grad_x, grad_weight, grad_w1, grad_w3, grad_w2, *(None,) * 5


def _down_projection_grad(s: _Saved, grad_TD: Tensor, activation: str) -> Tensor:
    """Return the gradient of w2, from recomputed hidden rows [S, H]."""
    hidden_SH = weighted_activation(
        s.gate_SH, s.up_SH, s.weight_S, s.expert_offsets_E, activation
    )
    return grouped_weight_grad(grad_TD, hidden_SH, s.expert_offsets_E, grad_gather_S=s.token_S)


def _input_grad(s: _Saved, grad_gate_SH: Tensor, grad_up_SH: Tensor | None) -> Tensor:
    """Return the gradient of x, from the gradients of the pre-activations."""
    plus = None
    if s.w3 is not None:
        plus = (grad_up_SH, s.w3)
    grad_SD = grouped_data_grad(grad_gate_SH, s.w1, s.expert_offsets_E, plus=plus)
    return weighted_combine(grad_SD, s.unpermute_index_S, s.token_offsets_T1)
