"""LongCat: identity paths, and biases that hold the mean number of FFN experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.moe_layers import make_input, make_layer, reference_expert
from helpers.routings import step_totals
from megatron.moe.gate import create_gate
from megatron.moe.routing import GateInput


def make_gate(**options):
    defaults = {"hidden_size": 4, "num_experts": 4, "topk": 3, "init_std": 0.8}
    return create_gate("longcat", **{**defaults, **options})


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3), st.integers(0, 6))
def test_gate_matches_formula(seed, experts, identities, rank):
    """Choices by p + b, weights scale * p, identity paths of a token in one assignment."""
    k = 1 + rank % (experts + identities)
    gate = make_gate(
        seed=seed,
        num_experts=experts,
        num_identity_experts=identities,
        topk=k,
        target_ffn_experts=k if k > identities else 0.0,
        routed_scaling_factor=1.5,
    )
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=g).requires_grad_()
    with torch.no_grad():
        gate.expert_bias.copy_(torch.randn(experts, generator=g) * 0.3)
    x64, W64 = (t.detach().double().requires_grad_() for t in (x, gate.router.weight))
    expected, ffn = {}, 0
    for t in range(5):
        exps = [torch.exp(W64[c] @ x64[t]) for c in range(experts + identities)]
        p = [v / sum(exps) for v in exps]
        ranked = [float(v.detach()) for v in p]
        for e in range(experts):
            ranked[e] += gate.expert_bias[e].item()
        order = sorted(range(len(p)), key=lambda c: -ranked[c])
        if k < len(p) and ranked[order[k - 1]] - ranked[order[k]] < 1e-5:
            return
        for c in order[:k]:
            key = t, min(c, experts)
            expected[key] = expected.get(key, 0) + 1.5 * p[c]
            ffn += c < experts
    out = gate(GateInput(x))
    out.check(5, experts + len(gate.zero_computation_experts))
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist()))
    assert sorted(pairs) == sorted(expected) and out.aux_loss == 0
    assert out.metric_means["ffn_experts_per_token"].item() == pytest.approx(ffn / 5)
    want_A = torch.stack([expected[pair] for pair in pairs])
    torch.testing.assert_close(out.weight_A.double(), want_A, rtol=1e-5, atol=1e-6)
    pull_A = torch.randn(len(pairs), generator=g)
    got = torch.autograd.grad((out.weight_A * pull_A).sum(), (x, gate.router.weight))
    want = torch.autograd.grad((want_A * pull_A).sum(), (x64, W64))
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_equals_released_router():
    """transformers' router on the same weights and bias: choices and weights."""
    from transformers.models.longcat_flash.configuration_longcat_flash import (
        LongcatFlashConfig,
    )
    from transformers.models.longcat_flash.modeling_longcat_flash import (
        LongcatFlashTopkRouter,
    )

    config = LongcatFlashConfig(
        hidden_size=8, n_routed_experts=6, zero_expert_num=3, moe_topk=4, num_experts_per_tok=4
    )
    theirs = LongcatFlashTopkRouter(config)
    gate = make_gate(hidden_size=8, num_experts=6, topk=4)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        theirs.classifier.weight.copy_(gate.router.weight)
        gate.expert_bias.copy_(torch.randn(6, generator=g) * 0.1)
        theirs.e_score_correction_bias[:6] = gate.expert_bias
    x = torch.randn(20, 8, generator=g)
    _, weight_Tk, expert_Tk = theirs(x)
    want = torch.zeros(20, 7).index_put(
        (torch.arange(20)[:, None], expert_Tk.clamp_max(6)), weight_Tk, accumulate=True
    )
    out = gate(GateInput(x))
    got = torch.zeros(20, 7).index_put((out.token_A, out.expert_A), out.weight_A)
    torch.testing.assert_close(got, want)


def test_layer_adds_weighted_input():
    """An identity path returns x; it costs no row of an expert."""
    layer = make_layer("longcat", options={"topk": 2, "num_identity_experts": 2})
    with torch.no_grad():
        layer.gate.router.weight.zero_()
        layer.gate.expert_bias.copy_(torch.tensor([5.0, -5.0, -5.0, -5.0]))
    x, _ = make_input(6)
    p = 6.0 / 6  # six equal choices, times the scale
    expected = p * reference_expert(layer, 0, x[0]) + p * x[0]
    torch.testing.assert_close(layer(x).y[0], expected)
    assert layer.counters[True]["dispatched_C"].tolist() == [6, 0, 0, 0, 6]


def test_bias_follows_load_error():
    """b_i += mu (K_e / K / N - T_i / (K T)); a step without tokens changes nothing."""
    gate = make_gate(bias_update_speed=0.5, target_ffn_experts=2.0)
    load_E = torch.tensor([10.0, 4.0, 0.0, 6.0])
    gate.post_optimizer_step(step_totals(load_E, torch.tensor(10.0)))
    expected = [0.5 * (2 / 3 / 4 - load / 30) for load in load_E.tolist()]
    assert gate.expert_bias.tolist() == pytest.approx(expected)
    gate.post_optimizer_step(step_totals(torch.zeros(4), torch.tensor(0.0)))
    assert gate.expert_bias.tolist() == pytest.approx(expected)
    assert gate.expert_bias.dtype == torch.float32
    still = make_gate(bias_update_speed=0.0)
    still.post_optimizer_step(step_totals(load_E, torch.tensor(10.0)))
    assert not still.expert_bias.any()


def test_mean_ffn_experts_reaches_target():
    """From a skewed start: K_e FFN experts per token, with equal loads."""
    gate = make_gate(hidden_size=8, num_experts=8, topk=4, init_std=0.3, bias_update_speed=0.1)
    gate.router.weight.data[0] += 0.5
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    history = []
    for _ in range(150):
        out = gate(GateInput(x))
        load_E = torch.bincount(out.expert_A, minlength=9)[:8].float()
        gate.post_optimizer_step(step_totals(load_E, torch.tensor(512.0)))
        history.append(load_E)
    assert abs(history[0].sum() / 512 - 8 / 3) > 0.05
    last = torch.stack(history[-20:]).mean(0)
    assert (last.sum() / 512).item() == pytest.approx(4 * 2 / 3, rel=0.02)
    assert last.std() / last.mean() < 0.05 < history[0].std() / history[0].mean()


def test_active_experts_and_automatic_numbers():
    """Half as many identities as experts, and two thirds of topk FFN experts."""
    gate = make_gate(num_experts=512, topk=12)
    c = gate.config
    assert c.num_identities(512) == 256 and c.target(512) == 8
    assert gate.router.weight.shape == (768, 4)
    assert gate.experts_per_token(c, 512) == (0, 12)
    plain = make_gate(num_identity_experts=0, topk=3)
    assert plain.experts_per_token(plain.config, 4) == (3, 3)
    assert plain.config.target(4) == 3 and not len(plain.zero_computation_experts)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "--topk is 0; allowed: 1 or more"),
        ({"topk": 7}, "--topk is 7; allowed: 1 to the number of choices, which is 6"),
        ({"num_identity_experts": -2}, "--num-identity-experts is -2; allowed: -1"),
        ({"target_ffn_experts": 4.0}, "--target-ffn-experts is 4.0; allowed: 0 .* is 3"),
        ({"target_ffn_experts": 0.5}, "--target-ffn-experts is 0.5; allowed: at least 1,"),
        ({"bias_update_speed": -1.0}, "--bias-update-speed is -1.0; allowed: 0 or more"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_gate(**options)
