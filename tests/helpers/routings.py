"""Gate outputs written by hand."""

from __future__ import annotations

import torch

from megatron.moe.routing import Routing, StepTotals


def make_routing(tokens, experts, weights=None, priority=None, token_major=False):
    """A routing of these lists; random weights by default."""
    if weights is None:
        weights = torch.rand(len(tokens))
    if priority is not None:
        priority = torch.tensor(priority)
    return Routing(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(experts, dtype=torch.int64),
        weights,
        torch.tensor(0.0),
        priority,
        token_major=token_major,
    )


def step_totals(load_E, num_tokens, **metric_sums):
    """Totals of an optimizer step for the only MoE layer of a model."""
    return StepTotals(load_E, num_tokens, metric_sums, load_E[None])
