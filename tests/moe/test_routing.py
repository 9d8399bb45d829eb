"""The contract's checks and the shared losses, against their formulas."""

import pytest
import torch

from megatron.moe.routing import Routing, balance_loss, mean_load, z_loss


def routing(**changes):
    fields = {"token_A": torch.tensor([0, 1]), "expert_A": torch.tensor([2, 0]), "weight_A": torch.tensor([0.5, 0.5]),
              "aux_loss": torch.tensor(0.0)}
    return Routing(**{**fields, **changes})


def test_a_good_answer_passes():
    routing().check(num_tokens=2, num_choices=3)
    empty = routing(token_A=torch.empty(0, dtype=torch.int64), expert_A=torch.empty(0, dtype=torch.int64),
                    weight_A=torch.empty(0))
    assert empty.check(0, 3) is None


@pytest.mark.parametrize("changes, message", [
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
])
def test_a_bad_answer_is_named(changes, message):
    with pytest.raises(AssertionError, match=message):
        routing(**changes).check(num_tokens=2, num_choices=3)


def test_balance_loss_is_one_when_uniform_and_grows_when_skewed():
    uniform = torch.full((6, 4), 0.25)
    assert balance_loss(torch.full((4,), 0.25), uniform).item() == pytest.approx(1.0)
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(6, 4)
    load = mean_load(torch.zeros(6, dtype=torch.int64), 4)
    assert load.tolist() == [1, 0, 0, 0]
    assert balance_loss(load, scores).item() == pytest.approx(4 * 0.7)


def test_losses_against_loops():
    torch.manual_seed(0)
    logits = torch.randn(7, 5, requires_grad=True)
    expert_A = torch.randint(0, 5, (9,))
    probs = logits.softmax(-1)
    expected = 0.0
    for e in range(5):
        f = sum(1 for x in expert_A.tolist() if x == e) / 9
        expected += 5 * f * sum(probs[t, e].item() for t in range(7)) / 7
    assert balance_loss(mean_load(expert_A, 5), probs).item() == pytest.approx(expected, rel=1e-5)
    expected = sum(torch.log(sum(torch.exp(logits[t, e]) for e in range(5))).item() ** 2 for t in range(7)) / 7
    assert z_loss(logits).item() == pytest.approx(expected, rel=1e-5)


def test_no_tokens_give_zero():
    assert balance_loss(mean_load(torch.empty(0, dtype=torch.int64), 3), torch.empty(0, 3)).item() == 0
    assert z_loss(torch.empty(0, 3)).item() == 0
