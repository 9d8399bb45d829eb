"""The Triton activation kernels against fp64 formulas.

Shape suffixes: S rows sorted by expert, H expert width.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from helpers.reference_mlp import reference_activation  # noqa: E402
from helpers.triton_kernels import DEVICE, DTYPES, assert_close, offsets_of, randn  # noqa: E402
from megatron.moe.experts import activations, triton_activation  # noqa: E402
from megatron.moe.experts.activations import available_activations, is_gated  # noqa: E402
from megatron.moe.experts.triton_activation import (  # noqa: E402
    weighted_activation,
    weighted_activation_grad,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("checked_memory")]


@pytest.mark.parametrize("activation", available_activations())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_and_gradients_match_reference(activation, dtype):
    """More than one tile of columns, a partial last tile of rows, two rows of padding."""
    S, H = 19, 200
    gate, up, grad = (3 * randn(S, H, dtype=dtype, seed=i) for i in range(3))
    weight = randn(S, seed=3)
    offsets = offsets_of([9, 0, 8])
    gate[17] = float("nan")
    weight[18] = float("inf")
    up = up if is_gated(activation) else None
    tensors = {"gate": gate, "up": up, "weight": weight}
    inputs = {
        name: t[:17].double().requires_grad_() for name, t in tensors.items() if t is not None
    }
    hidden = reference_activation(activation, inputs["gate"], inputs.get("up"))
    expected = hidden * inputs["weight"][:, None]
    actual = weighted_activation(gate, up, weight, offsets, activation)
    assert_close("y", actual[:17], expected.detach())
    grads = torch.autograd.grad(expected, list(inputs.values()), grad[:17].double())
    results = weighted_activation_grad(grad, gate, up, weight, offsets, activation)
    by_name = dict(zip(("gate", "up", "weight"), results, strict=True))
    for name, value in zip(inputs, grads, strict=True):
        assert_close(f"grad of {name}", by_name[name][:17], value)
    assert (by_name["up"] is None) == (up is None)
    assert by_name["weight"][17:].tolist() == [0, 0]


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_nan_is_propagated(activation):
    gate = torch.full((1, 4), float("nan"), device=DEVICE)
    weight = randn(1)
    offsets = offsets_of([1])
    assert weighted_activation(gate, None, weight, offsets, activation).isnan().all()
    grads = weighted_activation_grad(gate, gate, None, weight, offsets, activation)
    assert grads[2].isnan().all()


def test_unknown_activation_is_refused():
    gate = randn(2, 4)
    offsets = offsets_of([2])
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: gelu relu"):
        weighted_activation(gate, None, randn(2), offsets, "tanh")
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: gelu relu"):
        weighted_activation_grad(gate, gate, None, randn(2), offsets, "tanh")


@pytest.mark.parametrize("use", ["forward", "backward"])
def test_missing_device_code_fails_statically(use, monkeypatch):
    """A registered nonlinearity without Triton code does not fall back to another one."""
    tanh = activations.Nonlinearity("tanh", torch.tanh, torch.ops.aten.tanh_backward)
    entry = activations.Activation(tanh, gated=False)
    monkeypatch.setitem(activations._REGISTRY, "tanh", entry)
    gate = randn(2, 4)
    arguments = (gate, None, randn(2), offsets_of([2]), "tanh")
    with pytest.raises(Exception, match="no Triton code for this nonlinearity"):
        if use == "forward":
            weighted_activation(*arguments)
        else:
            weighted_activation_grad(gate, *arguments)


def test_strided_rows_are_refused():
    x = randn(9, 24)
    offsets = offsets_of([1, 2, 0, 1, 5])
    with pytest.raises(AssertionError, match="rows must be contiguous"):
        triton_activation.weighted_activation(x.t(), None, x[0], offsets, "relu")
