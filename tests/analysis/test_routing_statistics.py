"""Statistics of routing traces against counts that look at one assignment at a time."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from helpers.traces import assignments_of, drawn_layer, drawn_trace, layer_of_lists
from megatron.analysis.routing_statistics import (
    bin_width,
    binned_load,
    co_activation,
    expert_profiles,
    experts_per_token,
    most_used,
    routed_experts_per_token,
    weight_entropy,
)
from megatron.moe.routing_trace import RoutingTrace

LAYERS = [
    drawn_layer(40, 6, 4),
    drawn_layer(40, 3, 3, least=1, zero=2, seed=1),
    layer_of_lists([[]] * 40),
]
TRACE = drawn_trace(40, LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("max_bins", [2, 4, 100])
def test_load_of_bins_is_counted(layer, max_bins):
    width = bin_width(layer.num_choices, max_bins)
    chosen = [e for pairs in assignments_of(layer) for e, _ in pairs]
    mean = max(1, len(chosen)) / layer.num_choices
    expected = []
    for first in range(0, layer.num_choices, width):
        members = range(first, min(first + width, layer.num_choices))
        load = sum(chosen.count(e) for e in members) / len(members)
        expected.append(load / mean)
    assert len(expected) <= max_bins
    assert binned_load(layer, max_bins) == pytest.approx(expected)


def test_experts_per_token_are_counted():
    found = experts_per_token(TRACE)
    expected = [[len(assignments_of(layer)[t]) for layer in LAYERS] for t in range(40)]
    assert found.tolist() == expected
    routed = routed_experts_per_token(TRACE)
    for t in range(40):
        chosen = [sum(e < x.num_experts for e, _ in assignments_of(x)[t]) for x in LAYERS]
        assert routed[t] == sum(chosen)
    assert routed_experts_per_token(RoutingTrace((LAYERS[0],))) is None


def test_entropy_follows_its_definition():
    expected = []
    for t in range(40):
        total = 0.0
        for layer in LAYERS:
            sizes = [abs(w) for _, w in assignments_of(layer)[t]]
            total -= sum(s / sum(sizes) * math.log(s / sum(sizes)) for s in sizes)
        expected.append(total / len(LAYERS))
    assert weight_entropy(TRACE) == pytest.approx(expected, abs=1e-12)


def test_entropy_of_zero_weights_is_zero():
    layer = layer_of_lists([[0, 1]])
    layer.weight_A.zero_()
    assert weight_entropy(RoutingTrace((layer,))).tolist() == [0]


def test_most_used_experts_are_listed():
    layer = layer_of_lists([[3, 1], [3], [1], [5], [0]], num_experts=6)
    assert most_used(layer, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert most_used(layer, 2).tolist() == [1, 3]
    assert most_used(layer, 3).tolist() == [0, 1, 3], "the smaller of equal ones"
    assert most_used(layer_of_lists([[]]), 2).tolist() == []


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("limit", [2, 100])
def test_co_activation_counts_positions(layer, limit):
    """A position that has an expert twice counts once."""
    listed = most_used(layer, limit)
    sets = [{e for e, _ in pairs} for pairs in assignments_of(layer)]
    expected = [[sum({i, j} <= chosen for chosen in sets) for j in listed] for i in listed]
    assert co_activation(layer, listed).tolist() == expected


@pytest.mark.parametrize("layer", LAYERS)
def test_uses_of_experts_are_counted(layer):
    """Counts, lifts and the order of tokens equal a loop over the positions."""
    generator = np.random.default_rng(3)
    keys = generator.integers(0, 9, 40)
    classes = keys % 3
    pairs = [(t, e) for t in range(40) for e in {e for e, _ in assignments_of(layer)[t]}]
    base = Counter(int(keys[t]) for t, _ in pairs)
    class_base = Counter(int(classes[t]) for t, _ in pairs)
    listed = most_used(layer, 100)
    uses = expert_profiles(layer, listed, keys, classes, 4, 5)
    assert [use.choice for use in uses] == listed.tolist()
    for use in uses:
        own = [t for t, e in pairs if e == use.choice]
        assert use.count == len(own)
        counts = Counter(int(keys[t]) for t in own)
        lifts = {k: (n / len(own)) / (base[k] / len(pairs)) for k, n in counts.items()}
        parts = {k: counts[k] / len(own) * math.log(lifts[k]) for k in counts if lifts[k] > 1}
        expected = sorted(parts.values(), reverse=True)[:5]
        assert [parts[token.key] for token in use.tokens] == pytest.approx(expected)
        for token in use.tokens:
            assert token.count == counts[token.key]
            assert token.lift == pytest.approx(lifts[token.key])
        own_classes = Counter(int(classes[t]) for t in own)
        assert use.class_counts_W.tolist() == [own_classes[c] for c in range(4)]
        for c in range(3):
            if own:
                lift = (own_classes[c] / len(own)) / (class_base[c] / len(pairs))
                assert use.class_lifts_W[c] == pytest.approx(lift)
        assert use.class_lifts_W[3] == 0
