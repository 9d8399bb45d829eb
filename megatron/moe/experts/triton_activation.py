"""Triton kernels for the activation between an expert's products, and its gradients.

Device code is selected by `Nonlinearity.name` at compile time. A nonlinearity without
device code is a compile-time error; tests run these kernels for every registered
activation.

Shape suffixes: E experts, S rows sorted by expert, H expert width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.moe.experts.activations import get_activation

_BLOCK_ROWS = 16
_MAX_BLOCK_COLUMNS = 128
_RSQRT_2 = tl.constexpr(0.5**0.5)
_RSQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _activate(gate, NONLINEARITY: tl.constexpr):
    if NONLINEARITY == "relu":
        act = tl.where(gate < 0, 0.0, gate)  # propagates NaN
    elif NONLINEARITY == "gelu":
        act = 0.5 * gate * (1 + tl.erf(gate * _RSQRT_2))
    elif NONLINEARITY == "silu":
        act = gate / (1 + tl.exp(-gate))
    else:
        tl.static_assert(False, "no Triton code for this nonlinearity")
    return act


@triton.jit
def _slope(gate, NONLINEARITY: tl.constexpr):
    """Derivative of `_activate`."""
    if NONLINEARITY == "relu":
        slope = tl.where(gate <= 0, 0.0, 1.0)
    elif NONLINEARITY == "gelu":
        cdf = 0.5 * (1 + tl.erf(gate * _RSQRT_2))
        slope = cdf + gate * tl.exp(-0.5 * gate * gate) * _RSQRT_2_PI
    elif NONLINEARITY == "silu":
        sigmoid = 1 / (1 + tl.exp(-gate))
        slope = sigmoid * (1 + gate * (1 - sigmoid))
    else:
        tl.static_assert(False, "no Triton code for this nonlinearity")
    return slope


@triton.jit
def _activation_kernel(
    gate_ptr,
    up_ptr,
    weight_ptr,
    out_ptr,
    offsets_ptr,
    num_experts,
    columns,
    NONLINEARITY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out = weight act(gate) [up], for the rows before the last expert offset."""
    num_rows = tl.load(offsets_ptr + num_experts - 1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    weight = tl.load(weight_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    for first in range(0, columns, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        at = row[:, None] * columns + column[None, :]
        mask = (row < num_rows)[:, None] & (column < columns)[None, :]
        gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
        hidden = _activate(gate, NONLINEARITY)
        if up_ptr is not None:
            hidden *= tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (hidden * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activation_grad_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    weight_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    grad_weight_ptr,
    offsets_ptr,
    num_experts,
    allocated_rows,
    columns,
    NONLINEARITY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradients of `_activation_kernel`.

    Rows past the last expert offset, up to `allocated_rows`, get a weight gradient of
    0.
    """
    num_rows = tl.load(offsets_ptr + num_experts - 1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    weight = tl.load(weight_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    grad_weight = tl.full((BLOCK_S, BLOCK_H), 0.0, tl.float32)
    for first in range(0, columns, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        at = row[:, None] * columns + column[None, :]
        mask = (row < num_rows)[:, None] & (column < columns)[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
        hidden = _activate(gate, NONLINEARITY)
        grad_gate = grad * weight * _slope(gate, NONLINEARITY)
        if up_ptr is not None:
            up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
            grad_up = grad * weight * hidden
            tl.store(grad_up_ptr + at, grad_up.to(grad_up_ptr.dtype.element_ty), mask=mask)
            hidden *= up
            grad_gate *= up
        grad_weight += grad * hidden
        tl.store(grad_gate_ptr + at, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_weight_ptr + row, tl.sum(grad_weight, 1), mask=row < allocated_rows)


def _launch_options(
    gate_SH: Tensor, activation: str
) -> tuple[tuple[int], dict[str, int | str]]:
    """Return the grid and the compile-time constants of both kernels.

    Raises:
        ValueError: unknown activation.
    """
    num_rows, columns = gate_SH.shape
    constants = {
        "NONLINEARITY": get_activation(activation).nonlinearity.name,
        "BLOCK_S": _BLOCK_ROWS,
        "BLOCK_H": min(_MAX_BLOCK_COLUMNS, triton.next_power_of_2(columns)),
    }
    return (triton.cdiv(num_rows, _BLOCK_ROWS),), constants


def _check_contiguous(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous(), "rows must be contiguous"


def weighted_activation(
    gate_SH: Tensor,
    up_SH: Tensor | None,
    weight_S: Tensor,
    expert_offsets_E: Tensor,
    activation: str,
) -> Tensor:
    """Return weight_s * act(gate_s), times up_s where given.

    Args:
        gate_SH, up_SH: contiguous.
        weight_S: fp32, contiguous.
        activation: name of the activation; of gated ones, what is applied to the gate.
    Returns:
        [S, H] computed in fp32, in the dtype of the gate.
    Raises:
        ValueError: unknown activation.
    """
    _check_contiguous(gate_SH, up_SH, weight_S)
    out_SH = torch.empty_like(gate_SH)
    grid, constants = _launch_options(gate_SH, activation)
    _activation_kernel[grid](
        gate_SH,
        up_SH,
        weight_S,
        out_SH,
        expert_offsets_E,
        len(expert_offsets_E),
        gate_SH.shape[1],
        **constants,
    )
    return out_SH


def weighted_activation_grad(
    grad_SH: Tensor,
    gate_SH: Tensor,
    up_SH: Tensor | None,
    weight_S: Tensor,
    expert_offsets_E: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of `weighted_activation`'s gate, up and weight.

    The gradient of up is None without up. That of the weight is fp32 [S], and 0 past
    the last expert offset.

    Raises:
        ValueError: unknown activation.
    """
    _check_contiguous(grad_SH, gate_SH, up_SH, weight_S)
    grad_gate_SH = torch.empty_like(gate_SH)
    grad_up_SH = None
    if up_SH is not None:
        grad_up_SH = torch.empty_like(up_SH)
    grad_weight_S = torch.empty_like(weight_S)
    grid, constants = _launch_options(gate_SH, activation)
    _activation_grad_kernel[grid](
        grad_SH,
        gate_SH,
        up_SH,
        weight_S,
        grad_gate_SH,
        grad_up_SH,
        grad_weight_S,
        expert_offsets_E,
        len(expert_offsets_E),
        *gate_SH.shape,
        **constants,
    )
    return grad_gate_SH, grad_up_SH, grad_weight_S
