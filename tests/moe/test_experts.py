"""Grouped experts against one dumb MLP per expert, value by value and gradient by name."""

import pytest
import torch

from megatron.moe.experts import GroupedExperts, activate, expert_output_std, is_gated


def dumb_activation(name, g, u):
    sigmoid = 1 / (1 + torch.exp(-g))
    gelu = g * 0.5 * (1 + torch.erf(g / 2**0.5))
    one = torch.ones_like(g) if u is None else u
    return {"relu": g * (g > 0), "gelu": gelu, "silu": g * sigmoid, "swiglu": g * sigmoid * one,
            "geglu": gelu * one}[name]


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "swiglu", "geglu"])
def test_against_a_loop(activation):
    torch.manual_seed(0)
    experts = GroupedExperts(3, 4, 6, activation, init_std=0.5, output_std=0.5).double()
    rows = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    counts = [4, 0, 3]
    y = experts(rows, counts)
    expected, start = [], 0
    for e, n in enumerate(counts):
        for x in rows[start:start + n]:
            up = experts.w3[e] @ x if is_gated(activation) else None
            expected.append(experts.w2[e] @ dumb_activation(activation, experts.w1[e] @ x, up))
        start += n
    expected = torch.stack(expected)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    names, params = zip(*experts.named_parameters())
    for name, a, b in zip(("rows", *names), torch.autograd.grad(y, (rows, *params), grad),
                          torch.autograd.grad(expected, (rows, *params), grad)):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert names == (("w1", "w2", "w3") if is_gated(activation) else ("w1", "w2"))


def test_weights_do_not_depend_on_sharding():
    whole = GroupedExperts(4, 8, 6, "swiglu", seed=3, layer=2)
    second = GroupedExperts(2, 8, 6, "swiglu", seed=3, layer=2, first=2)
    for name in ("w1", "w2", "w3"):
        assert torch.equal(getattr(whole, name)[2:], getattr(second, name))


def test_no_two_experts_start_equal():
    stacks = [GroupedExperts(4, 8, 6, "gelu", seed=s, layer=layer).w1 for s in (0, 1) for layer in (0, 1)]
    flat = torch.cat(stacks).flatten(1)
    assert (torch.pdist(flat) > 1e-3).all()


def test_initial_scales():
    experts = GroupedExperts(8, 64, 64, "gelu", init_std=0.5, output_std=0.1)
    assert experts.w1.std().item() == pytest.approx(0.5, rel=0.05)
    assert experts.w2.std().item() == pytest.approx(0.1, rel=0.05)
    assert expert_output_std(0.02, 8) == pytest.approx(0.005)


def test_meta_device_allocates_nothing():
    with torch.device("meta"):
        assert GroupedExperts(64, 1024, 4096, "swiglu").w2.is_meta


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: gelu relu"):
        activate("tanh", torch.zeros(1))
