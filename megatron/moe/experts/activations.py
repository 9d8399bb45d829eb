"""The activation functions of feed-forward layers and experts, and their derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config.schema import ACTIVATIONS, require


def is_gated(activation: str) -> bool:
    """Whether the activation multiplies a gate projection with an up projection (three matrices)."""
    return activation in ("swiglu", "geglu")


def activate(activation: str, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """act(gate), or act(gate) * up for the gated kinds.

    Raises:
        ValueError: unknown activation.
    """
    require(activation in ACTIVATIONS, "activation", activation, " ".join(ACTIVATIONS))
    if is_gated(activation):
        assert up is not None, f"{activation} needs an up projection"
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * up
    return {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation](gate)


def nonlinearity(activation: str, gate: Tensor) -> Tensor:
    """act(gate) alone, of the gated kinds too."""
    return activate({"swiglu": "silu", "geglu": "gelu"}.get(activation, activation), gate)


def nonlinearity_backward(activation: str, grad: Tensor, gate: Tensor) -> Tensor:
    """grad * act'(gate)."""
    if activation in ("swiglu", "silu"):
        return torch.ops.aten.silu_backward(grad, gate)
    if activation in ("geglu", "gelu"):
        return torch.ops.aten.gelu_backward(grad, gate)
    return torch.ops.aten.threshold_backward(grad, gate, 0)
