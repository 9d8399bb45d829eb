import math

import pytest
import torch

from megatron.config.schema import ACTIVATIONS
from megatron.model.mlp import MLP

SCALAR = {
    "gelu": lambda v: 0.5 * v * (1 + torch.erf(v / math.sqrt(2))),
    "relu": lambda v: v * (v > 0),
    "silu": lambda v: v / (1 + torch.exp(-v)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_a_loop(activation):
    torch.manual_seed(0)
    mlp = MLP(5, 7, activation).double()
    gated = activation in ("swiglu", "geglu")
    assert {n for n, _ in mlp.named_parameters()} == (
        {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
        if gated
        else {"up_proj.weight", "down_proj.weight"}
    )
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
                hidden.append(
                    act(p["gate_proj.weight"][h] @ x_again[b, s]) * up if gated else act(up)
                )
            y = p["down_proj.weight"] @ torch.stack(hidden)
            torch.testing.assert_close(out.y[b, s], y)
            total = total + (y * weight[b, s]).sum()
    total.backward()
    torch.testing.assert_close(x.grad, x_again.grad)
    for name, q in mlp.named_parameters():
        torch.testing.assert_close(q.grad, p[name].grad, msg=lambda m, n=name: f"{n}: {m}")
