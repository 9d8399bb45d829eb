"""Null experts of the top-k gate (AdaMoE): choices that return 0."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.moe_layers import make_input, make_layer, reference_expert
from megatron.moe.gate import create_gate
from megatron.moe.routing import GateInput


def make_gate(**options):
    defaults = {"hidden_size": 4, "num_experts": 3, "topk": 3, "num_null_experts": 2}
    return create_gate("topk", init_std=0.8, **{**defaults, **options})


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 5),
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
)
def test_gate_matches_formula(seed, experts, nulls, rank, function, norm):
    """Choices, weights, the balance loss with averaged nulls, and all gradients."""
    k = 1 + rank % (experts + nulls)
    norm = norm and k > 1
    gate = make_gate(
        seed=seed,
        num_experts=experts,
        num_null_experts=nulls,
        topk=k,
        score_function=function,
        norm_topk_prob=norm,
        loss_coeff=0.7,
    )
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=g).requires_grad_()
    x64, W64 = (t.detach().double().requires_grad_() for t in (x, gate.router.weight))
    C = experts + nulls
    expected, counts, means = {}, [0.0] * C, [0.0] * C
    for t in range(5):
        z = [W64[c] @ x64[t] for c in range(C)]
        if function == "softmax":
            s = [torch.exp(v) for v in z]
            s = [v / sum(s) for v in s]
        else:
            s = [1 / (1 + torch.exp(-v)) for v in z]
        order = sorted(range(C), key=lambda c: -z[c].item())
        if k < C and z[order[k - 1]].item() - z[order[k]].item() < 1e-5:
            return
        total = sum(s[c] for c in order[:k]) if norm else 1
        for c in order[:k]:
            expected[t, c] = s[c] / total
            counts[c] += 1
        for c in range(C):
            means[c] = means[c] + s[c] / sum(s) / 5
    counts[experts:] = [sum(counts[experts:]) / nulls] * nulls
    aux = 0.7 * C * sum(count / (5 * k) * mean for count, mean in zip(counts, means))
    out = gate(GateInput(x))
    out.check(5, C)
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist()))
    assert sorted(pairs) == sorted(expected)
    assert out.aux_loss.item() == pytest.approx(aux.item(), rel=1e-4)
    want_A = torch.stack([expected[pair] for pair in pairs])
    torch.testing.assert_close(out.weight_A.double(), want_A, rtol=1e-5, atol=1e-6)
    pull_A = torch.randn(len(pairs), generator=g)
    got = torch.autograd.grad(
        (out.weight_A * pull_A).sum() + out.aux_loss, (x, gate.router.weight)
    )
    want = torch.autograd.grad((want_A * pull_A).sum() + aux, (x64, W64))
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)


def test_nulls_return_zero_and_take_no_rows():
    layer = make_layer("topk", options={"topk": 2, "num_null_experts": 1})
    with torch.no_grad():
        layer.gate.router.weight.zero_()
        layer.gate.router.weight[[0, 4], 0] = 5.0  # expert 0 and the null
    x, _ = make_input(6)
    x[..., 0] = 1.0
    out = layer(x)
    probs = layer.gate.router(x[0]).softmax(-1)
    torch.testing.assert_close(out.y[0], probs[:, :1] * reference_expert(layer, 0, x[0]))
    assert layer.counters[True]["dispatched_C"].tolist() == [6, 0, 0, 0, 6]
    assert layer.step_sums["load_E"].tolist() == [6, 0, 0, 0]


def test_more_null_probability_uses_fewer_experts():
    """A token may have from k - n experts to k; without nulls the gate is what it was."""
    gate = make_gate(num_experts=4, topk=3)
    assert gate.experts_per_token(gate.config, 4) == (1, 3)
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    out = gate(GateInput(x))
    used_T = torch.bincount(out.token_A[out.expert_A < 4], minlength=200)
    assert set(used_T.tolist()) == {1, 2, 3}
    plain = make_gate(num_null_experts=0, num_experts=4, topk=3)
    assert plain.router.weight.shape == (4, 4) and not len(plain.zero_computation_experts)
    assert plain.experts_per_token(plain.config, 4) == (3, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_null_experts": -1}, "--num-null-experts is -1; allowed: 0 or more"),
        ({"topk": 6}, "--topk is 6; allowed: 1 to the number of experts and nulls, which is 5"),
        ({"bias_rule": "sign"}, "--num-null-experts is 2; allowed: 0 with --n-group above 1"),
        ({"expert_scale": True}, "--num-null-experts is 2; allowed: 0 with --n-group above 1"),
        (
            {"n_group": 3, "topk_group": 3},
            "--num-null-experts is 2; allowed: 0 with --n-group above 1",
        ),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_gate(**options)
