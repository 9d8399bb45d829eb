"""Capacity and the number of experts per token: an even load fits at factor 1.0."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from helpers.moe_layers import make_layer
from megatron.moe.dispatch.plan import capacity_from_factor
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import Gate, GateContext, create_gate

T = 64
E = 64
K = 8
EVEN_GATES = ("topk", "deepseek_v2", "deepseek_v3", "tcmoe")


def even_layer(gate: str, factor: float):
    """Return a layer whose tokens of class c use experts 8 c to 8 c + 7, and such tokens."""
    layer = make_layer(
        gate,
        num_experts=E,
        options={"topk": K},
        moe_train_capacity_factor=factor,
        moe_min_capacity=1,
    )
    weight = layer.gate.router.weight
    classes = E // K
    with torch.no_grad():
        weight.zero_()
        for expert in range(E):
            weight[expert, expert // K] = 20.0
    x = torch.zeros(T, weight.shape[1])
    x[torch.arange(T), torch.arange(T) % classes] = 1.0
    return layer, x


@pytest.mark.parametrize("gate", EVEN_GATES)
@pytest.mark.parametrize(("factor", "rows"), [(1.0, 8), (0.875, 7), (0.5, 4), (0.0, 8)])
def test_even_load_fits_at_factor_1(gate, factor, rows):
    """At k 8 a factor of 1.0 dropped 87.5 % when it was not multiplied by k."""
    layer, x = even_layer(gate, factor)
    layer(x[None])
    counters = layer.counters[True]
    assert counters["assigned_C"].tolist() == [T * K / E] * E
    assert counters["dispatched_C"].tolist() == [rows] * E


@pytest.mark.parametrize(
    ("gate", "options", "rows"),
    [
        ("topk", {"topk": 2}, 6),
        ("cosine", {"topk": 2}, 6),
        ("deepseek_v2", {"topk": 2}, 6),
        ("deepseek_v3", {"topk": 2}, 6),
        ("tcmoe", {"topk": 2}, 6),
        ("remoe", {"topk": 2}, 6),
        ("threshold", {"threshold": 1.0, "topk": 2, "threshold_max_experts": 2}, 3),
        ("hash", {}, 3),
    ],
)
def test_overloaded_expert_keeps_its_capacity(gate, options, rows):
    """Equal tokens choose the same experts: 12 tokens, 4 experts, factor 1.0."""
    layer = make_layer(
        gate,
        num_experts=4,
        options=options,
        moe_train_capacity_factor=1.0,
        moe_min_capacity=1,
    )
    x = torch.ones(1, 12, layer.gate.context.hidden_size)
    ids = torch.zeros(1, 12, dtype=torch.int64)
    layer(x, FFNContext(ids))
    dispatched = layer.counters[True]["dispatched_C"][:4]
    assert dispatched[dispatched > 0].tolist() == [rows] * int((dispatched > 0).sum())
    assert (dispatched > 0).any()


@pytest.mark.parametrize(
    ("gate", "options", "k"),
    [
        ("expert_choice", {"topk": 3}, 3),
        ("base", {}, 1),
        ("peer", {"peer_num_heads": 2, "peer_topk": 3}, 6),
        ("peer", {"peer_num_heads": 2, "peer_topk": 99}, 32),
        ("longcat", {"topk": 3}, 2),
        ("expert_threshold", {"topk": 3}, 3),
        ("blockffn", {}, 1),
        ("dynmoe", {}, 1),
        ("topk", {"topk": 3, "num_null_experts": 1}, 3),
    ],
)
def test_gates_declare_their_k(gate, options, k):
    built = create_gate(gate, hidden_size=8, num_experts=16, **options)
    assert built.capacity_k() == k


@pytest.mark.parametrize(("topk", "k"), [(0, 1), (None, 1), (3, 3)])
def test_gate_without_limit_has_a_capacity(topk, k):
    """A gate outside the tree may have topk 0 for no limit: its experts take factor * T / E
    rows, not --moe-min-capacity."""
    gate = Gate(SimpleNamespace(topk=topk), GateContext(8, 4))
    assert gate.capacity_k() == k


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "factor"), [(16, 1.0), (20, 1.25), (33, 0.5)])
def test_capacity_equals_deepspeed(k, tokens, factor):
    """DeepSpeed's top-k gate allocates as many rows per expert; its dispatch mask shows them."""
    from deepspeed.moe.sharded_moe import topkgating

    logits_TE = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(k))
    _, _, dispatch_TEC, _ = topkgating(logits_TE, k, factor, min_capacity=1)
    assert capacity_from_factor(tokens, 4, factor, 1, k) == dispatch_TEC.shape[-1]
    assert dispatch_TEC.shape[-1] == math.ceil(factor * k * tokens / 4)
