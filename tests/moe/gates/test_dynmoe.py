"""DynMoE: learned thresholds, straight-through gradients, and its four losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.moe.gate import create_gate
from megatron.moe.routing import GateInput


def make_gate(**options):
    defaults = {"hidden_size": 4, "num_experts": 4, "init_std": 0.8}
    return create_gate("dynmoe", **{**defaults, **options})


def reference(gate, x, V, G, training):
    """{(token, expert): weight} with straight-through gradients, the loss and the margin.

    The gradient of a weight is that of the margin over k, so it is a number plus the
    margin minus its value.
    """
    c = gate.config
    T, E = len(x), len(V)
    length = [torch.sqrt((V[e] * V[e]).sum()) for e in range(E)]
    weights, smallest, gates_sum = {}, 1.0, 0.0
    for t in range(T):
        norm = torch.sqrt((x[t] * x[t]).sum())
        s = [1 / (1 + torch.exp(-(x[t] @ V[e]) / norm / length[e])) for e in range(E)]
        margin = [s[e] - 1 / (1 + torch.exp(-G[e])) for e in range(E)]
        smallest = min(smallest, *(abs(m.item()) for m in margin))
        chosen = [e for e in range(E) if margin[e].item() > 0]
        for e in chosen:
            gate_value = 1 + (margin[e] - margin[e].detach())
            gates_sum = gates_sum + gate_value
            weights[t, e] = gate_value / len(chosen)
        if not chosen and not training:
            best = max(range(E), key=lambda e: s[e].item())
            weights[t, best] = torch.ones((), dtype=x.dtype)
            gates_sum = gates_sum + 1
    squares = 0
    for a in range(E):
        for b in range(E):
            squares = squares + (V[a] @ V[b] / length[a] / length[b] - float(a == b)) ** 2
    loss = c.simplicity_coeff * sum(length) / E + c.efficiency_coeff * gates_sum / (T * E)
    if squares.item() > 1e-12:
        loss = loss + c.diversity_coeff * torch.sqrt(squares)
    for e in range(E):
        mine = [weights[pair] for pair in weights if pair[1] == e]
        loss = loss + c.loss_coeff * E * len(mine) / T * sum(mine) / T
    return weights, loss, smallest


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.booleans())
def test_gate_matches_formula(seed, experts, training):
    """Selected experts, weights, losses and all gradients."""
    gate = make_gate(
        seed=seed,
        num_experts=experts,
        diversity_coeff=0.3,
        simplicity_coeff=0.2,
        efficiency_coeff=0.5,
        loss_coeff=0.7,
    ).train(training)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gate.threshold_E.copy_(torch.randn(experts, generator=g) * 0.5 + 0.3)
    x = torch.randn(5, 4, generator=g).requires_grad_()
    leaves = (x, gate.router.weight, gate.threshold_E)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    weights, aux, margin = reference(gate, *wide, training)
    if margin < 1e-5:
        return
    out = gate(GateInput(x))
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist()))
    assert sorted(pairs) == sorted(weights)
    assert out.aux_loss.item() == pytest.approx(aux.item(), rel=1e-4)
    untaken = 5 - len({t for t, _ in pairs})
    assert out.metric_means["untaken_token_fraction"].item() == pytest.approx(untaken / 5)
    assert training or untaken == 0
    want_A = (
        torch.stack([weights[pair] for pair in pairs]) if pairs else wide[0].sum()[None] * 0
    )
    torch.testing.assert_close(out.weight_A.double(), want_A[: len(pairs)])
    pull_A = torch.randn(max(1, len(pairs)), generator=g)
    got = torch.autograd.grad(
        (out.weight_A * pull_A[: len(pairs)]).sum() + out.aux_loss, leaves
    )
    want = torch.autograd.grad((want_A * pull_A).sum() + aux, wide, allow_unused=True)
    for a, b in zip(got, want):
        b = torch.zeros_like(a).double() if b is None else b
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)


def test_weights_are_shares_exactly():
    """1 / k to the last bit: the straight-through term adds nothing to the value."""
    gate = make_gate(num_experts=8, hidden_size=16)
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    out = gate(GateInput(x))
    count_T = torch.bincount(out.token_A, minlength=200)
    assert torch.equal(out.weight_A, 1 / count_T[out.token_A])
    assert count_T.float().std() > 0.5, "tokens use different numbers of experts"


def test_evaluation_serves_every_token():
    """No expert in training; in evaluation the closest one, with weight 1."""
    gate = make_gate()
    with torch.no_grad():
        gate.threshold_E.fill_(5.0)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert len(gate(GateInput(x)).token_A) == 0
    out = gate.eval()(GateInput(x))
    cosine = torch.nn.functional.cosine_similarity(x[:, None], gate.router.weight[None], dim=-1)
    assert out.expert_A.tolist() == cosine.argmax(-1).tolist()
    assert out.weight_A.tolist() == [1.0] * 6 and out.token_A.tolist() == list(range(6))


def test_selection_ignores_lengths():
    """Directions alone decide; a zero vector has cosine 0 with all, and no gradient."""
    gate = make_gate()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = gate(GateInput(x))
    for scale in (1e-3, 1e3):
        out = gate(GateInput(x * scale))
        assert torch.equal(out.expert_A, expected.expert_A)
    zero = torch.zeros(1, 4, requires_grad=True)
    with torch.no_grad():
        gate.threshold_E.fill_(-1.0)
    out = gate(GateInput(zero))
    assert out.expert_A.tolist() == [0, 1, 2, 3] and out.weight_A.tolist() == [0.25] * 4
    (out.weight_A.sum() + out.aux_loss).backward()
    assert not zero.grad.any() and gate.threshold_E.grad.isfinite().all()


def test_thresholds_learn_from_the_task():
    """An expert whose output hurts raises its threshold until no token uses it."""
    gate = make_gate(diversity_coeff=0.0, simplicity_coeff=0.0, loss_coeff=0.0)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([gate.threshold_E], lr=0.1)
    assert (gate(GateInput(x)).expert_A == 2).any()
    for _ in range(100):
        out = gate(GateInput(x))
        cost_A = (out.expert_A == 2).float()
        optimizer.zero_grad()
        (out.weight_A * cost_A).sum().backward()
        optimizer.step()
    out = gate(GateInput(x))
    assert not (out.expert_A == 2).any() and (out.expert_A == 1).any()
    assert gate.threshold_E[2] > 0.3


def test_active_experts_range():
    gate = make_gate()
    assert gate.experts_per_token(gate.config, 4) == (0, 4)


@pytest.mark.parametrize("name", ["diversity", "simplicity", "efficiency"])
def test_negative_coefficients_are_refused(name):
    with pytest.raises(ValueError, match=f"--{name}-coeff is -1.0; allowed: 0 or more"):
        make_gate(**{f"{name}_coeff": -1.0})


def test_invalid_balance_options_are_refused():
    with pytest.raises(ValueError, match="--moe-loss-coeff is -1.0; allowed: 0 or more"):
        make_gate(loss_coeff=-1.0)
    with pytest.raises(
        ValueError, match="--moe-balance-scope is 'world'; allowed: micro-batch"
    ):
        make_gate(balance_scope="world")
