"""Gate outputs written by hand."""

from __future__ import annotations

import torch

from megatron.moe.routing import Routing, StepTotals


def make_routing(tokens, experts, weights=None, priority=None, token_major=False):
    weights = torch.rand(len(tokens)) if weights is None else weights
    return Routing(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(experts, dtype=torch.int64),
        weights,
        torch.tensor(0.0),
        None if priority is None else torch.tensor(priority),
        token_major=token_major,
    )


def step_totals(load_E, num_tokens, **metric_sums):
    """What an optimizer step counted in the only MoE layer of a model."""
    return StepTotals(load_E, num_tokens, metric_sums, load_E[None])
