"""`grouped_linear`: one product per expert on consecutive rows, in four backends; and which backend to take.

Shape suffixes: E experts, N rows sorted by expert, D inputs, H outputs.

    reference   a loop of plain linear layers: any dtype, any device, differentiable twice
    cpu         the loop that writes into one tensor, forward and backward
    grouped_mm  torch's own grouped product
    triton      `megatron.moe.experts.triton_grouped_gemm`
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron import buffers
from megatron.moe.experts.backends import choose_expert_backend


def grouped_linear(
    x_ND: Tensor, weight_EHD: Tensor, expert_offsets_E: Tensor, backend: str = "auto"
) -> Tensor:
    """y_n = weight_e @ x_n for the rows n of expert e: [N, H].

    Args:
        x_ND: rows sorted by expert; with the backends grouped_mm and triton there may be more than `expert_offsets_E` says, and
            what comes of them is undefined.
        weight_EHD: contiguous.
        expert_offsets_E: int64, where each expert's rows end.
    Raises:
        ValueError: a backend that is not possible here.
    """
    name, _ = choose_expert_backend(
        backend, x_ND.device.type, x_ND.dtype, tuple(weight_EHD.shape[1:])
    )
    if name == "reference":
        # unbind once: indexing a stacked weight in the loop would zero-fill the whole stack in every backward.
        pieces = zip(x_ND.split(counts_of(expert_offsets_E)), weight_EHD.unbind(), strict=True)
        return torch.cat([F.linear(x_nD, weight_HD) for x_nD, weight_HD in pieces])
    if name == "cpu":
        return _Loop.apply(x_ND, weight_EHD, counts_of(expert_offsets_E))
    if name == "grouped_mm":
        if len(x_ND) == 0:  # F.grouped_mm refuses
            return _Loop.apply(x_ND, weight_EHD, [0] * len(weight_EHD))
        return _ContiguousGradient.apply(
            F.grouped_mm(
                x_ND, weight_EHD.transpose(1, 2), offs=expert_offsets_E.to(torch.int32)
            )
        )
    from megatron.moe.experts.triton_mlp import TritonGroupedLinear

    return TritonGroupedLinear.apply(x_ND, weight_EHD, expert_offsets_E)


def counts_of(expert_offsets_E: Tensor) -> list[int]:
    """Rows of each expert, on the host."""
    return expert_offsets_E.diff(prepend=expert_offsets_E.new_zeros(1)).tolist()


class _Loop(torch.autograd.Function):
    """One product per expert into a slice of one tensor: no list of pieces to copy together, forward or backward."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_EHD: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EHD)
        ctx.counts = counts
        y_NH = buffers.empty((len(x_ND), weight_EHD.shape[1]), x_ND.dtype, x_ND.device)
        for x_nD, weight_HD, out in zip(
            x_ND.split(counts), weight_EHD, y_NH.split(counts), strict=True
        ):
            torch.mm(x_nD, weight_HD.t(), out=out)
        return y_NH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NH: Tensor) -> tuple:
        x_ND, weight_EHD = ctx.saved_tensors
        grad_x_ND = grad_weight_EHD = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = buffers.empty(x_ND.shape, x_ND.dtype, x_ND.device)
            for grad_nH, weight_HD, out in zip(
                grad_NH.split(ctx.counts), weight_EHD, grad_x_ND.split(ctx.counts)
            ):
                torch.mm(grad_nH, weight_HD, out=out)
        if ctx.needs_input_grad[1]:
            grad_weight_EHD = buffers.empty(
                weight_EHD.shape, weight_EHD.dtype, weight_EHD.device
            )
            for grad_nH, x_nD, out in zip(
                grad_NH.split(ctx.counts), x_ND.split(ctx.counts), grad_weight_EHD
            ):
                torch.mm(grad_nH.t(), x_nD, out=out)  # without rows: zeros
        return grad_x_ND, grad_weight_EHD, None


class _ContiguousGradient(torch.autograd.Function):
    """The identity, for an operation whose backward wants a contiguous gradient."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()
