"""Churn, saturation and co-activation, against loops over the tokens' sets of experts."""

import pytest
import torch

from megatron.analysis import routing_changes
from megatron.analysis.routing_changes import (
    TokenChoices,
    churn_sums,
    coactivation_counts,
    coactivation_rates,
    coactivation_summary,
    saturation_sums,
)
from megatron.moe.routing_record import RoutingRecord

CHOICES = 6
EXPERTS = 4
"""routed experts; the other choices are zero-computation experts"""


def random_sets(seed, num_tokens=50):
    """Sets of 0 to 4 choices; the first token never has any."""
    generator = torch.Generator().manual_seed(seed)
    sets = [set()]
    for _ in range(num_tokens - 1):
        size = int(torch.randint(0, 5, (), generator=generator))
        sets.append(set(torch.randperm(CHOICES, generator=generator)[:size].tolist()))
    return sets


def choices_of(sets):
    """What a gate with these sets records; each first choice is assigned twice."""
    pairs = [(t, e) for t, experts in enumerate(sets) for e in [*experts, *list(experts)[:1]]]
    token_A, expert_A = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(-1)
    part = (token_A, expert_A, torch.ones(len(pairs)))
    return TokenChoices.of(RoutingRecord(CHOICES, len(sets), [part]))


def test_churn_equals_mean_jaccard_distance():
    before, now = random_sets(1), random_sets(2)
    distances = [1 - len(a & b) / len(a | b) for a, b in zip(before, now, strict=True) if a | b]
    total, count = churn_sums(choices_of(before), choices_of(now)).tolist()
    assert count == len(distances) < len(now)
    assert total == pytest.approx(sum(distances), rel=1e-12)


def test_one_of_two_experts_replaced():
    total, count = churn_sums(choices_of([{0, 1}]), choices_of([{0, 2}])).tolist()
    assert total / count == pytest.approx(2 / 3)


def test_saturation_equals_mean_share_of_reference():
    reference, now = random_sets(3), random_sets(4)
    shares = [len(a & b) / len(a) for a, b in zip(reference, now, strict=True) if a]
    total, count = saturation_sums(choices_of(reference), choices_of(now)).tolist()
    assert count == len(shares) and total == pytest.approx(sum(shares), rel=1e-12)


def test_same_routing_is_unchanged():
    choices = choices_of(random_sets(5))
    assert churn_sums(choices, choices)[0] == 0
    total, count = saturation_sums(choices, choices).tolist()
    assert total == count > 0


@pytest.mark.parametrize("tokens_per_product", [7, 4096])
def test_coactivation_equals_counted_pairs(monkeypatch, tokens_per_product):
    monkeypatch.setattr(routing_changes, "_TOKENS_PER_PRODUCT", tokens_per_product)
    sets = random_sets(6)
    count_EE = coactivation_counts(choices_of(sets), EXPERTS)
    expected = [
        [sum(i in experts and j in experts for experts in sets) for j in range(EXPERTS)]
        for i in range(EXPERTS)
    ]
    assert count_EE.tolist() == expected
    rates = coactivation_rates(count_EE)
    others = []
    for i in range(EXPERTS):
        rate_of_i = [expected[i][j] / expected[i][i] for j in range(EXPERTS)]
        assert rates[i].tolist() == pytest.approx(rate_of_i, rel=1e-12)
        others.append([rate_of_i[j] for j in range(EXPERTS) if j != i])
    mean, largest = coactivation_summary(count_EE)
    assert mean == pytest.approx(sum(map(sum, others)) / EXPERTS / (EXPERTS - 1), rel=1e-12)
    assert largest == pytest.approx(sum(map(max, others)) / EXPERTS, rel=1e-12)


def test_unused_experts_do_not_count_in_coactivation():
    """Experts 0 and 1 always come together; 2 and 3 have no tokens."""
    mean, largest = coactivation_summary(coactivation_counts(choices_of([{0, 1}] * 3), EXPERTS))
    assert mean == pytest.approx(1 / 3) and largest == 1
    assert coactivation_summary(coactivation_counts(choices_of([set()]), EXPERTS)) is None
    assert coactivation_summary(coactivation_counts(choices_of([{0}]), 1)) is None
