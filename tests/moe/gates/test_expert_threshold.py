"""Expert threshold: thresholds that give every expert its share, and causality."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.moe_layers import make_input, make_layer
from helpers.routings import step_totals
from megatron.moe.gate import create_gate
from megatron.moe.routing import GateInput


def make_gate(**options):
    defaults = {"hidden_size": 4, "num_experts": 4, "topk": 2, "init_std": 0.8}
    return create_gate("expert_threshold", **{**defaults, **options})


def finish_step(gate, *routings, tokens):
    """The update after a step with these micro-batches."""
    load = torch.bincount(torch.cat([r.expert_A for r in routings]), minlength=gate.num_experts)
    step = step_totals(load.float(), torch.tensor(float(tokens)))
    counts = sum(r.step_sums["logit_counts"] for r in routings)
    step.step_sums["logit_counts"] = counts.double()
    gate.post_optimizer_step(step)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 5), st.booleans())
def test_gate_matches_formula(seed, experts, rank, warm):
    """Experts, weights and gradients, in the warm-up and after it."""
    k = 1 + rank % experts
    gate = make_gate(seed=seed, num_experts=experts, topk=k, threshold_warmup_steps=3)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=g).requires_grad_()
    with torch.no_grad():
        gate.expert_threshold.copy_(torch.randn(experts, generator=g) * 0.5)
        gate.num_updates.fill_(2 if warm else 3)
    x64, W64 = (t.detach().double().requires_grad_() for t in (x, gate.router.weight))
    expected = {}
    for t in range(5):
        logits = [W64[e] @ x64[t] for e in range(experts)]
        margins = [z.item() - gate.expert_threshold[e].item() for e, z in enumerate(logits)]
        order = sorted(range(experts), key=lambda e: -margins[e])
        chosen = order[:k] if warm else [e for e in range(experts) if margins[e] > 0]
        if min(abs(m) for m in margins) < 1e-5:
            return
        for e in chosen:
            expected[t, e] = 1 / (1 + torch.exp(-logits[e]))
    out = gate(GateInput(x))
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist()))
    assert sorted(pairs) == sorted(expected) and out.aux_loss == 0
    untaken = 5 - len({t for t, _ in pairs})
    assert out.metric_means["untaken_token_fraction"].item() == pytest.approx(untaken / 5)
    if not pairs:
        return
    want_A = torch.stack([expected[pair] for pair in pairs])
    torch.testing.assert_close(out.weight_A.double(), want_A, rtol=1e-5, atol=1e-6)
    pull_A = torch.randn(len(pairs), generator=g)
    got = torch.autograd.grad((out.weight_A * pull_A).sum(), (x, gate.router.weight))
    want = torch.autograd.grad((want_A * pull_A).sum(), (x64, W64))
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_threshold_is_a_moving_quantile():
    """The first step sets the quantile; later ones are averaged with a growing decay."""
    gate = make_gate(threshold_decay=0.25, threshold_warmup_steps=1)
    theta = torch.zeros(4).double()
    for n in range(6):
        parts = [torch.randn(200, 4, generator=torch.Generator().manual_seed(n)), None]
        parts[1] = parts[0].flip(0) + 0.1 * n
        finish_step(gate, *(gate(GateInput(x)) for x in parts), tokens=400)
        logits = (torch.cat(parts) @ gate.router.weight.t()).detach().double()
        quantile = torch.quantile(logits, 1 - 2 / 4, dim=0)
        decay = min(0.25, n / (n + 10))
        theta = decay * theta + (1 - decay) * quantile
        torch.testing.assert_close(gate.expert_threshold.double(), theta, atol=0.02, rtol=0)
    assert gate.num_updates == 6 and gate.expert_threshold.dtype == torch.float32


def test_next_step_has_k_experts():
    """The same tokens again: every expert takes its share k / E, from any initial router."""
    gate = make_gate(num_experts=8, topk=3, threshold_warmup_steps=1)
    with torch.no_grad():
        gate.router.weight[:2].mul_(5).add_(1)  # two experts that all tokens would prefer
    x = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)) + 1
    finish_step(gate, gate(GateInput(x)), tokens=4000)
    load_E = torch.bincount(gate(GateInput(x)).expert_A, minlength=8) / 4000
    torch.testing.assert_close(load_E, torch.full((8,), 3 / 8), atol=0.01, rtol=0)


@pytest.mark.parametrize("updates", [0, 5])
def test_future_tokens_do_not_matter(updates):
    """Whatever tokens follow, the earlier ones' experts and weights are the same, to the bit.

    Their outputs are so up to rounding: an expert's matrix product has another number of rows.
    """
    layer = make_layer("expert_threshold", options={"threshold_warmup_steps": 5})
    with torch.no_grad():
        layer.gate.num_updates.fill_(updates)
    x, _ = make_input(12)
    changed = x.clone()
    changed[:, 7:] = make_input(5, seed=9)[0] * 3
    route = [layer.gate(GateInput(inputs[0])) for inputs in (x, changed, x[:, :7])]
    chosen = []
    for r in route:
        assignments = zip(r.token_A.tolist(), r.expert_A.tolist(), r.weight_A.tolist())
        chosen.append([assignment for assignment in assignments if assignment[0] < 7])
    assert chosen[0] == chosen[1] == chosen[2]
    outputs = [layer(inputs).y[:, :7] for inputs in (x, changed)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_evaluation_uses_frozen_thresholds():
    """Nothing is counted, and the selection is that of training."""
    gate = make_gate(threshold_warmup_steps=1)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    finish_step(gate, gate(GateInput(x)), tokens=50)
    trained = gate(GateInput(x))
    evaluated = gate.eval()(GateInput(x))
    assert not evaluated.step_sums and trained.step_sums
    assert torch.equal(trained.expert_A, evaluated.expert_A)
    assert torch.equal(trained.token_A, evaluated.token_A)


def test_untaken_tokens_pass_through():
    """A token below all thresholds gets zeros: the residual connection carries it."""
    layer = make_layer("expert_threshold", options={"threshold_warmup_steps": 1})
    with torch.no_grad():
        layer.gate.num_updates.fill_(1)
        layer.gate.expert_threshold.fill_(100.0)
    x, _ = make_input(5)
    out = layer(x)
    assert not out.y.any()
    out.y.sum().backward()
    assert not layer.gate.router.weight.grad.any()


def test_k_equal_experts_takes_all():
    """All experts take all tokens in every step; the thresholds stay as they are."""
    gate = make_gate(topk=4, threshold_warmup_steps=1)
    x = torch.randn(6, 4)
    for _ in range(3):
        out = gate(GateInput(x))
        assert len(out.token_A) == 24
        finish_step(gate, out, tokens=6)
    assert not gate.expert_threshold.any()


def test_step_without_tokens_changes_nothing():
    gate = make_gate(threshold_warmup_steps=1)
    finish_step(gate, gate(GateInput(torch.zeros(0, 4))), tokens=0)
    assert gate.num_updates == 0 and not gate.expert_threshold.any()


def test_thresholds_far_away_are_reached():
    """Logits beyond the histogram's range move a threshold by the range per step."""
    gate = make_gate(num_experts=2, topk=1, threshold_decay=0.0, threshold_warmup_steps=1)
    with torch.no_grad():
        gate.router.weight.copy_(torch.tensor([[50.0, 0, 0, 0], [-50.0, 0, 0, 0]]))
    x = torch.ones(10, 4) + torch.arange(10.0)[:, None] / 100
    for _ in range(9):
        finish_step(gate, gate(GateInput(x)), tokens=10)
    torch.testing.assert_close(
        gate.expert_threshold, torch.tensor([52.25, -52.25]), atol=0.3, rtol=0
    )


def test_active_experts_range():
    gate = make_gate(num_experts=8)
    assert gate.experts_per_token(gate.config, 8) == (0, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "--topk is 0; allowed: 1 to the number of experts"),
        ({"topk": 5}, "--topk is 5; allowed: 1 to the number of experts, which is 4"),
        ({"threshold_decay": 1.0}, "--threshold-decay is 1.0; allowed: 0 <= decay < 1"),
        ({"threshold_decay": -0.1}, "--threshold-decay is -0.1; allowed: 0 <= decay < 1"),
        ({"threshold_warmup_steps": 0}, "--threshold-warmup-steps is 0; allowed: 1 or more"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_gate(**options)
