"""Similarity of experts and routers, against loops over pairs."""

import math

import pytest
import torch

from helpers.moe_layers import make_layer
from megatron.analysis import weight_similarity
from megatron.analysis.weight_similarity import (
    pairwise_cosine,
    relative_distance,
    router_rows,
    router_weights,
    sampled_expert_weights,
)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_similarity_of_experts_equals_loop_over_pairs():
    """All parameters of an expert count, its biases too."""
    layer = make_layer("topk", options={"topk": 2})
    stacks = list(layer.experts.parameters())
    experts = [torch.cat([stack[e].flatten() for stack in stacks]).double() for e in range(4)]
    pairs = [cosine(a, b) for i, a in enumerate(experts) for b in experts[i + 1 :]]
    mean, largest = pairwise_cosine(sampled_expert_weights(layer))
    assert mean == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert largest == pytest.approx(max(pairs), abs=1e-6)


def test_large_experts_are_sampled(monkeypatch):
    """The same positions of every expert, from all parameters, and the same in each call."""
    layer = make_layer("topk")
    with torch.no_grad():
        for number, stack in enumerate(layer.experts.parameters()):
            stack.copy_(torch.arange(stack[0].numel()).view_as(stack[0]) + 10_000 * number)
    monkeypatch.setattr(weight_similarity, "MAX_SAMPLED_PARAMETERS", 64)
    weight_EN = sampled_expert_weights(layer)
    assert weight_EN.shape == (4, 64)
    assert (weight_EN == weight_EN[0]).all() and torch.equal(
        weight_EN, sampled_expert_weights(layer)
    )
    stacks = {int(value) // 10_000 for value in weight_EN[0]}
    assert stacks == set(range(len(list(layer.experts.parameters()))))


def test_sampled_similarity_is_near_the_exact_one(monkeypatch):
    torch.manual_seed(0)
    layer = make_layer("topk")
    common = torch.randn(8, 64)
    layer.experts.w1 = torch.nn.Parameter(common + 0.5 * torch.randn(4, 8, 64))
    exact = pairwise_cosine(sampled_expert_weights(layer))
    monkeypatch.setattr(weight_similarity, "MAX_SAMPLED_PARAMETERS", 400)
    # The standard deviation of an estimated cosine is at most 1 / sqrt(400) = 0.05.
    assert pairwise_cosine(sampled_expert_weights(layer)) == pytest.approx(exact, abs=0.2)


def test_cosine_of_extreme_rows():
    equal = torch.ones(3, 5)
    assert pairwise_cosine(equal) == pytest.approx((1, 1))
    assert pairwise_cosine(torch.stack([equal[0], -equal[0]])) == pytest.approx((-1, -1))
    assert pairwise_cosine(torch.zeros(2, 5)) == (0, 0)
    assert pairwise_cosine(equal[:1]) is None


def test_router_weights_leave_out_zero_computation_experts():
    gate = make_layer("moepp").gate
    number = sum(p.numel() for p in gate.parameters())
    number -= sum(p.numel() for p in gate.zero_computation_experts.parameters())
    assert router_weights(gate).shape == (number,)
    assert router_weights(make_layer("hash").gate) is None
    assert router_rows(make_layer("hash").gate) is None
    assert router_rows(gate).shape[1] == gate.router.in_features


def test_router_weights_are_a_copy():
    gate = make_layer("topk").gate
    before = router_weights(gate)
    with torch.no_grad():
        gate.router.weight[0] += 1
    moved = math.sqrt(gate.router.in_features) / gate.router.weight[1:].norm()
    distance = relative_distance(before, router_weights(gate))
    assert distance == pytest.approx(math.sqrt(gate.router.in_features) / before.norm().item())
    assert moved > 0 and relative_distance(before, before) == 0
