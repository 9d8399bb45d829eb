"""--check-routing: which routings a layer refuses, and when."""

from dataclasses import replace

import pytest
import torch

from helpers.moe_layers import make_input, make_layer


def layer_with(change, **moe):
    """A layer whose gate breaks the contract once `change` is in the returned list."""
    layer = make_layer("topk", **moe)
    changes = []
    forward = layer.gate.forward

    def faulty(inp):
        routing = forward(inp)
        return replace(routing, **change(routing)) if changes else routing

    layer.gate.forward = faulty
    return layer, changes


VALUES = {
    "expert_A spans": lambda r: {"expert_A": r.expert_A - 1},
    "weight_A has 22 of 22 values that are NaN": lambda r: {"weight_A": r.weight_A * torch.nan},
}


@pytest.mark.parametrize("message", VALUES)
def test_values_of_every_routing_are_checked(message):
    layer, changes = layer_with(VALUES[message], check_routing=True)
    x, _ = make_input(11)
    layer(x)
    changes.append(True)
    with pytest.raises(AssertionError, match=message):
        layer(x)


def test_layout_is_always_checked():
    """Shapes and dtypes, also without the flag and after the first forward pass."""
    layer, changes = layer_with(
        lambda r: {"weight_A": r.weight_A.double()}, check_routing=False
    )
    x, _ = make_input(11)
    layer(x)
    changes.append(True)
    with pytest.raises(
        AssertionError, match="weight_A is torch.float64; allowed: torch.float32"
    ):
        layer(x)


@pytest.mark.parametrize("returned", [None, (torch.zeros(1), torch.zeros(1))])
def test_other_types_than_routing_are_refused(returned):
    layer = make_layer("topk")
    layer.gate.forward = lambda inp: returned
    name = type(returned).__name__
    with pytest.raises(TypeError, match=f"^TopKGate.forward returned {name}; allowed: "):
        layer(make_input(11)[0])


def test_error_names_the_gate():
    """A model may have several gates."""
    layer, changes = layer_with(lambda r: {"aux_loss": None})
    changes.append(True)
    with pytest.raises(
        AssertionError, match="^gate topk: aux_loss is of type NoneType; allowed: a tensor$"
    ):
        layer(make_input(11)[0])


def test_first_routing_may_have_nan():
    """Without the flag NaN is the training loop's matter, which skips the step."""
    layer, changes = layer_with(
        VALUES["weight_A has 22 of 22 values that are NaN"], check_routing=False
    )
    changes.append(True)
    x, _ = make_input(11)
    assert layer(x).y.isnan().all()
