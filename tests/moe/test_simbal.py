"""SimBal's loss on router weights: its value, and every gate with a linear router."""

import dataclasses

import pytest
import torch

from helpers.moe_layers import make_carry, make_input
from megatron.moe.gate import available_gates, create_gate, gate_class
from megatron.moe.losses import simbal_loss
from megatron.moe.routing import GateInput

NAMES = [
    name
    for name in available_gates()
    if "simbal_coeff" in {f.name for f in dataclasses.fields(gate_class(name).Config)}
]
WITHOUT = ["cosine", "dynmoe", "hash", "peer"]
"""Gates without a linear router, with an orthogonality loss of their own, or where a router
is not needed."""


def make_gate(name, **options):
    return create_gate(
        name, hidden_size=8, num_experts=4, layer=1, num_moe_layers=2, init_std=0.5, **options
    )


def aux_loss(gate, **fields):
    x, ids = make_input(9)
    torch.manual_seed(0)
    return gate(GateInput(x[0], ids[0], carry=make_carry(gate, 9), **fields)).aux_loss


def test_gates_with_a_linear_router_have_the_option():
    assert sorted({*available_gates()} - set(NAMES)) == WITHOUT


def test_loss_is_the_sum_over_entries():
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wide = weight.detach().double().requires_grad_()
    expected = 0.0
    for a in range(3):
        for b in range(3):
            product = sum(wide[a, d] * wide[b, d] for d in range(5))
            expected = expected + abs(product - (1 if a == b else 0))
    assert simbal_loss(weight).item() == pytest.approx(expected.item())
    got = torch.autograd.grad(simbal_loss(weight), weight)[0]
    torch.testing.assert_close(got.double(), torch.autograd.grad(expected, wide)[0])
    assert simbal_loss(torch.eye(4, 6)).item() == 0, "rows are orthogonal, not columns"
    assert simbal_loss(torch.ones(2, 3)).item() == 2 * 2 + 2 * 3


@pytest.mark.parametrize("name", NAMES)
def test_gate_adds_the_loss(name):
    """The coefficient times the loss of all rows, also when some tokens are padding; the
    gradient reaches the router."""
    plain, gate = make_gate(name), make_gate(name, simbal_coeff=0.25)
    expected = 0.25 * simbal_loss(gate.router.weight.detach())
    assert expected > 0.1
    torch.testing.assert_close(aux_loss(gate) - aux_loss(plain), expected)
    padding_T = torch.zeros(9, dtype=torch.bool)
    added = aux_loss(gate, padding_T=padding_T) - aux_loss(plain, padding_T=padding_T)
    torch.testing.assert_close(added, expected)
    aux_loss(gate).backward()
    assert gate.router.weight.grad.abs().sum() > 0.1


def test_router_becomes_orthogonal():
    gate = make_gate("topk", simbal_coeff=1.0, loss_coeff=0.0)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        aux_loss(gate).backward()
        optimizer.step()
    gram_EE = gate.router.weight @ gate.router.weight.t()
    torch.testing.assert_close(gram_EE, torch.eye(4), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_negative_coefficient_is_refused(name):
    with pytest.raises(ValueError, match="--simbal-coeff is -1.0; allowed: 0 or more"):
        make_gate(name, simbal_coeff=-1.0)
