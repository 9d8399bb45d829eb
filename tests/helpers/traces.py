"""Routing traces for tests: given by lists, or drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from helpers.moe_layers import D, make_layer
from megatron.moe.ffn import FFNContext
from megatron.moe.routing_record import record_routing
from megatron.moe.routing_trace import (
    LayerTrace,
    RoutingTrace,
    offsets_of_counts,
    trace_layers,
)


def layer_of_lists(
    experts: list[list[int]], num_experts: int = 4, zero: int = 0, gate: str = "topk"
) -> LayerTrace:
    """A layer in which position t has the choices experts[t], with weights 0.5, 1.5, ..."""
    flat = [expert for chosen in experts for expert in chosen]
    return LayerTrace(
        gate,
        num_experts,
        zero,
        offsets_of_counts(torch.tensor([len(chosen) for chosen in experts]).long()),
        torch.tensor(flat, dtype=torch.int64),
        torch.arange(len(flat)) + 0.5,
    )


def drawn_layer(
    tokens: int, num_experts: int, most: int, least: int = 0, zero: int = 0, seed: int = 0
) -> LayerTrace:
    """A layer with `least` to `most` choices per position, which may repeat, as PEER's do."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(least, most + 1, tokens)
    total = int(counts.sum())
    return LayerTrace(
        "threshold",
        num_experts,
        zero,
        offsets_of_counts(torch.from_numpy(counts)),
        torch.from_numpy(generator.integers(0, num_experts + zero, total)),
        torch.from_numpy(generator.normal(size=total).astype(np.float32)),
    )


def drawn_trace(tokens: int, layers: list[LayerTrace], seed: int = 0) -> RoutingTrace:
    """A trace with ids and texts of a small vocabulary, in two documents."""
    words = [" the", "def", " x", "\n", "12", "(", "ing", " <b>", "\u202e", ""]
    ids = np.random.default_rng(seed + 1).integers(0, len(words), tokens)
    starts = torch.tensor([0, tokens // 2])
    texts = tuple(words[i] for i in ids)
    return RoutingTrace(tuple(layers), "checkpoint:1", torch.from_numpy(ids), starts, texts)


def traced_gates(*names: str, tokens: int = 7, **parts) -> RoutingTrace:
    """A trace of one pass of layers with these gates."""
    torch.manual_seed(0)
    model = nn.ModuleList([make_layer(name) for name in names]).eval()
    x_BSD = torch.randn(1, tokens, D)
    context = FFNContext(torch.randint(0, 50, (1, tokens)))
    with record_routing(model) as records:
        for layer in model:
            layer(x_BSD, context)
    return RoutingTrace(trace_layers(model, records), **parts)


def assignments_of(layer: LayerTrace) -> list[list[tuple[int, float]]]:
    """The (choice, weight) pairs of each position, by a loop over the arrays."""
    experts = layer.expert_A.tolist()
    weights = layer.weight_A.tolist()
    offsets = layer.token_offsets_T1.tolist()
    return [
        list(zip(experts[start:end], weights[start:end], strict=True))
        for start, end in zip(offsets, offsets[1:])
    ]
