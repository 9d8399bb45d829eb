"""Choose the backend of the expert computation."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
import torch.nn.functional as F

from megatron.config.schema import MOE_BACKENDS, require

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""by the name of a run's precision"""


@cache
def choose_expert_backend(
    requested: str, device: str, dtype: torch.dtype, features: tuple[int, ...] = ()
) -> tuple[str, str]:
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
        obstacles = [
            (name, _obstacle(name, device, dtype, features))
            for name in ("triton", "grouped_mm")
        ]
        reasons = [f"{name}: {why}" for name, why in obstacles if why]
        if not reasons:
            return "triton", "a CUDA device, and triton is installed"
        if len(reasons) == 1:
            return "grouped_mm", f"torch has it, and not {reasons[0]}"
        return "reference", "; ".join(f"not {reason}" for reason in reasons)
    obstacle = _obstacle(requested, device, dtype, features)
    require(obstacle is None, "--moe-backend", requested, f"not here ({obstacle})", "Use auto.")
    return requested, "--moe-backend says so"


def _obstacle(
    backend: str, device: str, dtype: torch.dtype, features: tuple[int, ...]
) -> str | None:
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
