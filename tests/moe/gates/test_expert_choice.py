"""Expert choice: each expert's best tokens, equal loads, and the warning."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.moe.gate import create_gate, gate_class
from megatron.moe.routing import GateInput


def make(num_experts=4, hidden=6, seed=0, std=1.0, **options):
    return create_gate(
        "expert_choice",
        hidden_size=hidden,
        num_experts=num_experts,
        seed=seed,
        init_std=std,
        **options,
    )


def draw(tokens, seed=0, hidden=6):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))


def reference(gate, x, W):
    """Return {(token, expert): weight} in fp64, one expert at a time, and the closest tie."""
    E, T, k = len(W), len(x), gate.config.topk
    capacity = min(T, max(1, math.ceil(T * k / E)))
    p = []
    for row in x:
        z = [sum(W[e][d] * row[d] for d in range(len(row))) for e in range(E)]
        top = max(float(v.detach()) for v in z)
        exp = [torch.exp(v - top) for v in z]
        total = sum(exp)
        p.append([v / total for v in exp])
    chosen, margin = {}, 1.0
    for e in range(E):
        order = sorted(range(T), key=lambda t: -float(p[t][e].detach()))
        if capacity < T:
            margin = min(
                margin, float((p[order[capacity - 1]][e] - p[order[capacity]][e]).detach())
            )
        for t in order[:capacity]:
            chosen[t, e] = p[t][e]
    return chosen, margin


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 7),
    st.sampled_from([0.1, 1.0]),
)
def test_gate_matches_formula(seed, experts, k, tokens, std):
    """Assignments, weights, and their gradients for x and the router."""
    gate = make(experts, hidden=3, seed=seed, std=std, topk=min(k, experts))
    x = draw(tokens, seed, hidden=3).requires_grad_()
    out = gate(GateInput(x))
    out.check(tokens, experts)
    x64, W64 = (
        x.detach().double().requires_grad_(),
        gate.router.weight.detach().double().requires_grad_(),
    )
    chosen, margin = reference(gate, x64, W64)
    if margin < 1e-6:
        return  # a tie in fp32
    ours = dict(zip(zip(out.token_A.tolist(), out.expert_A.tolist()), out.weight_A))
    assert (
        len(ours) == len(out.token_A) and set(ours) == set(chosen) and out.aux_loss.item() == 0
    )
    for key, weight in ours.items():
        assert weight.item() == pytest.approx(float(chosen[key].detach()), rel=1e-4)
    if tokens:
        mix = {key: math.sin(1 + 3 * key[0] + 7 * key[1]) for key in ours}
        got = torch.autograd.grad(
            sum(mix[key] * ours[key] for key in mix), (x, gate.router.weight)
        )
        want = torch.autograd.grad(sum(mix[key] * chosen[key] for key in mix), (x64, W64))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "tokens, k, experts, expected",
    [
        (8, 2, 4, 4),
        (9, 2, 4, 5),
        (1, 1, 4, 1),
        (2, 1, 4, 1),
        (5, 4, 4, 5),
        (0, 2, 4, 0),
        (7, 1, 1, 7),
    ],
)
def test_all_loads_are_equal(tokens, k, experts, expected):
    out = make(experts, topk=k)(GateInput(draw(tokens)))
    assert torch.bincount(out.expert_A, minlength=experts).tolist() == [expected] * experts


def test_loads_are_equal_despite_preference():
    """All tokens prefer one expert. Catches token choice with a capacity, which leaves
    three idle.
    """
    gate = make(topk=1)
    x = gate.router.weight.detach()[2] * 5 + 0.01 * draw(16)
    assert (x @ gate.router.weight.T).argmax(-1).tolist() == [2] * 16
    assert torch.bincount(gate(GateInput(x)).expert_A).tolist() == [4] * 4


def test_softmax_is_over_experts():
    """Catches a softmax over tokens, and weights divided by their sum over a token's
    experts.
    """
    gate, x = make(topk=4, std=0.3), draw(9)
    out = gate(GateInput(x))
    dense = torch.zeros(9, 4).index_put((out.token_A, out.expert_A), out.weight_A)
    torch.testing.assert_close(dense, (x @ gate.router.weight.T).softmax(-1))
    out = make(topk=1, std=0.3)(GateInput(x))
    assert (torch.zeros(9).index_add(0, out.token_A, out.weight_A) < 0.99).all()


def test_tokens_have_any_number_of_experts():
    out = make(topk=1)(GateInput(draw(64)))
    taken = torch.bincount(out.token_A, minlength=64)
    assert taken.min() == 0 and taken.max() > 1
    assert out.metric_means["untaken_token_fraction"].item() == pytest.approx(
        (taken == 0).float().mean().item()
    )
    cls = gate_class("expert_choice")
    assert cls.experts_per_token(cls.Config(topk=1), 4) == (0, 4)


def test_later_tokens_affect_earlier_ones():
    """The gate sees the future, as its docstring and warning state."""
    gate = make(2, topk=1)
    W = gate.router.weight.detach()
    x = draw(4) * 0.1
    x[3] = 10 * (W[0] - W[1])  # now expert 0's best token
    first = gate(GateInput(x))
    x[3] = 10 * (W[1] - W[0])  # now expert 1's best token
    second = gate(GateInput(x))
    early = [
        {(t, e) for t, e in zip(o.token_A.tolist(), o.expert_A.tolist()) if t < 3}
        for o in (first, second)
    ]
    assert early[0] != early[1] and len(early[0]) == len(early[1]) == 3
    assert gate_class("expert_choice").sees_other_tokens


@pytest.mark.parametrize("rank, warnings", [("0", 2), ("1", 0)])
def test_warns_once_per_model(rank, warnings, caplog, monkeypatch):
    """Only the first MoE layer on rank 0 warns, in its first forward pass."""
    monkeypatch.setenv("RANK", rank)
    caplog.set_level(logging.WARNING, "megatron")
    layers = [make(layer=i, num_moe_layers=3) for i in range(3)]
    assert not caplog.messages
    for gate in layers * 3:
        gate(GateInput(draw(4)))
    make()(GateInput(draw(4)))  # another model
    found = [text for text in caplog.messages if "causal model includes the future" in text]
    assert len(found) == len(caplog.messages) == warnings


def test_large_logits_and_bf16_inputs():
    """Logits of 1e4 have finite gradients, and bf16 inputs are scored in fp32."""
    gate = make()
    x = (1e4 * draw(9)).requires_grad_()
    gate(GateInput(x)).weight_A.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(gate.router.weight.grad).all()
    x = draw(9).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gate(GateInput(x))
    assert torch.equal(out.weight_A, gate(GateInput(x.float())).weight_A)


def test_training_equals_evaluation():
    """Neither changes any state."""
    gate = make()
    before = {n: t.clone() for n, t in gate.state_dict().items()}
    x = draw(9)
    a, b = gate(GateInput(x)), gate.eval()(GateInput(x))
    assert torch.equal(a.token_A, b.token_A) and torch.equal(a.weight_A, b.weight_A)
    assert all(torch.equal(before[n], t) for n, t in gate.state_dict().items())


@pytest.mark.parametrize(
    "topk, message", [(0, "--topk is 0"), (5, "--topk is 5; allowed: 1 to .*, which is 4")]
)
def test_invalid_options_are_refused(topk, message):
    with pytest.raises(ValueError, match=message):
        make(topk=topk)
