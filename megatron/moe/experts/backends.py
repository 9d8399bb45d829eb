"""Selection of the backend that computes experts."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
import torch.nn.functional as F

from megatron.config.fields import require
from megatron.config.schema import MOE_BACKENDS

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Compute dtypes by the name of a run's precision."""


@cache
def choose_expert_backend(
    requested: str, device: str, dtype: torch.dtype, features: tuple[int, ...] = ()
) -> tuple[str, str]:
    """Return (backend, reason) for tensors of this device type and dtype.

    Args:
        requested: the value of --moe-backend.
        features: numbers of input and output features of the matrix products.
    Raises:
        ValueError: an unknown backend, or one that is unavailable here.
    """
    require(requested in MOE_BACKENDS, "--moe-backend", requested, " ".join(MOE_BACKENDS))
    if requested == "auto":
        return _choose_automatically(device, dtype, features)
    obstacle = _obstacle(requested, device, dtype, features)
    require(
        obstacle is None,
        "--moe-backend",
        requested,
        f"a backend that works here ({obstacle})",
        "Use auto.",
    )
    return requested, f"--moe-backend is {requested}"


def _choose_automatically(
    device: str, dtype: torch.dtype, features: tuple[int, ...]
) -> tuple[str, str]:
    """Return the fastest backend that is available here, and the reason."""
    if device == "cpu":
        return "cpu", "rows stay in the cache between the matrix products of an expert"
    no_triton = _obstacle("triton", device, dtype, features)
    if no_triton is None:
        return "triton", "a CUDA device, and triton is installed"
    no_grouped_mm = _obstacle("grouped_mm", device, dtype, features)
    if no_grouped_mm is None:
        return "grouped_mm", f"torch supports it; triton is unavailable: {no_triton}"
    return (
        "reference",
        f"triton is unavailable: {no_triton}; grouped_mm is unavailable: {no_grouped_mm}",
    )


def _obstacle(
    backend: str, device: str, dtype: torch.dtype, features: tuple[int, ...]
) -> str | None:
    """Return why the backend cannot be used, or None if it can."""
    if backend == "cpu" and device != "cpu":
        return f"the tensors are on {device}"
    if backend == "grouped_mm":
        return _grouped_mm_obstacle(device, dtype, features)
    if backend == "triton":
        return _triton_obstacle(device, dtype)
    return None


def _grouped_mm_obstacle(
    device: str, dtype: torch.dtype, features: tuple[int, ...]
) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no F.grouped_mm"
    if dtype not in COMPUTE_DTYPES.values() or (device != "cpu" and dtype != torch.bfloat16):
        return f"no support for {dtype} on {device}"
    for size in features:
        if size * dtype.itemsize % 16:
            return f"a row of {size} numbers of {dtype} is not a multiple of 16 bytes"
    return None


def _triton_obstacle(device: str, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, where triton needs TRITON_INTERPRET=1"
    if dtype not in COMPUTE_DTYPES.values():
        return f"no support for {dtype}"
    return None
