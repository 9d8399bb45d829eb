"""BASE gate: equal loads at a near-maximal total score in training, argmax in evaluation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.routings import step_totals
from megatron.moe.gate import create_gate, gate_class
from megatron.moe.gates.base_layer import ASSIGNMENT_TOLERANCE, balanced_assignment
from megatron.moe.routing import GateInput


def make(num_experts=4, seed=0, std=0.5, **where):
    return create_gate(
        "base", hidden_size=6, num_experts=num_experts, seed=seed, init_std=std, **where
    )


def draw(tokens, seed=0, columns=6):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def best_total(score):
    """Return the highest total with at most ceil(T / E) tokens per expert.

    Enumerates all ways to fill the experts, token by token.
    """
    T, E = score.shape
    best = {(0,) * E: 0.0}
    for row in score.tolist():
        following = {}
        for loads, total in best.items():
            for e in range(E):
                if loads[e] < math.ceil(T / E):
                    key = loads[:e] + (loads[e] + 1,) + loads[e + 1 :]
                    following[key] = max(following.get(key, -math.inf), total + row[e])
        best = following
    return max(best.values())


def best_total_of_many(score):
    """Return the same total by shortest augmenting paths.

    Each new token goes where it, and the tokens that it displaces, gain the most.
    """
    s, (T, E) = score.double().numpy(), score.shape
    held, free, sum_of_gains = [[] for _ in range(E)], [math.ceil(T / E)] * E, 0.0
    push = np.full((E, E), -np.inf)  # the gain of moving the best token held by a to b
    for t in range(T):
        gain, pusher = s[t].copy(), np.full(E, -1)
        while True:
            through = gain[:, None] + push
            better = through.max(0) > gain + 1e-9
            if not better.any():
                break
            pusher[better], gain[better] = through.argmax(0)[better], through.max(0)[better]
        e = max((e for e in range(E) if free[e]), key=lambda e: gain[e])
        free[e], sum_of_gains = free[e] - 1, sum_of_gains + gain[e]
        changed = {e}
        while pusher[e] >= 0:
            a = pusher[e]
            moved = max(held[a], key=lambda i: s[i, e] - s[i, a])
            held[a].remove(moved)
            held[e].append(moved)
            changed.add(e := a)
        held[e].append(t)
        for a in changed:
            push[a] = (s[held[a]] - s[held[a], a][:, None]).max(0)
    return sum_of_gains


def total(score, expert):
    return score.double().gather(1, expert[:, None]).sum().item()


def slack(score):
    """Return the allowed distance of the total: T times the tolerance times the spread."""
    score = score.double()
    return ASSIGNMENT_TOLERANCE * (score.amax(-1) - score.amin(-1)).sum().item() + 1e-9


def assert_balanced(expert, tokens, experts):
    loads = torch.bincount(expert, minlength=experts)
    assert (
        len(expert) == tokens
        and len(loads) == experts
        and loads.max() <= math.ceil(tokens / experts)
    )
    if tokens % experts == 0:
        assert loads.tolist() == [tokens // experts] * experts


KINDS = {
    "normal": lambda T, E, seed: draw(T, seed, E),
    "one expert is best for all": lambda T, E, seed: (
        draw(T, seed, E) + 5 * (torch.arange(E) == 1)
    ),
    "biased": lambda T, E, seed: draw(T, seed, E) + 4 * draw(1, seed + 1, E),
    "all equal": lambda T, E, seed: torch.full((T, E), float(seed % 7 - 3)),
    "one row for all": lambda T, E, seed: draw(1, seed, E).expand(T, E),
    "few different rows": lambda T, E, seed: (
        3 * draw(3, seed, E)[draw(T, seed, 1)[:, 0].long() % 3]
    ),
    "integers": lambda T, E, seed: (3 * draw(T, seed, E)).round(),
    "plus minus 1e4": lambda T, E, seed: 1e4 * draw(T, seed, E).sign(),
    "one token shouts": lambda T, E, seed: (
        draw(T, seed, E).index_put((torch.tensor([0]),), torch.tensor(1e4))
        if T
        else draw(T, seed, E)
    ),
    "tiny differences": lambda T, E, seed: 1000 + 1e-3 * draw(T, seed, E),
}


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(0, 9), st.integers(1, 4), st.sampled_from(sorted(KINDS))
)
def test_assignment_is_near_the_optimum(seed, tokens, experts, kind):
    """Few tokens, fewer than experts, and none: balanced, and within T epsilon of the
    optimum.
    """
    score = KINDS[kind](tokens, experts, seed)
    expert, rounds = balanced_assignment(score)
    assert expert.dtype == torch.int64 and rounds < 2000
    assert_balanced(expert, tokens, experts)
    if tokens:
        assert total(score, expert) >= best_total(score.double()) - slack(score)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 10), st.integers(1, 4), st.sampled_from(sorted(KINDS))
)
def test_both_references_agree(seed, tokens, experts, kind):
    score = KINDS[kind](tokens, experts, seed)
    assert best_total_of_many(score) == pytest.approx(
        best_total(score.double()), rel=1e-6, abs=1e-6
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("tokens, experts", [(512, 8), (507, 8), (17, 16), (32, 16)])
def test_assignment_of_many_tokens(tokens, experts, kind):
    score = KINDS[kind](tokens, experts, 3)
    expert, rounds = balanced_assignment(score)
    assert_balanced(expert, tokens, experts)
    assert total(score, expert) >= best_total_of_many(score) - slack(score)
    assert rounds < 600


@pytest.mark.parametrize("bias", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("tokens", [1024, 1020])
def test_ordinary_scores_take_few_rounds(tokens, bias):
    """They also end nearer to the optimum than the tolerance."""
    score = draw(tokens, 5, 16) + bias * draw(1, 6, 16)
    expert, rounds = balanced_assignment(score)
    assert rounds < 60
    assert total(score, expert) >= best_total_of_many(score) - slack(score) / 8


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 3e38, -3e38])
def test_extreme_scores_end_in_balance(fill):
    """Scores may be NaN, infinite or huge."""
    score = draw(64, 0, 8)
    score[::3, 2] = fill
    assert_balanced(balanced_assignment(score)[0], 64, 8)
    assert_balanced(balanced_assignment(torch.full((64, 8), fill))[0], 64, 8)


@pytest.mark.parametrize("max_rounds", [0, 1, 3])
@pytest.mark.parametrize("tokens, experts", [(64, 8), (61, 8), (5, 8)])
def test_out_of_rounds_is_still_balanced(max_rounds, tokens, experts):
    score = draw(1, 0, experts).expand(tokens, experts)
    expert, rounds = balanced_assignment(score, max_rounds)
    assert rounds <= max_rounds
    assert_balanced(expert, tokens, experts)


def test_balanced_argmax_is_not_changed():
    """Zero effect where there is nothing to balance; offsets per row and a common scale
    do not matter.
    """
    score = draw(64, 0, 8) + 20 * torch.nn.functional.one_hot(torch.randperm(64) % 8, 8)
    expert, _ = balanced_assignment(score)
    assert torch.equal(expert, score.argmax(-1))
    score = (draw(64, 0, 8) * 16).round()
    first = balanced_assignment(score)[0]
    assert torch.equal(first, balanced_assignment(score * 4)[0])
    assert torch.equal(first, balanced_assignment(score + torch.arange(64.0)[:, None])[0])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(0, 8),
    st.booleans(),
    st.sampled_from([0.1, 1.0]),
)
def test_gate_matches_formula(seed, experts, tokens, training, std):
    """Experts, weights, and their gradients for x and the router, in training and
    evaluation.
    """
    gate = make(experts, seed, std).train(training)
    x = draw(tokens, seed).requires_grad_()
    out = gate(GateInput(x))
    out.check(tokens, experts)
    x64, W64 = (
        x.detach().double().requires_grad_(),
        gate.router.weight.detach().double().requires_grad_(),
    )
    z = [[sum(W64[e][d] * row[d] for d in range(6)) for e in range(experts)] for row in x64]
    score = torch.tensor(
        [[float(v.detach()) for v in row] for row in z], dtype=torch.float64
    ).view(tokens, experts)
    assert out.token_A.tolist() == list(range(tokens)) and out.aux_loss.item() == 0
    if not training:
        assert total(score, out.expert_A) == pytest.approx(
            score.amax(-1).sum().item(), abs=1e-5
        )
    elif tokens:
        assert_balanced(out.expert_A, tokens, experts)
        assert total(score, out.expert_A) >= best_total(score) - slack(score) - 1e-5
    want = [1 / (1 + torch.exp(-z[t][e])) for t, e in enumerate(out.expert_A.tolist())]
    assert out.weight_A.tolist() == pytest.approx([float(w.detach()) for w in want], rel=1e-4)
    if tokens:
        got = torch.autograd.grad(
            sum(math.sin(1 + t) * w for t, w in enumerate(out.weight_A)),
            (x, gate.router.weight),
        )
        ref = torch.autograd.grad(
            sum(math.sin(1 + t) * w for t, w in enumerate(want)), (x64, W64)
        )
        for a, b in zip(got, ref):
            torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-4)


def test_training_loads_are_equal():
    """All tokens prefer one expert. Catches the argmax in training."""
    gate = make()
    x = gate.router.weight.detach()[2] * 3 + 0.1 * draw(40)
    out = gate(GateInput(x))
    assert torch.bincount(out.expert_A).tolist() == [10] * 4
    assert (
        out.metric_means["favourite_expert_fraction"].item() == 0.25
        and out.metric_means["auction_rounds"].item() >= 1
    )
    out = gate.eval()(GateInput(x))
    assert (
        out.expert_A.tolist() == [2] * 40
        and out.metric_means["favourite_expert_fraction"].item() == 1
    )


def test_evaluation_is_independent_per_token():
    """Catches a balanced assignment in evaluation, where a token's expert depends on others."""
    gate, x = make().eval(), draw(12)
    full = gate(GateInput(x))
    alone = [gate(GateInput(row[None])) for row in x]
    assert full.expert_A.tolist() == [out.expert_A.item() for out in alone]
    torch.testing.assert_close(full.weight_A, torch.cat([out.weight_A for out in alone]))
    assert gate_class("base").sees_other_tokens  # in training
    assert gate_class("base").experts_per_token(gate_class("base").Config(), 8) == (1, 1)


def test_training_is_repeatable_without_state():
    gate, x = make(), draw(32)
    before = {n: t.clone() for n, t in gate.state_dict().items()}
    a, b = gate(GateInput(x)), gate(GateInput(x))
    gate.post_optimizer_step(step_totals(torch.ones(4), torch.tensor(4.0)))
    assert torch.equal(a.expert_A, b.expert_A) and torch.equal(a.weight_A, b.weight_A)
    assert all(torch.equal(before[n], t) for n, t in gate.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_large_logits_and_bf16_inputs(training):
    """Logits of 1e4 have finite gradients, and bf16 inputs are scored in fp32."""
    gate = make().train(training)
    x = (1e4 * draw(9)).requires_grad_()
    out = gate(GateInput(x))
    out.weight_A.sum().backward()
    assert torch.isfinite(out.weight_A).all() and torch.isfinite(x.grad).all()
    assert torch.isfinite(gate.router.weight.grad).all()
    x = draw(9).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gate(GateInput(x))
    assert (
        torch.equal(out.weight_A, gate(GateInput(x.float())).weight_A)
        and out.weight_A.dtype == torch.float32
    )
