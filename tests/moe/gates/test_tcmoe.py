"""TC-MoE: signs, nulls without work, normalisation over all nulls, and the reward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.moe_layers import E, make_input, make_layer, reference_expert, reference_layer
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import create_gate
from megatron.moe.metrics import MoEMetrics
from megatron.moe.routing import GateInput
from megatron.parallel.groups import Groups


def reference(gate, x, W, sequences):
    """Return {(token, slot index): signed weight} of non-null choices, the loss, and
    the closest tie.

    Computed in fp64, one token at a time.
    """
    c, E, T = gate.config, gate.num_experts, len(x)
    C = len(W)
    weights, margin, squares, shares, reward, chosen = {}, 1.0, [], [], 0, []
    for t in range(T):
        z = [W[i] @ x[t] - (0 if i < E else 1 if i < 2 * E else 10) for i in range(C)]
        total = sum(torch.exp(v) for v in z)
        squares.append(torch.log(total) ** 2)
        p = [torch.exp(v) / total for v in z]
        order = sorted(range(C), key=lambda i: -p[i].item())
        margin = min(margin, (p[order[c.topk - 1]] - p[order[c.topk]]).item())
        nulls = sum(p[2 * E :])
        real = [i for i in order[: c.topk] if i < 2 * E]
        D = nulls
        for i in real:
            D = D + p[i]
        for i in real:
            weights[t, i] = (1 if i < E else -1) * p[i] / D
        rest = sum(p[: 2 * E])
        shares.append([(p[e] + p[E + e]) / rest for e in range(E)])
        reward = reward + nulls / T
        chosen.append([i % E for i in real])
    balance = 0
    for mine in sequences:
        rows = [e for t in mine for e in chosen[t]]
        for e in range(E):
            f = rows.count(e) / max(1, len(rows))
            balance = balance + E * f * sum(shares[t][e] for t in mine) / len(mine) / len(
                sequences
            )
    return (
        weights,
        c.loss_coeff * balance - c.reward_coeff * reward + c.z_loss_coeff * sum(squares) / T,
        margin,
    )


def random_gate(seed, experts, k, nulls, by_sequence):
    """Return a gate of random weights in which all kinds of choices compete."""
    gate = create_gate(
        "tcmoe",
        hidden_size=4,
        num_experts=experts,
        seed=seed,
        init_std=0.8,
        topk=k,
        num_null_experts=nulls,
        loss_coeff=0.7,
        reward_coeff=0.3,
        z_loss_coeff=0.1,
        balance_scope="sequence" if by_sequence else "micro-batch",
    )
    with torch.no_grad():
        gate.router.weight[2 * experts :, 0] += 10 * (seed % 2)
        gate.router.weight[experts : 2 * experts, 0] += 1
    return gate


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 4),
    st.booleans(),
)
def test_gate_matches_formula(seed, experts, rank, nulls, by_sequence):
    """Choices, signed weights, loss, and the gradients of input and router.

    Catches a dropped sign, a null's weight given to an expert, D without the nulls that
    were not selected, missing offsets, and a balance loss over slots instead of
    experts. For half of the seeds the null rows get +10 back, so that nulls compete.
    """
    k = 1 + rank % experts
    nulls = max(nulls, 2 - k)  # one choice without nulls is refused
    gate = random_gate(seed, experts, k, nulls, by_sequence)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=g)
    x[:, 0] = 1
    x.requires_grad_()
    x64, W64 = (t.detach().double().requires_grad_() for t in (x, gate.router.weight))
    sequences = [[0, 1, 2], [3, 4]] if by_sequence else [range(5)]
    weights, aux, margin = reference(gate, x64, W64, sequences)
    if margin < 1e-5:
        return
    out = gate(GateInput(x, sequence_T=torch.tensor([0, 0, 0, 1, 1]), num_sequences=2))
    slots = []
    for e, w in zip(out.expert_A.tolist(), out.weight_A.tolist(), strict=True):
        slots.append(e if w > 0 else e + experts)
    pairs = list(zip(out.token_A.tolist(), slots, strict=True))
    assert sorted(pairs) == sorted(weights)
    assert out.aux_loss.item() == pytest.approx(aux.item(), rel=1e-4, abs=1e-6)
    ours = out.aux_loss
    theirs = aux
    if pairs:
        expected_A = torch.stack([weights[pair] for pair in pairs])
        torch.testing.assert_close(out.weight_A.double(), expected_A, rtol=1e-4, atol=1e-6)
        pull_A = torch.randn(len(pairs), generator=g)
        ours = ours + (out.weight_A * pull_A).sum()
        theirs = theirs + (expected_A * pull_A).sum()
    actual = torch.autograd.grad(ours, (x, gate.router.weight))
    expected = torch.autograd.grad(theirs, (x64, W64))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)
    means = out.metric_means
    assert means["null_fraction"].item() == pytest.approx(1 - len(pairs) / (5 * k))
    num_negative = sum(s >= experts for s in slots)
    assert means["negative_fraction"].item() == pytest.approx(num_negative / (5 * k))


def steered(logit_of, **options):
    """Return a layer whose tokens (first feature 1) have these logits; 2E and on are nulls."""
    layer = make_layer("tcmoe", options={"topk": 2, **options})
    with torch.no_grad():
        weight = layer.gate.router.weight.zero_()
        weight[:, 0] = -60
        for index, logit in logit_of.items():
            weight[index, 0] = logit + (0 if index < E else 1 if index < 2 * E else 10)
    return layer


def one(tokens=4):
    x, _ = make_input(tokens)
    x[..., 0] = 1
    return x


def test_negative_choice_subtracts():
    """Catches the released code's dropped sign: -e gives the negative of the output of +e."""
    x = one()
    plus, minus = steered({2: 5.0, 0: 4.0})(x).y[0], steered({E + 2: 5.0, 0: 4.0})(x).y[0]
    layer = steered({2: 5.0})
    p = torch.tensor([5.0, 4.0]).softmax(0)
    torch.testing.assert_close(
        plus, p[0] * reference_expert(layer, 2, x[0]) + p[1] * reference_expert(layer, 0, x[0])
    )
    torch.testing.assert_close(
        minus,
        -p[0] * reference_expert(layer, 2, x[0]) + p[1] * reference_expert(layer, 0, x[0]),
    )


def test_expert_and_its_negative_add_up():
    x = one()
    layer = steered({2: 5.0, E + 2: 4.0})
    out = layer.gate(GateInput(x[0]))
    assert out.expert_A.tolist() == [2] * 8 and out.token_A.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    p = torch.tensor([5.0, 4.0]).softmax(0)
    torch.testing.assert_close(layer(x).y[0], (p[0] - p[1]) * reference_expert(layer, 2, x[0]))
    torch.testing.assert_close(layer(x).y[0], reference_layer(layer, x[0], out))


def rows_of(layer, x):
    rows = []
    handle = layer.experts.register_forward_pre_hook(
        lambda m, args: rows.append(sum(args[2].counts()))
    )
    y = layer(x).y[0]
    handle.remove()
    return sum(rows), y


def test_null_choice_makes_no_row():
    """Catches an expert that runs with weight 0: one null of two halves the rows, two
    leave none.
    """
    x = one(6)
    rows, y = rows_of(steered({2: 5.0, 2 * E: 4.0}), x)
    p = torch.tensor([5.0, 4.0]).softmax(0)
    assert rows == 6
    torch.testing.assert_close(y, p[0] * reference_expert(steered({}), 2, x[0]))
    layer = steered({2 * E: 5.0, 2 * E + 1: 4.0, 2: 0.0})
    rows, y = rows_of(layer, x)
    assert rows == 0 and not y.any()
    got = MoEMetrics(nn.ModuleList([layer]), Groups()).read()
    assert got["null_fraction"] == 1 and got["experts_per_token"] == 0
    assert got["experts_per_token_histogram"] == [1, 0, 0]


def test_unselected_nulls_reduce_weights():
    """D holds all null probabilities: with a third null unselected the weights sum to
    less than 1.
    """
    out = steered({2: 5.0, 3: 4.5, 2 * E: 4.0, 2 * E + 1: 4.0}).gate(GateInput(one(1)[0]))
    p = torch.tensor([5.0, 4.5, 4.0, 4.0]).softmax(0)
    torch.testing.assert_close(out.weight_A, p[:2])
    unheard = steered({2: 5.0, 3: 4.5, 1: 4.0}).gate(GateInput(one(1)[0]))
    torch.testing.assert_close(unheard.weight_A, torch.tensor([5.0, 4.5]).softmax(0))


def test_token_without_rows_trains_router():
    """It passes no gradient to experts."""
    layer = steered({2 * E: 1.0, 2 * E + 1: 1.0, 2: 0.0})
    out = layer(one())
    (out.y.sum() + out.aux_loss).backward()
    assert all(not p.grad.any() for p in layer.experts.parameters())
    assert (
        layer.gate.router.weight.grad.any()
        and torch.isfinite(layer.gate.router.weight.grad).all()
    )


def test_reward_makes_nulls_more_likely():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1
    shares = []
    for reward in (0.0, 1.0):
        gate = create_gate(
            "tcmoe",
            hidden_size=8,
            num_experts=4,
            init_std=0.3,
            loss_coeff=0.0,
            reward_coeff=reward,
        )
        with torch.no_grad():
            gate.router.weight[8:, 0] += 10
        optimizer = torch.optim.SGD(gate.parameters(), lr=1.0)
        for _ in range(20):
            out = gate(GateInput(x))
            optimizer.zero_grad()
            out.aux_loss.backward()
            optimizer.step()
        shares.append(gate(GateInput(x)).metric_means["null_fraction"].item())
    assert shares[0] < 0.5 < shares[1]


def test_initial_choices_are_positive():
    gate = create_gate("tcmoe", hidden_size=32, num_experts=8)
    stats = gate(GateInput(torch.randn(200, 32))).metric_means
    assert stats["null_fraction"] == 0 and stats["negative_fraction"] < 0.05


def test_default_number_of_nulls_is_topk():
    def gate(**options):
        return create_gate("tcmoe", hidden_size=4, num_experts=4, **options)

    assert (
        gate(topk=3).router.weight.shape == (11, 4)
        and gate(topk=3, num_null_experts=1).num_nulls == 1
    )
    active = {
        options: gate().experts_per_token(
            type(gate().config)(topk=options[0], num_null_experts=options[1]), 4
        )
        for options in ((2, -1), (2, 0), (2, 1), (4, 1), (4, 4))
    }
    assert active.pop((2, 0)) == (1, 2), "0 means none: both choices are experts"
    assert active == {(2, -1): (0, 2), (2, 1): (1, 2), (4, 1): (2, 4), (4, 4): (0, 4)}


def test_no_nulls():
    """Every choice is an expert or its negative, and the weights' magnitudes sum to 1."""
    gate = create_gate(
        "tcmoe", hidden_size=4, num_experts=4, topk=3, num_null_experts=0, init_std=0.8
    )
    assert gate.router.weight.shape == (8, 4)
    out = gate(GateInput(torch.randn(20, 4, generator=torch.Generator().manual_seed(0))))
    assert len(out.token_A) == 60 and out.metric_means["null_fraction"] == 0
    total_T = torch.zeros(20).index_add(0, out.token_A, out.weight_A.abs())
    torch.testing.assert_close(total_T, torch.ones(20))


@pytest.mark.parametrize("null", [False, True])
def test_extreme_logits_of_nulls_and_experts(null):
    """All probability on the nulls, or none: shares, weights and gradients stay finite."""
    gate = create_gate("tcmoe", hidden_size=4, num_experts=4, reward_coeff=1.0)
    x = torch.ones(3, 4)
    with torch.no_grad():
        gate.router.weight.zero_()
        gate.router.weight[8:] = 2.5e3 if null else -2.5e3
    out = gate(GateInput(x))
    (out.aux_loss + out.weight_A.sum()).backward()
    assert len(out.token_A) == (0 if null else 6)
    assert torch.isfinite(out.aux_loss) and torch.isfinite(gate.router.weight.grad).all()


def test_global_batch_balance_is_returned():
    def gate(**options):
        return create_gate(
            "tcmoe", hidden_size=4, num_experts=4, loss_coeff=0.3, reward_coeff=0.2, **options
        )

    x = torch.randn(9, 4)
    out, expected = gate(balance_scope="global-batch")(GateInput(x)), gate()(GateInput(x))
    (term,) = out.balance
    assert term.count_NG.sum() == term.total_N == len(out.token_A)
    assert (out.aux_loss + term.loss()).item() == pytest.approx(expected.aux_loss.item())
    assert out.aux_loss < 0, "the reward is known on this rank"


def test_evaluation_is_deterministic():
    """A saved state gives the same routing."""
    layer, other = make_layer("tcmoe", seed=1).eval(), make_layer("tcmoe", seed=2).eval()
    x, ids = make_input(7)
    assert torch.equal(layer(x, FFNContext(ids)).y, layer(x, FFNContext(ids)).y)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x).y, other(x).y)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "--topk is 0; allowed: 1 or more"),
        ({"topk": 5}, "--topk is 5; allowed: 1 to the number of experts, which is 4"),
        ({"num_null_experts": -2}, "--num-null-experts is -2; allowed: -1 .* or more"),
        (
            {"topk": 1, "num_null_experts": 0},
            "--num-null-experts is 0; allowed: 1 or more with --topk 1",
        ),
        ({"reward_coeff": -1e-5}, "--reward-coeff is -1e-05; allowed: 0 or more"),
        ({"z_loss_coeff": -1.0}, "--moe-z-loss-coeff is -1.0"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_gate("tcmoe", hidden_size=4, num_experts=4, **options)
