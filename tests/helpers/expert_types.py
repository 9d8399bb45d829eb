"""References of expert types, one row at a time, and experts of a type with random weights."""

from __future__ import annotations

import torch

from helpers.reference_mlp import reference_activation
from megatron.moe.experts.expert_init import ExpertInit
from megatron.moe.experts.expert_type import ExpertContext, create_experts

VARIANTS = {
    "mlp": ("mlp", {}),
    "mlp with biases": ("mlp", {"linear_bias": True}),
    "swiglu_clamped": ("swiglu_clamped", {"limit": 0.7}),
    "swiglu_clamped without biases": (
        "swiglu_clamped",
        {"limit": 0.7, "linear_bias": False, "linear_offset": 0.0, "alpha": 1.0},
    ),
}
"""Names and options of expert types; the limit is low enough to clamp many values."""


def make_experts(variant, num_local, hidden, width, activation="swiglu", seed=0, **context):
    """Experts of a variant with random weights, also of the biases."""
    name, options = VARIANTS[variant]
    init = ExpertInit(seed=seed, init_std=0.5, output_std=0.5)
    sizes = ExpertContext(num_local, hidden, width, activation, init=init, **context)
    experts = create_experts(name, sizes, **options)
    randomize_vectors(experts, seed)
    return experts


def randomize_vectors(experts, seed=0):
    """Replace the biases, which start as zeros."""
    g = torch.Generator().manual_seed(seed)
    for parameter in experts.parameters():
        if parameter.dim() == 2:
            parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.5)


def reference_expert_of(variant, stacks, e, x, activation="swiglu"):
    """Expert e of a variant on one row [D], with stacked weights by name."""
    name, options = VARIANTS[variant]

    def project(number, row):
        y = stacks[f"w{number}"][e] @ row
        if f"b{number}" in stacks:
            y = y + stacks[f"b{number}"][e]
        return y

    up = project(3, x) if "w3" in stacks else None
    if name == "mlp":
        return project(2, reference_activation(activation, project(1, x), up))
    limit = options["limit"]
    hidden = []
    for g, u in zip(project(1, x), up, strict=True):
        g = torch.where(g > limit, torch.full_like(g, limit), g)
        u = torch.where(u > limit, torch.full_like(u, limit), u)
        u = torch.where(u < -limit, torch.full_like(u, -limit), u)
        slope = options.get("alpha", 1.702)
        hidden.append(g / (1 + torch.exp(-slope * g)) * (u + options.get("linear_offset", 1.0)))
    return project(2, torch.stack(hidden))


def reference_experts(
    variant, stacks, x, weight, assignments, activation="swiglu", weight_on_input=False
):
    """Weighted sums of experts, one assignment (token, expert) at a time."""
    zero = 0 * (weight.sum() + sum(stack.sum() for stack in stacks.values()))
    y = [0 * row + zero for row in x]
    for a, (t, e) in enumerate(assignments):
        if weight_on_input:
            out = reference_expert_of(variant, stacks, e, weight[a] * x[t], activation)
        else:
            out = weight[a] * reference_expert_of(variant, stacks, e, x[t], activation)
        y[t] = y[t] + out
    return torch.stack(y)
