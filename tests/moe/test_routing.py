"""The contract's checks and the shared losses, against their formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import SCOPES, GateInput, LoadBalancingLoss, Routing


def routing(**changes):
    fields = {
        "token_A": torch.tensor([0, 1]),
        "expert_A": torch.tensor([2, 0]),
        "weight_A": torch.tensor([0.5, 0.5]),
        "aux_loss": torch.tensor(0.0),
    }
    return Routing(**{**fields, **changes})


def test_a_good_answer_passes():
    routing().check(num_tokens=2, num_choices=3)
    empty = routing(
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
        ({"aux_loss": torch.tensor(0.0).bfloat16()}, "aux_loss"),
        ({"token_A": torch.tensor([0, 2])}, r"token_A spans \[0, 2\], allowed \[0, 2\)"),
        ({"expert_A": torch.tensor([0, 3])}, r"expert_A spans \[0, 3\], allowed \[0, 3\)"),
        ({"expert_A": torch.tensor([-1, 0])}, r"expert_A spans \[-1, 0\]"),
    ],
)
def test_a_bad_answer_is_named(changes, message):
    with pytest.raises(AssertionError, match=message):
        routing(**changes).check(num_tokens=2, num_choices=3)


def arange(n):
    return torch.arange(n)


def test_balance_loss_is_the_coefficient_when_uniform_and_grows_when_skewed():
    inp = GateInput(torch.zeros(8, 1))
    uniform = LoadBalancingLoss.of(
        inp, torch.full((8, 4), 0.25), arange(8), arange(8) % 4, coeff=0.3
    )
    assert uniform.loss().item() == pytest.approx(0.3)
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(8, 4)
    assert LoadBalancingLoss.of(
        inp, scores, arange(8), arange(8) * 0, coeff=1.0
    ).loss().item() == pytest.approx(4 * 0.7)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 12),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(SCOPES),
)
def test_balance_against_loops(seed, tokens, sequences, per_token, scope):
    """Ragged choices; values and the gradient of the scores, for every scope as one rank alone sees it."""
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
        expected = expected / sequences
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-9)
    if tokens:
        (got,) = torch.autograd.grad(ours, logits, retain_graph=True)
        torch.testing.assert_close(
            got, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-7
        )


def test_sequences_are_counted_when_their_number_is_not_given():
    inp = GateInput(torch.zeros(4, 1), None, torch.tensor([0, 0, 1, 2]))
    term = LoadBalancingLoss.of(
        inp, torch.full((4, 2), 0.5), arange(4), arange(4) % 2, coeff=1.0, scope="sequence"
    )
    assert term.count_NG.tolist() == [[1, 1], [1, 0], [0, 1]] and term.total_N.tolist() == [
        2,
        1,
        1,
    ]
    alone = LoadBalancingLoss.of(
        GateInput(torch.zeros(4, 1)),
        torch.full((4, 2), 0.5),
        arange(4),
        arange(4) % 2,
        coeff=1.0,
        scope="sequence",
    )
    assert alone.count_NG.tolist() == [[2, 2]]


def test_what_others_must_add_to_is_handed_on_and_the_rest_added_up():
    def term(scope):
        return LoadBalancingLoss.of(
            GateInput(torch.zeros(2, 1)),
            torch.tensor([[0.9, 0.1], [0.6, 0.4]]),
            arange(2),
            torch.tensor([0, 0]),
            coeff=0.5,
            scope=scope,
        )

    local, shared = term("micro-batch"), term("global-batch")
    got = aux_losses(local, shared, extra=torch.tensor(2.0))
    assert got["balance"] == (shared,)
    assert got["aux_loss"].item() == pytest.approx(2 + 0.5 * 2 * 0.75)
    assert aux_losses(shared)["aux_loss"].item() == 0
    # another rank chose expert 1 six times: f = 2/8 and 6/8
    total = shared.loss(shared.count_NG + torch.tensor([[0.0, 6.0]]), shared.total_N + 6)
    assert total.item() == pytest.approx(0.5 * 2 * (2 / 8 * 0.75 + 6 / 8 * 0.25))


def test_z_loss_against_a_loop():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    expected = (
        sum(
            torch.log(sum(torch.exp(logits[t, e]) for e in range(5))).item() ** 2
            for t in range(7)
        )
        / 7
    )
    assert z_loss(logits).item() == pytest.approx(expected, rel=1e-5)
    assert z_loss(torch.empty(0, 3)).item() == 0
