"""A reference of the experts' MLPs: one assignment at a time."""

from __future__ import annotations

import torch


def reference_activation(name, g, u):
    """The activation of gate projection g and up projection u (None without gating)."""
    sigmoid = 1 / (1 + torch.exp(-g))
    gelu = g * 0.5 * (1 + torch.erf(g / 2**0.5))
    one = torch.ones_like(g) if u is None else u
    return {
        "relu": g * (g > 0),
        "gelu": gelu,
        "silu": g * sigmoid,
        "swiglu": g * sigmoid * one,
        "geglu": gelu * one,
    }[name]


def reference_mlp(x, weight, stacks, assignments, activation):
    """Weighted sums of expert outputs, computed in the dtype of x whatever the weights' is."""
    # A zero that depends on every input, so that all have a gradient.
    zero = 0 * (weight.sum() + sum(w.sum() for w in stacks.values()))
    y = [0 * row + zero for row in x]
    for a, (t, e) in enumerate(assignments):
        up = stacks["w3"][e] @ x[t] if "w3" in stacks else None
        hidden = reference_activation(activation, stacks["w1"][e] @ x[t], up)
        y[t] = y[t] + weight[a] * (stacks["w2"][e] @ hidden)
    return torch.stack(y)
