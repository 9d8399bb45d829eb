"""DeepSeek-V2 gate: groups and the three per-sequence losses, against per-token loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.routings import step_totals
from megatron.moe.gate import create_gate
from megatron.moe.routing import SCOPES, GateInput

D = 5
SIZES = [(4, 1, 1), (6, 2, 1), (6, 3, 2), (8, 4, 2), (8, 2, 2), (3, 3, 2)]
COEFFS = ("loss_coeff", "device_loss_coeff", "communication_loss_coeff", "z_loss_coeff")


def choose(c, s, E):
    """Return a token's experts by falling probability, and the margin of the closest
    decision.
    """
    size = E // c.n_group
    groups = sorted(range(c.n_group), key=lambda g: -max(s[g * size : (g + 1) * size]))
    best = [max(s[g * size : (g + 1) * size]) for g in groups]
    margin = best[c.topk_group - 1] - best[c.topk_group] if c.topk_group < c.n_group else 1.0
    left = sorted(
        (e for e in range(E) if e // size in groups[: c.topk_group]), key=lambda e: -s[e]
    )
    if c.topk < len(left):
        margin = min(margin, s[left[c.topk - 1]] - s[left[c.topk]])
    return left[: c.topk], margin


def reference(gate, x, sequence):
    """Return weights {(token, expert): weight}, the loss, and the closest decision's
    margin.

    Computed in fp64, one token at a time. Losses as in the paper: eq. 23-25 over
    experts, 26-28 over devices, 29-31 over communication.
    """
    c, W = gate.config, gate.router.weight.detach().double().requires_grad_()
    x = x.detach().double().requires_grad_()
    E, size, weights, chosen, scores, margin, lse = (
        len(W),
        len(W) // c.n_group,
        {},
        [],
        [],
        1.0,
        0.0,
    )
    for t in range(len(x)):
        z = [sum(W[e, d] * x[t, d] for d in range(D)) for e in range(E)]
        total = sum(torch.exp(v) for v in z)
        s = [torch.exp(v) / total for v in z]
        lse = lse + torch.log(total) ** 2 / len(x)
        mine, gap = choose(c, [v.item() for v in s], E)
        norm = sum(s[e] for e in mine) if c.norm_topk_prob else 1.0
        weights.update({(t, e): c.routed_scaling_factor * s[e] / norm for e in mine})
        chosen.append(mine), scores.append(s)
        margin = min(margin, gap)
    parts = [[t for t in range(len(x)) if sequence[t] == n] for n in sorted(set(sequence))]
    if c.balance_scope != "sequence":
        parts = [list(range(len(x)))]
    loss = c.z_loss_coeff * lse
    for part in parts:
        T, K, M = len(part), c.topk, c.topk_group
        f = [E / (K * T) * sum(e in chosen[t] for t in part) for e in range(E)]
        P = [sum(scores[t][e] for t in part) / T for e in range(E)]
        loss = loss + c.loss_coeff * sum(f[e] * P[e] for e in range(E)) / len(parts)
        for d in range(c.n_group if c.n_group > 1 else 0):
            members = range(d * size, (d + 1) * size)
            P_d = sum(P[e] for e in members)
            sent = sum(any(e in members for e in chosen[t]) for t in part)
            loss = loss + c.device_loss_coeff * sum(f[e] for e in members) / size * P_d / len(
                parts
            )
            loss = loss + c.communication_loss_coeff * c.n_group / (M * T) * sent * P_d / len(
                parts
            )
    return weights, loss, margin, x, W


def total_loss(out):
    """Return the full loss as seen by one rank alone."""
    return out.aux_loss + sum(term.loss() for term in out.balance)


def make(E=8, std=0.6, seed=0, **options):
    return create_gate(
        "deepseek_v2", hidden_size=D, num_experts=E, seed=seed, init_std=std, **options
    )


@settings(max_examples=250, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(SIZES),
    st.integers(1, 8),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from(SCOPES),
    st.sampled_from([None, *COEFFS]),
    st.sampled_from([0.1, 0.6, 1.5]),
)
def test_gate_matches_formulas(seed, sizes, k, norm, sequences, scope, only, std):
    """Experts, weights, loss and gradients of x and router; all four losses or one alone."""
    E, n_group, topk_group = sizes
    k = min(k, topk_group * E // n_group)
    coeffs = {
        name: value if only in (None, name) else 0.0
        for name, value in zip(COEFFS, (0.3, 0.7, 0.5, 0.1))
    }
    gate = make(
        E,
        std,
        seed,
        topk=k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm and k > 1,
        routed_scaling_factor=1.5,
        balance_scope=scope,
        **coeffs,
    )
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(7, D, generator=g).requires_grad_()
    sequence = sorted(
        [
            *range(sequences),
            *torch.randint(0, sequences, (7 - sequences,), generator=g).tolist(),
        ]
    )
    weights, loss, margin, x64, W64 = reference(gate, x, sequence)
    if margin < 1e-5:
        return
    out = gate(GateInput(x, None, torch.tensor(sequence), num_sequences=sequences))
    out.check(7, E)
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist()))
    assert sorted(pairs) == sorted(weights)
    torch.testing.assert_close(
        out.weight_A.double(), torch.stack([weights[p] for p in pairs]), rtol=1e-4, atol=1e-7
    )
    ours = total_loss(out)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-7)
    mix = torch.randn(len(pairs), generator=g)
    got = torch.autograd.grad((out.weight_A * mix).sum() + ours, (x, gate.router.weight))
    expected = torch.autograd.grad(
        sum(weights[p] * m for p, m in zip(pairs, mix.tolist())) + loss, (x64, W64)
    )
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)


def given_logits(gate, logits):
    """Return the routing of given logits: the router is the identity."""
    gate.router.weight = torch.nn.Parameter(torch.eye(len(logits[0])))
    return gate(GateInput(torch.tensor(logits)))


def test_groups_are_scored_by_best_expert():
    """Group 0 has the larger sum, group 1 the larger maximum. V3's rule selects the
    other one.
    """
    gate = create_gate(
        "deepseek_v2", hidden_size=4, num_experts=4, n_group=2, topk_group=1, topk=1
    )
    assert given_logits(gate, [[1.0, 1.0, 1.2, -9.0]]).expert_A.tolist() == [2]


def test_closed_groups_are_never_chosen():
    """Catches masking with 0: expert 3 has probability 0 in fp32 and must win over
    closed groups.
    """
    gate = create_gate(
        "deepseek_v2", hidden_size=4, num_experts=4, n_group=2, topk_group=1, topk=2
    )
    for logits in ([-200.0, -250.0, 0.0, -300.0], [-300.0, 0.0, -200.0, -250.0]):
        out = given_logits(gate, [logits])
        assert {e // 2 for e in out.expert_A.tolist()} == {logits.index(0.0) // 2}
        assert sorted(out.weight_A.tolist()) == [0.0, 1.0]


def test_one_group_equals_topk():
    """Zero effect equals absent: with one group the device losses are constants and
    left out.
    """
    x, options = (
        torch.randn(9, D),
        {"topk": 3, "loss_coeff": 0.2, "balance_scope": "micro-batch"},
    )
    plain = create_gate("topk", hidden_size=D, num_experts=8, init_std=0.6, **options)(
        GateInput(x)
    )
    out = make(**options)(GateInput(x))
    loud = make(**options, device_loss_coeff=9.0, communication_loss_coeff=9.0)(GateInput(x))
    for other in (out, loud):
        assert torch.equal(other.expert_A, plain.expert_A) and torch.equal(
            other.weight_A, plain.weight_A
        )
        assert torch.equal(other.aux_loss, plain.aux_loss)


def test_open_groups_equal_no_groups():
    x = torch.randn(30, D)
    free, grouped = (
        make(topk=3)(GateInput(x)),
        make(topk=3, n_group=4, topk_group=4)(GateInput(x)),
    )
    assert torch.equal(free.expert_A, grouped.expert_A) and torch.equal(
        free.weight_A, grouped.weight_A
    )


@pytest.mark.parametrize("topk_group, reached", [(1, 1), (2, 2), (4, 2)])
def test_uniform_losses_equal_their_coefficients(topk_group, reached):
    """The communication loss is its coefficient when tokens reach as many groups as
    they may.
    """
    gate = make(
        std=0.0,
        topk=2,
        n_group=4,
        topk_group=topk_group,
        loss_coeff=0.0,
        device_loss_coeff=0.0,
        communication_loss_coeff=0.4,
    )
    out = gate(GateInput(torch.randn(6, D)))
    groups = [len({int(e) // 2 for e in pair}) for pair in out.expert_A.view(6, 2)]
    assert max(groups) <= reached
    assert out.aux_loss.item() == pytest.approx(0.4 * sum(groups) / 6 / topk_group)
    assert out.metric_means["groups_per_token"].item() == pytest.approx(sum(groups) / 6)
    gate = make(
        std=0.0,
        topk=2,
        n_group=4,
        topk_group=topk_group,
        loss_coeff=0.1,
        device_loss_coeff=0.2,
        communication_loss_coeff=0.0,
    )
    assert gate(GateInput(torch.randn(6, D))).aux_loss.item() == pytest.approx(0.3)


def test_token_is_sent_once_per_group():
    """Catches counting assignments: group 0 has both of token 0's and one of token 1's."""
    gate = create_gate(
        "deepseek_v2",
        hidden_size=4,
        num_experts=4,
        n_group=2,
        topk_group=2,
        topk=2,
        loss_coeff=0.0,
        device_loss_coeff=0.0,
        communication_loss_coeff=1.0,
    )
    logits = [[2.0, 1.0, 0.0, 0.0], [2.0, 0.0, 1.0, 0.0]]
    out = given_logits(gate, logits)
    P = [
        sum(
            sum(math.exp(v) for v in row[2 * d : 2 * d + 2]) / sum(math.exp(v) for v in row)
            for row in logits
        )
        / 2
        for d in range(2)
    ]
    # f'' = D / (M T) * tokens: group 0 receives 2 tokens, group 1 receives 1
    assert out.aux_loss.item() == pytest.approx(2 / (2 * 2) * (2 * P[0] + 1 * P[1]), rel=1e-5)


def test_losses_are_means_over_sequences():
    """Catches one loss per micro-batch: skewed sequences that balance each other still cost."""
    gate = create_gate(
        "deepseek_v2", hidden_size=4, num_experts=4, n_group=2, topk_group=1, topk=1
    )
    assert gate.config.balance_scope == "sequence"
    gate.router.weight = torch.nn.Parameter(torch.eye(4))
    x = torch.tensor([[9.0, 8.0, 0, 0], [8.0, 9.0, 0, 0], [0, 0, 9.0, 8.0], [0, 0, 8.0, 9.0]])
    together = gate(GateInput(x)).aux_loss.item()
    apart = gate(
        GateInput(x, None, torch.tensor([0, 0, 1, 1]), num_sequences=2)
    ).aux_loss.item()
    assert together == pytest.approx(0.003 + 0.05 + 0.02, rel=1e-3) and apart == pytest.approx(
        2 * together, rel=1e-3
    )


def test_global_batch_losses_add_up():
    """Two halves that know each other's counts have, on average, the loss of the full batch."""
    gate = make(topk=3, n_group=4, topk_group=2, balance_scope="global-batch", z_loss_coeff=0.5)
    x = torch.randn(12, D)
    full, a, b = (gate(GateInput(rows)) for rows in (x, x[:6], x[6:]))
    assert len(full.balance) == 3 and all(term.scope == "global-batch" for term in full.balance)
    for term, u, v in zip(full.balance, a.balance, b.balance, strict=True):
        count, total = u.count_NG + v.count_NG, u.total_N + v.total_N
        assert torch.equal(count, term.count_NG)
        torch.testing.assert_close(
            (u.loss(count, total) + v.loss(count, total)) / 2, term.loss()
        )
    z = 0.5 * (x @ gate.router.weight.t()).logsumexp(-1).square().mean()
    torch.testing.assert_close(full.aux_loss, z)


def test_published_size():
    """DeepSeek-V2: 6 of 160 experts in at most 3 of 8 groups; weights are 16 x probability."""
    gate = make(E=160, topk=6, n_group=8, topk_group=3, routed_scaling_factor=16.0)
    x = torch.randn(50, D)
    out = gate(GateInput(x))
    assert max(len({int(e) // 20 for e in row}) for row in out.expert_A.view(50, 6)) <= 3
    p = (x @ gate.router.weight.t()).softmax(-1)
    torch.testing.assert_close(out.weight_A, 16 * p[out.token_A, out.expert_A])
    c = type(gate).Config
    assert (c().loss_coeff, c().device_loss_coeff, c().communication_loss_coeff) == (
        0.003,
        0.05,
        0.02,
    )


@pytest.mark.parametrize("n_group, topk_group, k", [(1, 1, 3), (4, 2, 3), (2, 1, 4), (8, 3, 2)])
def test_routing_matches_transformers(n_group, topk_group, k):
    """An independent router with the same weights gives the same experts and weights."""
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    gate = make(topk=k, n_group=n_group, topk_group=topk_group, routed_scaling_factor=16.0)
    router = DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=D,
            num_attention_heads=1,
            n_routed_experts=8,
            num_experts_per_tok=k,
            n_group=n_group,
            topk_group=topk_group,
            routed_scaling_factor=16.0,
            topk_method="group_limited_greedy",
        )
    )
    router.weight.data = gate.router.weight.data
    x = torch.randn(64, D)
    out = gate(GateInput(x))
    _, weight_Tk, expert_Tk = router(x)
    theirs = torch.zeros(64, 8).scatter(1, expert_Tk, weight_Tk)
    torch.testing.assert_close(
        torch.zeros(64, 8).index_put((out.token_A, out.expert_A), out.weight_A), theirs
    )


@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_outputs_and_gradients_are_finite(tokens, scale):
    gate = make(topk=4, n_group=4, topk_group=2, norm_topk_prob=True, z_loss_coeff=0.1)
    x = (torch.randn(tokens, D) * scale).requires_grad_()
    out = gate(GateInput(x, None, torch.zeros(tokens, dtype=torch.int64), num_sequences=1))
    out.check(tokens, 8)
    grads = torch.autograd.grad(out.weight_A.sum() + out.aux_loss, (x, gate.router.weight))
    assert all(
        torch.isfinite(t).all()
        for t in (out.weight_A, out.aux_loss, *out.metric_means.values(), *grads)
    )


def test_gate_has_no_state():
    """The routing is the same before and after a step, and in evaluation."""
    gate, x = make(topk=2, n_group=2), torch.randn(4, D)
    first = gate(GateInput(x)).weight_A
    gate.post_optimizer_step(step_totals(torch.arange(8.0), torch.tensor(14.0)))
    assert torch.equal(gate.eval()(GateInput(x)).weight_A, first)
    assert list(gate.state_dict()) == ["router.weight"]
    other = make(seed=3, topk=2, n_group=2)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(GateInput(x)).weight_A, first)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "--topk is 0; allowed: 1 to the number of experts"),
        (
            {"topk": 9},
            "--topk is 9; allowed: 1 to the number of experts, which is 8",
        ),
        (
            {"topk": 5, "n_group": 4, "topk_group": 2},
            "--topk is 5; allowed: 1 to .* --topk-group groups, which is 4",
        ),
        ({"n_group": 0}, "--n-group is 0; allowed: a positive divisor"),
        (
            {"n_group": 3},
            "--n-group is 3; allowed: a divisor of the number of experts, which is 8",
        ),
        ({"topk_group": 0}, "--topk-group is 0; allowed: 1 to --n-group, which is 1"),
        (
            {"n_group": 4, "topk_group": 5},
            "--topk-group is 5; allowed: 1 to --n-group, which is 4",
        ),
        ({"topk": 1, "norm_topk_prob": True}, "--norm-topk-prob is on with --topk 1"),
        ({"loss_coeff": -1.0}, "--moe-loss-coeff is -1.0"),
        ({"device_loss_coeff": -1.0}, "--device-loss-coeff is -1.0; allowed: 0 or more"),
        (
            {"communication_loss_coeff": -1.0},
            "--communication-loss-coeff is -1.0; allowed: 0 or more",
        ),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
