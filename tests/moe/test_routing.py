"""Checks of the gate contract, and the shared losses against their formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import SCOPES, GateInput, LoadBalancingLoss, Routing


def make_routing(**changes):
    """A valid routing of two tokens to three experts, with some fields replaced."""
    fields = {
        "token_A": torch.tensor([0, 1]),
        "expert_A": torch.tensor([2, 0]),
        "weight_A": torch.tensor([0.5, 0.5]),
        "aux_loss": torch.tensor(0.0),
    }
    return Routing(**{**fields, **changes})


def test_valid_routing_passes():
    make_routing().check(num_tokens=2, num_choices=3)
    empty = make_routing(
        token_A=torch.empty(0, dtype=torch.int64),
        expert_A=torch.empty(0, dtype=torch.int64),
        weight_A=torch.empty(0),
    )
    assert empty.check(0, 3) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"token_A": torch.zeros(1, 2, dtype=torch.int64)}, "one-dimensional"),
        ({"expert_A": torch.tensor([1])}, "expert_A has shape"),
        ({"weight_A": torch.tensor([0.5, 0.5]).double()}, "weight_A is torch.float64"),
        ({"token_A": torch.tensor([0, 1]).int()}, "token_A is torch.int32"),
        ({"weight_A": torch.empty(2, device="meta")}, "weight_A is on meta"),
        ({"priority_A": torch.tensor([1.0])}, "priority_A"),
        ({"aux_loss": torch.zeros(1)}, "aux_loss"),
        ({"aux_loss": 0.0}, "aux_loss is of type float; allowed: a tensor"),
        ({"expert_A": [0, 1]}, "expert_A is of type list; allowed: a tensor"),
        ({"aux_loss": torch.tensor(0.0).bfloat16()}, "aux_loss"),
        ({"token_A": torch.tensor([0, 2])}, r"token_A spans \[0, 2\], allowed \[0, 2\)"),
        ({"expert_A": torch.tensor([0, 3])}, r"expert_A spans \[0, 3\], allowed \[0, 3\)"),
        ({"expert_A": torch.tensor([-1, 0])}, r"expert_A spans \[-1, 0\]"),
        (
            {"weight_A": torch.tensor([0.5, float("nan")])},
            "weight_A has 1 of 2 values that are NaN",
        ),
        ({"priority_A": torch.tensor([-float("inf"), 1.0])}, "priority_A has 1 of 2 values"),
        ({"aux_loss": torch.tensor(float("inf"))}, "aux_loss has 1 of 1 values"),
    ],
)
def test_invalid_routing_names_the_field(changes, message):
    with pytest.raises(AssertionError, match=message):
        make_routing(**changes).check(num_tokens=2, num_choices=3)


def arange(n):
    return torch.arange(n)


def test_balance_loss_grows_with_skew():
    """It equals the coefficient under uniform load."""
    inp = GateInput(torch.zeros(8, 1))
    uniform = LoadBalancingLoss.of(
        inp, torch.full((8, 4), 0.25), arange(8), arange(8) % 4, coeff=0.3
    )
    assert uniform.loss().item() == pytest.approx(0.3)
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(8, 4)
    skewed = LoadBalancingLoss.of(inp, scores, arange(8), arange(8) * 0, coeff=1.0)
    assert skewed.loss().item() == pytest.approx(4 * 0.7)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 12),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(SCOPES),
)
def test_balance_loss_equals_loops(seed, tokens, sequences, per_token, scope):
    """Values and gradients of ragged choices, for every scope, on one rank.

    Some sequences have no tokens: they are not in the mean over sequences.
    """
    g = torch.Generator().manual_seed(seed)
    size, choices = 4, tokens * 2
    logits = torch.randn(tokens, size, generator=g, dtype=torch.float64).requires_grad_()
    sequence = torch.sort(torch.randint(0, sequences, (tokens,), generator=g)).values
    token = torch.randint(0, max(1, tokens), (choices,), generator=g)
    choice = torch.randint(0, size, (choices,), generator=g)
    scores = logits.softmax(-1)
    inp = GateInput(torch.zeros(tokens, 1), None, sequence, num_sequences=sequences)
    ours = LoadBalancingLoss.of(
        inp, scores, token, choice, coeff=0.7, scope=scope, per_token=per_token
    ).loss()
    parts = [[t for t in range(tokens) if sequence[t] == n] for n in range(sequences)]
    expected = 0 * scores.sum()
    for part in parts if scope == "sequence" else [list(range(tokens))]:
        mine = [a for a in range(choices) if int(token[a]) in part]
        for e in range(size):
            f = sum(int(choice[a]) == e for a in mine) / max(
                1, len(part) if per_token else len(mine)
            )
            expected = expected + 0.7 * size * f * sum(scores[t, e] for t in part) / max(
                1, len(part)
            )
    if scope == "sequence":
        expected = expected / max(1, sum(map(bool, parts)))
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-9)
    if tokens:
        (got,) = torch.autograd.grad(ours, logits, retain_graph=True)
        torch.testing.assert_close(
            got, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-7
        )


def test_number_of_sequences_is_inferred():
    inp = GateInput(torch.zeros(4, 1), None, torch.tensor([0, 0, 1, 2]))
    term = LoadBalancingLoss.of(
        inp, torch.full((4, 2), 0.5), arange(4), arange(4) % 2, coeff=1.0, scope="sequence"
    )
    assert term.count_NG.tolist() == [[1, 1], [1, 0], [0, 1]]
    assert term.total_N.tolist() == [2, 1, 1]
    single = LoadBalancingLoss.of(
        GateInput(torch.zeros(4, 1)),
        torch.full((4, 2), 0.5),
        arange(4),
        arange(4) % 2,
        coeff=1.0,
        scope="sequence",
    )
    assert single.count_NG.tolist() == [[2, 2]]


def test_aux_losses_defer_global_terms():
    """Losses of scope global-batch are handed to the layer, the others are summed."""

    def term(scope):
        return LoadBalancingLoss.of(
            GateInput(torch.zeros(2, 1)),
            torch.tensor([[0.9, 0.1], [0.6, 0.4]]),
            arange(2),
            torch.tensor([0, 0]),
            coeff=0.5,
            scope=scope,
        )

    local_term = term("micro-batch")
    global_term = term("global-batch")
    got = aux_losses(local_term, global_term, extra=torch.tensor(2.0))
    assert got["balance"] == (global_term,)
    assert got["aux_loss"].item() == pytest.approx(2 + 0.5 * 2 * 0.75)
    assert aux_losses(global_term)["aux_loss"].item() == 0
    # Another rank chose expert 1 six times: f = 2/8 and 6/8.
    all_counts_NG = global_term.count_NG + torch.tensor([[0.0, 6.0]])
    total = global_term.loss(all_counts_NG, global_term.total_N + 6)
    assert total.item() == pytest.approx(0.5 * 2 * (2 / 8 * 0.75 + 6 / 8 * 0.25))


def test_z_loss_equals_loop():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    log_sums = [torch.log(sum(torch.exp(z) for z in logits[t])).item() for t in range(7)]
    expected = sum(value**2 for value in log_sums) / 7
    assert z_loss(logits).item() == pytest.approx(expected, rel=1e-5)
    assert z_loss(torch.empty(0, 3)).item() == 0
