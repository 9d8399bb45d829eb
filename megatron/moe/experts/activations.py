"""Activation functions of dense layers and experts: one registry of their properties.

`_REGISTRY` is the only table of activations: the CPU path takes both functions from it,
Triton kernels (triton_activation.py) select their device code by `Nonlinearity.name`, and
megatron/config/model.py lists the same names as choices of --activation and says which are
gated (config does not import torch; a test compares the two lists).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Nonlinearity:
    """An elementwise function of the (gate) projection, and its derivative."""

    name: str
    """Name by which Triton kernels select their device code."""
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """Gradient of the input, from the gradient of the output and the input."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What --activation selects."""

    nonlinearity: Nonlinearity
    gated: bool
    """Whether the result is multiplied with an up projection (a third matrix)."""


def _relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, x, 0)


_GELU = Nonlinearity("gelu", F.gelu, torch.ops.aten.gelu_backward)
_RELU = Nonlinearity("relu", F.relu, _relu_backward)
_SILU = Nonlinearity("silu", F.silu, torch.ops.aten.silu_backward)
_REGISTRY = {
    "gelu": Activation(_GELU, gated=False),
    "relu": Activation(_RELU, gated=False),
    "silu": Activation(_SILU, gated=False),
    "swiglu": Activation(_SILU, gated=True),
    "geglu": Activation(_GELU, gated=True),
}


def available_activations() -> tuple[str, ...]:
    """Return the names of all activations."""
    return tuple(_REGISTRY)


def get_activation(name: str) -> Activation:
    """Look up an activation.

    Raises:
        ValueError: unknown activation; the message lists the known ones.
    """
    if name not in _REGISTRY:
        known = " ".join(_REGISTRY)
        raise ValueError(f"activation is {name!r}; allowed: {known}")
    return _REGISTRY[name]


def is_gated(name: str) -> bool:
    """Return whether the activation multiplies a gate with an up projection.

    Raises:
        ValueError: unknown activation.
    """
    return get_activation(name).gated


def activate(name: str, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return act(gate), times `up` for the gated activations.

    Raises:
        ValueError: unknown activation.
    """
    activation = get_activation(name)
    hidden = activation.nonlinearity.forward(gate)
    if not activation.gated:
        return hidden
    assert up is not None, f"{name} needs an up projection"
    return hidden * up
