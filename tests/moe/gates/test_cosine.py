"""Cosine gate: the formula, both sides normalised, one softmax, a learned temperature."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.moe_layers import reference_topk
from helpers.routings import step_totals
from megatron.moe.gate import create_gate
from megatron.moe.routing import GateInput


def make(num_experts=5, hidden=4, seed=0, std=0.5, **options):
    return create_gate(
        "cosine",
        hidden_size=hidden,
        num_experts=num_experts,
        seed=seed,
        init_std=std,
        **options,
    )


def draw(tokens, seed=0, hidden=4):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))


def dot(a, b):
    return sum(u * v for u, v in zip(a, b))


def reference(c, x, p):
    """Return `reference_topk` of cosines over the temperature, in fp64 scalars, from the paper."""
    P, V, tau = p["projection.weight"], p["embeddings_EP"], p["temperature"][0]
    if float(tau.detach()) < c.min_temperature:
        tau = torch.tensor(c.min_temperature, dtype=torch.float64)
    logits = []
    for row in x:
        h = [dot(line, row) for line in P]
        logits.append(
            [dot(h, v) / torch.sqrt(dot(h, h)) / torch.sqrt(dot(v, v)) / tau for v in V]
        )
    return reference_topk(c, logits)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
    st.sampled_from([0, 3]),
    st.sampled_from([0.0, 0.5]),
)
def test_gate_matches_formula(seed, k, score, norm, dims, start):
    """Experts, weights, loss, and the gradients of x, projection, embeddings and
    temperature.
    """
    if k == 1 and norm:
        return
    gate = make(
        seed=seed,
        topk=k,
        score_function=score,
        norm_topk_prob=norm,
        routed_scaling_factor=1.5,
        proj_dim=dims,
        init_temperature=start,
        loss_coeff=0.3,
        z_loss_coeff=0.1,
    )
    x = draw(3, seed).requires_grad_()
    out = gate(GateInput(x))
    out.check(3, 5)
    params = dict(gate.named_parameters())
    p64 = {n: p.detach().double().requires_grad_() for n, p in params.items()}
    x64 = x.detach().double().requires_grad_()
    weights, aux, margin = reference(gate.config, x64, p64)
    if margin < 1e-5:
        return  # a tie in fp32
    assert out.aux_loss.item() == pytest.approx(float(aux.detach()), rel=1e-4)
    ours, theirs = 2 * out.aux_loss, 2 * aux
    seen = [{} for _ in x]
    for t, e, w in zip(out.token_A.tolist(), out.expert_A.tolist(), out.weight_A):
        seen[t][e] = float(w.detach())
        ours, theirs = (
            ours + math.sin(1 + 3 * t + 7 * e) * w,
            theirs + math.sin(1 + 3 * t + 7 * e) * weights[t][e],
        )
    assert seen == [
        pytest.approx({e: float(w.detach()) for e, w in row.items()}, rel=1e-4)
        for row in weights
    ]
    got = torch.autograd.grad(ours, (x, *params.values()))
    want = torch.autograd.grad(theirs, (x64, *p64.values()))
    for name, a, b in zip(("x", *params), got, want):
        torch.testing.assert_close(
            a, b.float(), atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert set(params) == {"projection.weight", "embeddings_EP", "temperature"}


def test_only_directions_matter():
    """Both sides have length 1. Catches the released code's unnormalised tokens."""
    gate, x = make(), draw(20)
    first = gate(GateInput(x))
    with torch.no_grad():
        gate.embeddings_EP *= torch.tensor([[3.0], [0.2], [50.0], [1.0], [7.0]])
        gate.projection.weight *= 5
    second = gate(GateInput(x * torch.linspace(0.01, 100, 20)[:, None]))
    assert torch.equal(first.expert_A, second.expert_A)
    torch.testing.assert_close(first.weight_A, second.weight_A, atol=1e-5, rtol=1e-4)


def test_forward_changes_no_state():
    """Catches embeddings that are overwritten in place in every forward pass."""
    gate = make()
    before = {n: t.clone() for n, t in gate.state_dict().items()}
    versions = {n: p._version for n, p in gate.named_parameters()}
    for training in (True, False):
        gate.train(training)
        for seed in range(3):
            gate(GateInput(draw(6, seed).requires_grad_())).weight_A.sum().backward()
    gate.post_optimizer_step(step_totals(torch.ones(5), torch.tensor(5.0)))
    assert all(torch.equal(before[n], t) for n, t in gate.state_dict().items())
    assert versions == {n: p._version for n, p in gate.named_parameters()}


def test_softmax_is_applied_once():
    """A token that points at one expert and away from the others gets weight 1.

    Catches a softmax of a softmax, which is at most e / (e + E - 1), here 0.4.
    """
    gate = make(hidden=3, proj_dim=3, init_temperature=0.02)
    with torch.no_grad():
        gate.projection.weight.copy_(torch.eye(3))
        gate.embeddings_EP.copy_(torch.tensor([[1.0, 0, 0]] + [[-1.0, 0, 0]] * 4))
    out = gate(GateInput(torch.tensor([[2.0, 0, 0]])))
    assert (
        out.expert_A[0] == 0
        and out.weight_A[0].item() == pytest.approx(1)
        and out.weight_A[1].item() < 1e-6
    )


@pytest.mark.parametrize("score, start", [("softmax", 0.3), ("sigmoid", 0.07)])
def test_defaults_are_those_of_paper(score, start):
    gate = make(16, score_function=score)
    assert (
        gate.temperature.tolist() == pytest.approx([start])
        and gate.temperature.dtype == torch.float32
    )
    assert gate.embeddings_EP.shape == (16, 8) and gate.projection.weight.shape == (8, 4)
    assert gate.config.loss_coeff == 0.01
    assert [len(make(e, topk=1).projection.weight) for e in (1, 3, 4, 7)] == [2, 2, 2, 3]
    assert make(proj_dim=1).embeddings_EP.shape == (5, 1)


def test_clamped_temperature_can_recover():
    gate, x = make(topk=1), draw(30)
    optimizer = torch.optim.SGD([gate.temperature], lr=0.01)
    start = gate.temperature.item()
    for _ in range(5):  # larger top-1 probabilities lower this loss: tau decreases
        optimizer.zero_grad()
        (-gate(GateInput(x)).weight_A.sum()).backward()
        optimizer.step()
    assert gate.temperature.item() < start
    with torch.no_grad():
        gate.temperature.fill_(0.01)
    at_minimum = gate(GateInput(x)).weight_A
    for below in (0.009, 0.0, -3.0):
        with torch.no_grad():
            gate.temperature.fill_(below)
        out = gate(GateInput(x))
        torch.testing.assert_close(out.weight_A, at_minimum)
        assert out.metric_means["temperature"].item() == pytest.approx(0.01)
        gate.temperature.grad = None
        out.weight_A.sum().backward()  # lower probabilities lower this loss: tau increases
        assert gate.temperature.grad.item() < 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_zero_vectors_have_no_direction(score):
    """Their cosines are 0, and nothing is NaN."""
    gate = make(score_function=score, z_loss_coeff=0.1)
    with torch.no_grad():
        gate.embeddings_EP[1] = 0
    x = torch.cat([torch.zeros(2, 4), draw(3), torch.full((1, 4), 1e-30)]).requires_grad_()
    out = gate(GateInput(x))
    assert torch.equal(gate.cosines(x)[:2], torch.zeros(2, 5)) and torch.equal(
        gate.cosines(x)[:, 1], torch.zeros(6)
    )
    (out.weight_A.sum() + out.aux_loss).backward()
    for t in (x, *gate.parameters()):
        assert torch.isfinite(t.grad).all() and t.grad.abs().max() < 1e6
    assert (
        x.grad[:2].abs().sum() == 0
        and x.grad[5].abs().sum() == 0
        and (x.grad[2:5].abs().sum(-1) > 0).all()
    )
    assert gate.embeddings_EP.grad[1].abs().sum() == 0


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_extreme_magnitudes_are_finite(scale, score):
    gate = make(
        std=100.0,
        score_function=score,
        norm_topk_prob=True,
        min_temperature=1e-4,
        init_temperature=1e-4,
    )
    x = (scale * draw(9)).requires_grad_()
    out = gate(GateInput(x))
    (out.weight_A.sum() + out.aux_loss).backward()
    assert all(torch.isfinite(t).all() for t in (out.weight_A, out.aux_loss, x.grad))
    assert all(torch.isfinite(p.grad).all() for p in gate.parameters())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bf16_is_scored_in_fp32(score):
    gate, x = make(score_function=score), draw(9).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = gate(GateInput(x))
    assert (
        torch.equal(under.weight_A, gate(GateInput(x.float())).weight_A)
        and under.weight_A.dtype == torch.float32
    )


@pytest.mark.parametrize("tokens, experts, k", [(0, 5, 2), (1, 5, 5), (3, 1, 1)])
def test_zero_tokens_and_single_expert(tokens, experts, k):
    out = make(experts, topk=k)(GateInput(draw(tokens)))
    out.check(tokens, experts)
    assert len(out.token_A) == tokens * k and torch.isfinite(out.aux_loss)


def test_balance_scope_reaches_loss():
    x, sequence = draw(12), torch.arange(3).repeat_interleave(4)
    inp = GateInput(x, None, sequence, num_sequences=3)
    parts = [
        make(loss_coeff=1.0)(GateInput(x[sequence == n])).aux_loss.item() for n in range(3)
    ]
    by_sequence = make(loss_coeff=1.0, balance_scope="sequence")(inp)
    assert (
        by_sequence.aux_loss.item() == pytest.approx(sum(parts) / 3, rel=1e-5)
        and not by_sequence.balance
    )
    full = make(loss_coeff=1.0, z_loss_coeff=0.1)(inp)
    later = make(loss_coeff=1.0, z_loss_coeff=0.1, balance_scope="global-batch")(inp)
    (term,) = later.balance
    assert (later.aux_loss + term.loss()).item() == pytest.approx(
        full.aux_loss.item(), rel=1e-5
    )
    assert term.count_NG.sum() == 24 and 0 < later.aux_loss < full.aux_loss


def test_parameters_depend_on_seed_and_layer():
    """A saved state also restores them."""
    a, b = make(seed=1), make(seed=2)
    assert not torch.equal(a.embeddings_EP, b.embeddings_EP)
    assert not torch.equal(
        a.embeddings_EP,
        create_gate(
            "cosine", hidden_size=4, num_experts=5, layer=1, seed=1, init_std=0.5
        ).embeddings_EP,
    )
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), make(seed=1).parameters()))
    with torch.no_grad():
        a.temperature.fill_(0.123)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(GateInput(draw(9))).weight_A, b(GateInput(draw(9))).weight_A)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "--topk is 0; allowed: 1 to the number of experts"),
        ({"topk": 6}, "--topk is 6; allowed: 1 to the number of experts, which is 5"),
        ({"score_function": "tanh"}, "--score-function is 'tanh'; allowed: softmax sigmoid"),
        ({"proj_dim": -1}, "--proj-dim is -1"),
        ({"min_temperature": 0.0}, "--min-temperature is 0.0; allowed: a positive number"),
        ({"init_temperature": -0.3}, "--init-temperature is -0.3"),
        (
            {"init_temperature": 0.005},
            "--init-temperature is 0.005; .* --min-temperature, which is 0.01",
        ),
        ({"topk": 1, "norm_topk_prob": True}, "--norm-topk-prob is on with --topk 1"),
        ({"loss_coeff": -1.0}, "--moe-loss-coeff is -1.0"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
