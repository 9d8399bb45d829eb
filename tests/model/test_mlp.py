"""The dense feed-forward layer against a loop over tokens and hidden units."""

import math

import pytest
import torch

from megatron.model.mlp import MLP
from megatron.moe.experts.activations import available_activations, is_gated

SCALAR = {
    "gelu": lambda v: 0.5 * v * (1 + torch.erf(v / math.sqrt(2))),
    "relu": lambda v: v * (v > 0),
    "silu": lambda v: v / (1 + torch.exp(-v)),
}


@pytest.mark.parametrize("activation", available_activations())
def test_mlp_matches_loop(activation):
    torch.manual_seed(0)
    mlp = MLP(5, 7, activation).double()
    gated = is_gated(activation)
    names = {"up_proj.weight", "down_proj.weight"}
    if gated:
        names.add("gate_proj.weight")
    assert {n for n, _ in mlp.named_parameters()} == names
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 5, dtype=torch.float64)
    out = mlp(x)
    assert out.aux_loss is None and out.carry is None
    (out.y * weight).sum().backward()

    p = {n: q.detach().clone().requires_grad_() for n, q in mlp.named_parameters()}
    x_again = x.detach().clone().requires_grad_()
    act = SCALAR[{"swiglu": "silu", "geglu": "gelu"}.get(activation, activation)]
    total = 0.0
    for b in range(2):
        for s in range(3):
            hidden = []
            for h in range(7):
                up = p["up_proj.weight"][h] @ x_again[b, s]
                if gated:
                    hidden.append(act(p["gate_proj.weight"][h] @ x_again[b, s]) * up)
                else:
                    hidden.append(act(up))
            y = p["down_proj.weight"] @ torch.stack(hidden)
            torch.testing.assert_close(out.y[b, s], y)
            total = total + (y * weight[b, s]).sum()
    total.backward()
    torch.testing.assert_close(x.grad, x_again.grad)
    for name, q in mlp.named_parameters():
        torch.testing.assert_close(q.grad, p[name].grad, msg=lambda m, n=name: f"{n}: {m}")


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: gelu relu"):
        MLP(5, 7, "tanh")
