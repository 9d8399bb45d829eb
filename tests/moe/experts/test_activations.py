"""The registry of activations: names, derivatives, and the refusal of unknown names."""

import pytest
import torch

from megatron.config.model import ACTIVATIONS, GATED_ACTIVATIONS, ModelConfig
from megatron.moe.experts.activations import (
    activate,
    available_activations,
    get_activation,
    is_gated,
)


def test_config_lists_the_registry():
    """The config package does not import torch, so it holds its own copy of the names."""
    assert available_activations() == ACTIVATIONS
    gated = [name for name in available_activations() if is_gated(name)]
    assert tuple(gated) == GATED_ACTIVATIONS


@pytest.mark.parametrize("name", available_activations())
def test_default_ffn_size_depends_on_gating(name):
    """Three matrices of 8/3 of the width have the parameters of two of 4 times the width."""
    expected = 4 * 96
    if is_gated(name):
        expected = 8 * 96 // 3
    assert ModelConfig(hidden_size=96, activation=name).ffn_size == expected


@pytest.mark.parametrize("name", available_activations())
def test_backward_is_the_derivative(name):
    nonlinearity = get_activation(name).nonlinearity
    x = torch.linspace(-4, 4, 33, dtype=torch.float64).requires_grad_()
    grad = torch.linspace(-1, 2, 33, dtype=torch.float64)
    (expected,) = torch.autograd.grad(nonlinearity.forward(x), x, grad)
    assert torch.equal(nonlinearity.backward(grad, x.detach()), expected)


@pytest.mark.parametrize("name", available_activations())
def test_gated_activations_multiply_with_up(name):
    gate = torch.linspace(-2, 2, 9)
    up = torch.linspace(1, 3, 9)
    hidden = get_activation(name).nonlinearity.forward(gate)
    expected = hidden * up if is_gated(name) else hidden
    assert torch.equal(activate(name, gate, up), expected)


def test_gated_activation_without_up_fails():
    with pytest.raises(AssertionError, match="swiglu needs an up projection"):
        activate("swiglu", torch.zeros(1))


@pytest.mark.parametrize(
    "use", [get_activation, is_gated, lambda n: activate(n, torch.ones(1))]
)
def test_unknown_activation_is_refused(use):
    known = "gelu relu silu swiglu geglu"
    with pytest.raises(ValueError, match=f"activation is 'tanh'; allowed: {known}"):
        use("tanh")
