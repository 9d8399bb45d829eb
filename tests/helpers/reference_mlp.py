"""A reference of the experts' MLP: one assignment at a time."""

from __future__ import annotations

import torch


def reference_activation(name, g, u):
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
    """One assignment at a time: weight may be of any dtype, everything is computed in that of x."""
    nothing = 0 * (
        weight.sum() + sum(w.sum() for w in stacks.values())
    )  # so that all have a gradient
    y = [0 * row + nothing for row in x]
    for a, (t, e) in enumerate(assignments):
        up = stacks["w3"][e] @ x[t] if "w3" in stacks else None
        y[t] = y[t] + weight[a] * (
            stacks["w2"][e] @ reference_activation(activation, stacks["w1"][e] @ x[t], up)
        )
    return torch.stack(y)
