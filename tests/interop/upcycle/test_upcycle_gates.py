"""Factors of gates by formula, virtual groups, and routers from centres."""

from __future__ import annotations

import pytest
import torch

from megatron.interop.upcycle.gates import (
    build_gate,
    expert_rows,
    repeat_router_rows,
    set_router_centres,
    start_weights,
    uniform_weight_sum,
)
from megatron.model.meta_device import meta_device
from megatron.moe.gate import available_gates, create_gate, gate_class
from megatron.moe.routing import GateInput

HIDDEN = 16
EXPERTS = 8


def make(name: str = "topk", **options):
    return create_gate(
        name, hidden_size=HIDDEN, num_experts=EXPERTS, vocab_size=97, seed=1, **options
    )


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize(
    "options, formula",
    [
        ({}, lambda k: k / EXPERTS),
        ({"score_function": "sigmoid"}, lambda k: k / 2),
        ({"routed_scaling_factor": 3.0}, lambda k: 3 * k / EXPERTS),
        ({"score_function": "sigmoid", "routed_scaling_factor": 0.5}, lambda k: k / 4),
    ],
)
def test_sum_without_norm_follows_the_score(k, options, formula):
    assert uniform_weight_sum(make(topk=k, **options)) == pytest.approx(formula(k), rel=1e-6)


@pytest.mark.parametrize("k", [2, 5, 8])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_sum_with_norm_is_one(k, score):
    gate = make(topk=k, norm_topk_prob=True, score_function=score)
    assert uniform_weight_sum(gate) == pytest.approx(1, rel=1e-6)


def test_sum_leaves_out_choices_that_are_no_experts():
    """With equal logits all weights are 1 / 12, and 8 of 12 choices are experts.

    768 choices of 128 tokens: the standard deviation of their mean is below 0.02 of it.
    """
    gate = make(topk=6, num_null_experts=4)
    assert uniform_weight_sum(gate) == pytest.approx(6 / 12 * 8 / 12, rel=0.1)


GROUPED = [name for name in available_gates() if gate_class(name).expert_kind == "grouped"]


@pytest.mark.parametrize("name", GROUPED)
def test_every_gate_has_a_sum(name):
    gate = make(name)
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    total = uniform_weight_sum(gate)
    assert -EXPERTS < total < 10 * EXPERTS
    assert total > 0 or name == "tcmoe"
    for key, value in gate.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", GROUPED)
def test_gate_on_meta_is_built_alike(name):
    with meta_device():
        on_meta = make(name)
    built = build_gate(on_meta)
    expected = make(name).state_dict()
    assert built.state_dict().keys() == expected.keys()
    for key, value in built.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("granularity, k", [(2, 2), (2, 4), (4, 4), (8, 8)])
def test_equal_rows_choose_complete_copies(granularity, k):
    """Each slice of a copy is chosen if one is: virtual groups."""
    gate = make(topk=k, norm_topk_prob=True)
    repeat_router_rows(gate, granularity)
    routing = gate(GateInput(torch.randn(50, HIDDEN)))
    copy_Tk = (routing.expert_A.view(50, k) // granularity).sort(dim=1).values
    counts = copy_Tk.view(50, k // granularity, granularity)
    assert (counts == counts[..., :1]).all()
    weights = start_weights(gate, granularity, granularity)
    assert weights.are_one


def test_unequal_rows_do_not_choose_complete_copies():
    weights = start_weights(make(topk=4, norm_topk_prob=True), 4, 4.0)
    assert weights.lowest == 0
    assert not weights.are_one


def test_granular_factor_is_that_of_the_paper():
    """E x G^2 / T with softmax over all of E x G experts (He et al. 2024)."""
    copies, granularity, k = 2, 4, 4
    total = uniform_weight_sum(make(topk=k))
    assert granularity / total == pytest.approx(copies * granularity**2 / k)


def test_centres_have_the_size_of_random_rows():
    gate = make()
    centre_ED = torch.randn(EXPERTS, HIDDEN) * 7
    set_router_centres(gate, centre_ED)
    weight_ED = gate.router.weight.detach()
    assert weight_ED.square().mean().sqrt() == pytest.approx(gate.context.init_std, rel=1e-5)
    torch.testing.assert_close(weight_ED / weight_ED.norm(), centre_ED / centre_ED.norm())


def test_rows_of_nulls_are_left():
    gate = make(num_null_experts=2)
    before = gate.router.weight.detach().clone()
    set_router_centres(gate, torch.ones(EXPERTS, HIDDEN))
    assert torch.equal(gate.router.weight[EXPERTS:], before[EXPERTS:])
    assert len(expert_rows(gate, "--flag", 1)) == EXPERTS


@pytest.mark.parametrize("name", ["cosine", "tcmoe"])
def test_gate_without_rows_is_refused(name):
    with pytest.raises(
        ValueError, match=rf"--granularity is 2; .* Gate {name} has another router"
    ):
        repeat_router_rows(make(name), 2)
