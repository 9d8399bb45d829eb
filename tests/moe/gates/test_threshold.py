"""Threshold gate: the smallest prefix that reaches the threshold, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import make_moe_layer
from megatron.moe.dispatch.plan import build_dispatch_plan
from megatron.moe.gate import create_gate
from megatron.moe.routing import GateInput
from megatron.parallel.groups import Groups

EPS = 1e-5


def reference(gate, x):
    """Return the assigned (token, expert, rank, p) and the balance loss, token by token
    in fp64.
    """
    c, W = gate.config, gate.router.weight.detach().double()
    E, T = len(W), len(x)
    assigned, first, probs, margin = [], [0] * E, [0.0] * E, 1.0
    for t, row in enumerate(x.double()):
        z = [float(W[e] @ row) for e in range(E)]
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v) / total for v in z]
        order = sorted(range(E), key=lambda e: -p[e])
        before = 0.0
        for rank, e in enumerate(order):
            margin = min(margin, abs(before - c.threshold))
            if (rank == 0 or before < c.threshold or c.threshold == 1) and (
                not c.threshold_max_experts or rank < c.threshold_max_experts
            ):
                assigned.append((t, e, rank, p[e]))
            before += p[e]
        first[order[0]] += 1
        for e in range(E):
            probs[e] += p[e] / T
    return assigned, c.loss_coeff * E * sum(first[e] / T * probs[e] for e in range(E)), margin


def run(threshold, seed=0, experts=6, tokens=9, std=1.0, **options):
    gate = create_gate(
        "threshold",
        hidden_size=8,
        num_experts=experts,
        seed=seed,
        init_std=std,
        threshold=threshold,
        **options,
    )
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))
    return gate, x, gate(GateInput(x))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.99, 1.0]),
    st.integers(0, 3),
    st.sampled_from([0.05, 0.5, 2.0]),
)
def test_gate_matches_formula(seed, threshold, cap, std):
    gate, x, out = run(threshold, seed, threshold_max_experts=cap, std=std, loss_coeff=0.2)
    assigned, aux, margin = reference(gate, x)
    if margin < EPS and threshold not in (0.0, 1.0):
        return  # the running sum is at the threshold: fp32 and fp64 may differ
    assert sorted(zip(out.token_A.tolist(), out.expert_A.tolist())) == sorted(
        (t, e) for t, e, _, _ in assigned
    )
    expected = {(t, e): p for t, e, _, p in assigned}
    for t, e, w in zip(out.token_A.tolist(), out.expert_A.tolist(), out.weight_A.tolist()):
        assert w == pytest.approx(expected[t, e], rel=1e-4)
    assert out.aux_loss.item() == pytest.approx(aux, rel=1e-4)


def reference_loss(gate, x, W, assigned):
    """Return the weights of assigned pairs and the loss, in fp64 scalars with autograd."""
    c, E, T = gate.config, len(W), len(x)
    p, lse = [], 0.0
    for row in x:
        exp = [torch.exp(sum(W[e][d] * row[d] for d in range(len(row)))) for e in range(E)]
        p.append([v / sum(exp) for v in exp])
        lse = lse + torch.log(sum(exp)) ** 2 / T
    norm = [
        sum(p[u][e] for u, e in assigned if u == t) if c.norm_topk_prob else 1.0
        for t in range(T)
    ]
    weights = {(t, e): c.routed_scaling_factor * p[t][e] / norm[t] for t, e in assigned}
    first = [max(range(E), key=lambda e: float(row[e].detach())) for row in p]
    balance = E * sum(first.count(e) / T * sum(row[e] for row in p) / T for e in range(E))
    return weights, c.loss_coeff * balance + c.z_loss_coeff * lse


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.integers(0, 3),
    st.booleans(),
)
def test_gradients_match_formula(seed, threshold, cap, norm):
    """Of x and the router, through weights and loss; the selection itself has no gradient."""
    if norm and (threshold == 0 or cap == 1):
        return  # refused, see below
    gate, x, _ = run(
        threshold,
        seed,
        experts=4,
        tokens=3,
        std=0.5,
        threshold_max_experts=cap,
        norm_topk_prob=norm,
        loss_coeff=0.3,
        routed_scaling_factor=1.5,
        z_loss_coeff=0.1,
    )
    assigned, _, margin = reference(gate, x)
    if margin < EPS and threshold not in (0.0, 1.0):
        return
    x.requires_grad_()
    out = gate(GateInput(x))
    x64, W64 = (
        x.detach().double().requires_grad_(),
        gate.router.weight.detach().double().requires_grad_(),
    )
    weights, aux = reference_loss(gate, x64, W64, [(t, e) for t, e, _, _ in assigned])
    assert out.aux_loss.item() == pytest.approx(float(aux.detach()), rel=1e-4)
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist()))
    assert out.weight_A.tolist() == pytest.approx(
        [float(weights[pair].detach()) for pair in pairs], rel=1e-4
    )
    mix = [math.sin(1 + 3 * t + 7 * e) for t, e in pairs]
    ours = 2 * out.aux_loss + sum(m * w for m, w in zip(mix, out.weight_A))
    theirs = 2 * aux + sum(m * weights[pair] for m, pair in zip(mix, pairs))
    got, want = (
        torch.autograd.grad(ours, (x, gate.router.weight)),
        torch.autograd.grad(theirs, (x64, W64)),
    )
    for name, a, b in zip(("x", "router"), got, want):
        torch.testing.assert_close(
            a, b.float(), atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 20),
    st.sampled_from([0.05, 0.5, 2.0]),
    st.integers(0, 3),
)
def test_expert_rows_follow_demand(seed, tokens, std, cap):
    """Compute equals the assignments at every threshold.

    Catches the released code's full capacity of rows for every expert, and its
    identical initial experts.
    """
    rows, x = [], torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(seed))
    for threshold in (0.0, 0.5, 0.9, 1.0):
        gate = create_gate(
            "threshold",
            hidden_size=8,
            num_experts=6,
            seed=seed,
            init_std=std,
            threshold=threshold,
            threshold_max_experts=cap,
        )
        layer = make_moe_layer(
            gate,
            ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, ffn_hidden_size=4),
            MoEConfig(num_experts=6, gate="threshold"),
            layer=0,
            seed=seed,
            groups=Groups(),
        )
        seen = []
        layer.experts.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(args[2].counts())
        )
        layer(x)
        assigned = torch.bincount(gate(GateInput(x[0])).expert_A, minlength=6).tolist()
        assert seen == [assigned]
        rows.append(sum(assigned))
        assert not torch.equal(layer.experts.w1[0], layer.experts.w1[1])
    assert rows == sorted(rows) and rows[0] == tokens and rows[-1] == tokens * (cap or 6)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.95])
def test_selection_is_the_smallest_prefix(threshold):
    """It reaches the threshold, and would not without its last expert."""
    _, _, out = run(threshold, tokens=200)
    for t in range(200):
        w = out.weight_A[out.token_A == t]
        assert w.sum() >= threshold - EPS and w.sum() - w.min() < threshold + EPS


def test_extreme_thresholds_are_top1_and_dense():
    gate, x, out = run(0.0)
    top1 = create_gate("topk", hidden_size=8, num_experts=6, init_std=1.0, topk=1)(GateInput(x))
    assert out.expert_A.tolist() == top1.expert_A.tolist() and torch.equal(
        out.weight_A, top1.weight_A
    )
    gate, x, out = run(
        1.0, std=5.0
    )  # a sharp softmax: most of the tail is below fp32's resolution of 1
    dense = torch.zeros(9, 6).index_put((out.token_A, out.expert_A), out.weight_A)
    assert len(out.token_A) == 54
    torch.testing.assert_close(dense, (x @ gate.router.weight.t()).softmax(-1))


def test_higher_threshold_selects_no_fewer():
    counts = [len(run(t, tokens=50)[2].token_A) for t in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert counts == sorted(counts) and counts[0] == 50 and counts[-1] == 300


def test_renormalisation_is_an_option():
    _, _, out = run(0.5)
    sums = torch.zeros(9).index_add(0, out.token_A, out.weight_A)
    assert (sums < 0.999).any()
    _, _, out = run(0.5, norm_topk_prob=True)
    torch.testing.assert_close(
        torch.zeros(9).index_add(0, out.token_A, out.weight_A), torch.ones(9)
    )


def test_capacity_prefers_rank_then_probability():
    """A token's weak first choice precedes another token's strong second choice."""
    gate, x, out = run(0.95, seed=4, tokens=30)
    assigned, _, _ = reference(gate, x)
    plan = build_dispatch_plan(out, 30, 6, 0, capacity=4)
    dispatched_A = plan.routed.source_index_S[: plan.dispatched_C.sum()]
    survivors = set(
        zip(out.token_A[dispatched_A].tolist(), out.expert_A[dispatched_A].tolist())
    )
    for expert in range(6):
        mine = sorted((r, -p, t) for t, e, r, p in assigned if e == expert)
        assert {t for t, e in survivors if e == expert} == {t for _, _, t in mine[:4]}


def test_balance_scope_reaches_loss():
    gate, x, full = run(0.5, tokens=12, loss_coeff=1.0, z_loss_coeff=0.1)
    later = run(0.5, tokens=12, loss_coeff=1.0, z_loss_coeff=0.1, balance_scope="global-batch")[
        2
    ]
    (term,) = later.balance
    assert (later.aux_loss + term.loss()).item() == pytest.approx(
        full.aux_loss.item(), rel=1e-5
    )
    assert (
        term.count_NG.sum() == 12 and 0 < later.aux_loss < full.aux_loss
    )  # first choices only
    sequence = torch.arange(3).repeat_interleave(4)
    by_sequence = run(0.5, loss_coeff=1.0, balance_scope="sequence")[0](
        GateInput(x, None, sequence, num_sequences=3)
    )
    parts = [
        run(0.5, loss_coeff=1.0)[0](GateInput(x[sequence == n])).aux_loss.item()
        for n in range(3)
    ]
    assert (
        by_sequence.aux_loss.item() == pytest.approx(sum(parts) / 3, rel=1e-5)
        and not by_sequence.balance
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 1.5}, "--threshold is 1.5"),
        ({"threshold": -0.1}, "--threshold is -0.1"),
        ({"topk": -1}, "--topk is -1; allowed: 0 or more, without effect"),
        ({"threshold_max_experts": -1}, "--threshold-max-experts is -1"),
        (
            {"threshold_max_experts": 7},
            r"--threshold-max-experts is 7; allowed: 0 \(no cap\) to .*, which is 6",
        ),
        (
            {"threshold_max_experts": 1, "norm_topk_prob": True},
            "on with --threshold-max-experts 1: .*choose a larger --threshold-max-experts",
        ),
        (
            {"threshold": 0, "norm_topk_prob": True},
            "--norm-topk-prob is on with --threshold 0: .*choose a larger --thresh",
        ),
        (
            {"threshold": 0.0, "threshold_max_experts": 3, "norm_topk_prob": True},
            "--norm-topk-prob is on with --threshold 0: ",
        ),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_gate("threshold", hidden_size=8, num_experts=6, **options)


@pytest.mark.parametrize("options", [{"threshold_max_experts": 1}, {"threshold": 0.0}])
def test_single_expert_may_be_renormalised(options):
    gate = create_gate(
        "threshold", hidden_size=8, num_experts=1, norm_topk_prob=True, **options
    )
    assert gate(GateInput(torch.randn(3, 8))).weight_A.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 6), ({"threshold_max_experts": 2}, 2), ({"topk": 2}, 6), ({"topk": 99}, 6)],
)
def test_cap_limits_active_experts(options, most):
    """The sizes of a model follow the cap, and the gate ignores topk."""
    gate, _, out = run(0.95, tokens=50, std=0.1, **options)
    assert type(gate).experts_per_token(gate.config, 6) == (1, most)
    counts_T = torch.bincount(out.token_A)
    assert counts_T.max() == min(most, 6)
    assert gate.capacity_k() == 1
