"""What is specific to the threshold gate: the smallest prefix that reaches the mass, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.moe.dispatch import make_plan
from megatron.moe.gates import create
from megatron.moe.routing import GateInput

EPS = 1e-5


def dumb(gate, x):
    """(token, expert, rank, p) kept, and the balance loss, one token at a time in float64."""
    c, W = gate.config, gate.router.weight.detach().double()
    E, T = len(W), len(x)
    kept, first, probs, margin = [], [0] * E, [0.0] * E, 1.0
    for t, row in enumerate(x.double()):
        z = [float(W[e] @ row) for e in range(E)]
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v) / total for v in z]
        order = sorted(range(E), key=lambda e: -p[e])
        before = 0.0
        for rank, e in enumerate(order):
            margin = min(margin, abs(before - c.threshold))
            if (rank == 0 or before < c.threshold or c.threshold == 1) and (not c.topk or rank < c.topk):
                kept.append((t, e, rank, p[e]))
            before += p[e]
        first[order[0]] += 1
        for e in range(E):
            probs[e] += p[e] / T
    return kept, c.loss_coeff * E * sum(first[e] / T * probs[e] for e in range(E)), margin


def run(threshold, seed=0, experts=6, tokens=9, std=1.0, **options):
    gate = create("threshold", hidden_size=8, num_experts=experts, seed=seed, init_std=std, threshold=threshold,
                  **options)
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))
    return gate, x, gate(GateInput(x))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.99, 1.0]), st.integers(0, 3),
       st.sampled_from([0.05, 0.5, 2.0]))
def test_against_the_formula(seed, threshold, cap, std):
    gate, x, out = run(threshold, seed, topk=cap, std=std, loss_coeff=0.2)
    kept, aux, margin = dumb(gate, x)
    if margin < EPS and threshold not in (0.0, 1.0):
        return  # the running sum touches the threshold: float32 and float64 may differ
    assert sorted(zip(out.token_A.tolist(), out.expert_A.tolist())) == sorted((t, e) for t, e, _, _ in kept)
    expected = {(t, e): p for t, e, _, p in kept}
    for t, e, w in zip(out.token_A.tolist(), out.expert_A.tolist(), out.weight_A.tolist()):
        assert w == pytest.approx(expected[t, e], rel=1e-4)
    assert out.aux_loss.item() == pytest.approx(aux, rel=1e-4)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.95])
def test_chosen_mass_reaches_the_threshold_and_would_not_without_the_last(threshold):
    _, _, out = run(threshold, tokens=200)
    for t in range(200):
        w = out.weight_A[out.token_A == t]
        assert w.sum() >= threshold - EPS and w.sum() - w.min() < threshold + EPS


def test_threshold_zero_is_top1_and_one_is_dense():
    gate, x, out = run(0.0)
    top1 = create("topk", hidden_size=8, num_experts=6, init_std=1.0, topk=1)(GateInput(x))
    assert out.expert_A.tolist() == top1.expert_A.tolist() and torch.equal(out.weight_A, top1.weight_A)
    gate, x, out = run(1.0, std=5.0)  # a sharp softmax: most of the tail is below fp32's resolution of 1
    dense = torch.zeros(9, 6).index_put((out.token_A, out.expert_A), out.weight_A)
    assert len(out.token_A) == 54
    torch.testing.assert_close(dense, (x @ gate.router.weight.t()).softmax(-1))


def test_a_higher_threshold_never_takes_fewer():
    counts = [len(run(t, tokens=50)[2].token_A) for t in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert counts == sorted(counts) and counts[0] == 50 and counts[-1] == 300


def test_weights_are_not_renormalised_unless_asked():
    _, _, out = run(0.5)
    sums = torch.zeros(9).index_add(0, out.token_A, out.weight_A)
    assert (sums < 0.999).any()
    _, _, out = run(0.5, norm_topk_prob=True)
    torch.testing.assert_close(torch.zeros(9).index_add(0, out.token_A, out.weight_A), torch.ones(9))


def test_capacity_keeps_better_ranks_first_then_higher_probability():
    """A token's weak first choice beats another token's strong second choice."""
    gate, x, out = run(0.95, seed=4, tokens=30)
    kept, _, _ = dumb(gate, x)
    plan = make_plan(out, 30, 6, 0, limit=4)
    kept_A = plan.routed.assignment_S
    survivors = set(zip(out.token_A[kept_A].tolist(), out.expert_A[kept_A].tolist()))
    for expert in range(6):
        mine = sorted((r, -p, t) for t, e, r, p in kept if e == expert)
        assert {t for t, e in survivors if e == expert} == {t for _, _, t in mine[:4]}


@pytest.mark.parametrize("options, message", [
    ({"threshold": 1.5}, "--threshold is 1.5"),
    ({"threshold": -0.1}, "--threshold is -0.1"),
    ({"topk": -1}, "--topk is -1"),
    ({"topk": 7}, "--topk is 7; allowed: 0 to the number of experts, which is 6"),
])
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        create("threshold", hidden_size=8, num_experts=6, **options)
