"""`grouped_linear`: one product per expert on consecutive rows, in four backends; and which backend to take.

Letters: E experts, N rows sorted by expert, D inputs, H outputs.

    reference   a loop of plain linear layers: any dtype, any device, differentiable twice
    cpu         the loop that writes into one tensor, forward and backward
    grouped_mm  torch's own grouped product
    triton      `megatron.moe.kernels`
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron import buffers
from megatron.config.schema import MOE_BACKENDS, require

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""by the name of a run's precision"""


@cache
def choose_backend(requested: str, device: str, dtype: torch.dtype,
                   features: tuple[int, ...] = ()) -> tuple[str, str]:
    """(backend, why) for tensors of this device type and dtype.

    Args:
        features: inputs and outputs of the products.
    Raises:
        ValueError: unknown, or not possible here.
    """
    require(requested in MOE_BACKENDS, "--moe-backend", requested, " ".join(MOE_BACKENDS))
    if requested == "auto":
        if device == "cpu":
            return "cpu", "rows stay in the cache between the products of one expert"
        obstacles = [(name, _obstacle(name, device, dtype, features)) for name in ("triton", "grouped_mm")]
        reasons = [f"{name}: {why}" for name, why in obstacles if why]
        if not reasons:
            return "triton", "a CUDA device, and triton is installed"
        if len(reasons) == 1:
            return "grouped_mm", f"torch has it, and not {reasons[0]}"
        return "reference", "; ".join(f"not {reason}" for reason in reasons)
    obstacle = _obstacle(requested, device, dtype, features)
    require(obstacle is None, "--moe-backend", requested, f"not here ({obstacle})", "Use auto.")
    return requested, "--moe-backend says so"


def _obstacle(backend: str, device: str, dtype: torch.dtype, features: tuple[int, ...]) -> str | None:
    """Why the backend cannot be used, or None."""
    if backend == "cpu" and device != "cpu":
        return f"the tensors are on {device}"
    if backend == "grouped_mm":
        if not hasattr(F, "grouped_mm"):
            return f"torch {torch.__version__} has no F.grouped_mm"
        if dtype not in DTYPES.values() or (device != "cpu" and dtype != torch.bfloat16):
            return f"it has no {dtype} on {device}"
        if odd := [size for size in features if size * dtype.itemsize % 16]:
            return f"a row of {odd[0]} numbers of {dtype} is no multiple of 16 bytes"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the tensors are on {device}; its interpreter would run there with TRITON_INTERPRET=1"
        if dtype not in DTYPES.values():
            return f"it has no {dtype}"
    return None


def grouped_linear(x_ND: Tensor, weight_EHD: Tensor, ends_E: Tensor, backend: str = "auto") -> Tensor:
    """y_n = weight_e @ x_n for the rows n of expert e: [N, H].

    Args:
        x_ND: rows sorted by expert; with the backends grouped_mm and triton there may be more than `ends_E` says, and
            what comes of them is undefined.
        weight_EHD: contiguous.
        ends_E: int64, where each expert's rows end.
    Raises:
        ValueError: a backend that is not possible here.
    """
    name, _ = choose_backend(backend, x_ND.device.type, x_ND.dtype, tuple(weight_EHD.shape[1:]))
    if name == "reference":
        # unbind once: indexing a stacked weight in the loop would zero-fill the whole stack in every backward.
        pieces = zip(x_ND.split(counts_of(ends_E)), weight_EHD.unbind(), strict=True)
        return torch.cat([F.linear(x_nD, weight_HD) for x_nD, weight_HD in pieces])
    if name == "cpu":
        return _Loop.apply(x_ND, weight_EHD, counts_of(ends_E))
    if name == "grouped_mm":
        if len(x_ND) == 0:  # F.grouped_mm refuses
            return _Loop.apply(x_ND, weight_EHD, [0] * len(weight_EHD))
        return _ContiguousGradient.apply(
            F.grouped_mm(x_ND, weight_EHD.transpose(1, 2), offs=ends_E.to(torch.int32)))
    from megatron.moe.kernels.mlp import GroupedLinear

    return GroupedLinear.apply(x_ND, weight_EHD, ends_E)


def counts_of(ends_E: Tensor) -> list[int]:
    """Rows of each expert, on the host."""
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()


class _Loop(torch.autograd.Function):
    """One product per expert into a slice of one tensor: no list of pieces to copy together, forward or backward."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_EHD: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EHD)
        ctx.counts = counts
        y_NH = buffers.empty((len(x_ND), weight_EHD.shape[1]), x_ND.dtype, x_ND.device)
        for x_nD, weight_HD, out in zip(x_ND.split(counts), weight_EHD, y_NH.split(counts), strict=True):
            torch.mm(x_nD, weight_HD.t(), out=out)
        return y_NH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NH: Tensor) -> tuple:
        x_ND, weight_EHD = ctx.saved_tensors
        grad_x_ND = grad_weight_EHD = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = buffers.empty(x_ND.shape, x_ND.dtype, x_ND.device)
            for grad_nH, weight_HD, out in zip(grad_NH.split(ctx.counts), weight_EHD, grad_x_ND.split(ctx.counts)):
                torch.mm(grad_nH, weight_HD, out=out)
        if ctx.needs_input_grad[1]:
            grad_weight_EHD = buffers.empty(weight_EHD.shape, weight_EHD.dtype, weight_EHD.device)
            for grad_nH, x_nD, out in zip(grad_NH.split(ctx.counts), x_ND.split(ctx.counts), grad_weight_EHD):
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
