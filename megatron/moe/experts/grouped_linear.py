"""`grouped_linear`: one matrix product per expert on its rows, in four backends.

`add_expert_bias` adds one vector per expert to its rows, on any backend.

    reference   loop of plain linear layers: any dtype, any device, twice differentiable
    cpu         loop that writes into one tensor, forward and backward
    grouped_mm  torch's grouped matrix product
    triton      `megatron.moe.experts.triton_grouped_gemm`

Shape suffixes: E experts, N rows sorted by expert, D inputs, H outputs, n rows of one
expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.first_order import first_order_only
from megatron.host_allocator import empty_cached
from megatron.moe.dispatch.permute import segment_sum
from megatron.moe.experts.backends import choose_expert_backend


def grouped_linear(
    x_ND: Tensor, weight_EHD: Tensor, expert_offsets_E: Tensor, backend: str = "auto"
) -> Tensor:
    """Return y_n = weight_e @ x_n for the rows n of each expert e: [N, H].

    Args:
        x_ND: rows sorted by expert. With the backends grouped_mm and triton there may
            be more rows than `expert_offsets_E` covers; results for them are undefined.
        weight_EHD: stacked weights, each matrix contiguous.
        expert_offsets_E: int64, end of each expert's rows.
        backend: one of the backends above, or auto.
    Raises:
        ValueError: a backend that is unavailable here.
    """
    features = tuple(weight_EHD.shape[1:])
    name, _ = choose_expert_backend(backend, x_ND.device.type, x_ND.dtype, features)
    if name == "reference":
        return _reference(x_ND, weight_EHD, expert_offsets_E)
    if name == "cpu":
        return _Loop.apply(x_ND, weight_EHD, rows_per_expert(expert_offsets_E))
    if name == "grouped_mm":
        return _torch_grouped_mm(x_ND, weight_EHD, expert_offsets_E)
    assert name == "triton", f"no grouped_linear for backend {name}"
    from megatron.moe.experts.triton_mlp import TritonGroupedLinear

    return TritonGroupedLinear.apply(x_ND, weight_EHD, expert_offsets_E)


def add_expert_bias(y_NH: Tensor, bias_EH: Tensor, expert_offsets_E: Tensor) -> Tensor:
    """Return y_n + bias_e for the rows n of each expert e: [N, H].

    Args:
        y_NH: rows sorted by expert. There may be more than `expert_offsets_E` covers;
            results for them are undefined, and the bias has no gradient from them.
    """
    return _AddExpertBias.apply(y_NH, bias_EH, expert_offsets_E)


def rows_per_expert(expert_offsets_E: Tensor) -> list[int]:
    """Return the number of rows of each expert. Synchronises with the device."""
    return expert_offsets_E.diff(prepend=expert_offsets_E.new_zeros(1)).tolist()


def _reference(x_ND: Tensor, weight_EHD: Tensor, expert_offsets_E: Tensor) -> Tensor:
    # unbind once: each weight[e] in the loop would zero-fill the full stack in
    # backward.
    weights = weight_EHD.unbind()
    parts = x_ND.split(rows_per_expert(expert_offsets_E))
    return torch.cat([F.linear(x, weight) for x, weight in zip(parts, weights, strict=True)])


def _torch_grouped_mm(x_ND: Tensor, weight_EHD: Tensor, expert_offsets_E: Tensor) -> Tensor:
    if len(x_ND) == 0:  # F.grouped_mm refuses empty inputs.
        return _Loop.apply(x_ND, weight_EHD, [0] * len(weight_EHD))
    offsets = expert_offsets_E.to(torch.int32)
    y_NH = F.grouped_mm(x_ND, weight_EHD.transpose(1, 2), offs=offsets)
    return _ContiguousGradient.apply(y_NH)


class _Loop(torch.autograd.Function):
    """One matrix product per expert into a slice of a common tensor.

    No list of parts has to be concatenated, forward or backward.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_EHD: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EHD)
        ctx.counts = counts
        y_NH = empty_cached((len(x_ND), weight_EHD.shape[1]), x_ND.dtype, x_ND.device)
        parts = zip(x_ND.split(counts), weight_EHD, y_NH.split(counts), strict=True)
        for x_nD, weight_HD, y_nH in parts:
            torch.mm(x_nD, weight_HD.t(), out=y_nH)
        return y_NH

    @staticmethod
    @first_order_only
    def backward(ctx, grad_NH: Tensor) -> tuple:
        x_ND, weight_EHD = ctx.saved_tensors
        grad_n = grad_NH.split(ctx.counts)
        grad_x_ND = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = empty_cached(x_ND.shape, x_ND.dtype, x_ND.device)
            parts = zip(grad_n, weight_EHD, grad_x_ND.split(ctx.counts))
            for grad_nH, weight_HD, grad_x_nD in parts:
                torch.mm(grad_nH, weight_HD, out=grad_x_nD)
        grad_weight_EHD = None
        if ctx.needs_input_grad[1]:
            grad_weight_EHD = empty_cached(
                weight_EHD.shape, weight_EHD.dtype, weight_EHD.device
            )
            parts = zip(grad_n, x_ND.split(ctx.counts), grad_weight_EHD)
            for grad_nH, x_nD, grad_weight_HD in parts:
                # An expert without rows gets zeros.
                torch.mm(grad_nH.t(), x_nD, out=grad_weight_HD)
        return grad_x_ND, grad_weight_EHD, None


class _AddExpertBias(torch.autograd.Function):
    """Add one vector per expert; its gradient is a deterministic sum over the expert's rows."""

    @staticmethod
    def forward(ctx, y_NH: Tensor, bias_EH: Tensor, expert_offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(expert_offsets_E)
        row_N = torch.arange(len(y_NH), device=y_NH.device)
        expert_N = torch.searchsorted(expert_offsets_E, row_N, right=True)
        return y_NH + bias_EH.index_select(0, expert_N.clamp_max(len(bias_EH) - 1))

    @staticmethod
    @first_order_only
    def backward(ctx, grad_NH: Tensor) -> tuple:
        (expert_offsets_E,) = ctx.saved_tensors
        row_N = torch.arange(len(grad_NH), device=grad_NH.device)
        starts_E1 = F.pad(expert_offsets_E, (1, 0))
        return grad_NH, segment_sum(grad_NH.contiguous(), row_N, starts_E1), None


class _ContiguousGradient(torch.autograd.Function):
    """Identity for an operation whose backward requires a contiguous gradient."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()
