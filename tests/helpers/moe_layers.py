"""Small MoE layers of any gate for tests, and references that take one assignment at a time."""

from __future__ import annotations

import dataclasses
from decimal import Decimal

import torch

from megatron.gate_checks.cases import (
    HIDDEN_SIZE,
    GateCase,
    make_carry,
    make_input,
    reference_expert,
    reference_layer,
)
from megatron.moe.gate import gate_class

__all__ = [
    "D",
    "E",
    "exact_shares",
    "has_topk",
    "make_carry",
    "make_input",
    "make_layer",
    "reference_expert",
    "reference_layer",
    "reference_topk",
]

D, E = HIDDEN_SIZE, 4


def make_layer(
    name,
    groups=None,
    num_experts=E,
    seed=0,
    shared=0,
    options=None,
    expert_options=None,
    layer=0,
    **moe,
):
    """An MoE layer with the gate of this name; `moe` are fields of MoEConfig.

    Every routing is checked, unless `check_routing` is set to False.
    """
    moe.setdefault("check_routing", True)
    case = GateCase(name, options or {}, num_experts)
    return case.layer(groups, expert_options, seed=seed, layer=layer, shared=shared, **moe)


def exact_shares(logits):
    """Sigmoids divided by their sum, and the derivative [i][j] of share i by logit j.

    Computed in decimals, whose exponents are unbounded: nothing underflows.
    """
    s = [1 / (1 + (-Decimal(z)).exp()) for z in logits]
    shares = [v / sum(s) for v in s]
    slopes = [
        [float(share * ((i == j) - shares[j]) * (1 - s[j])) for j in range(len(s))]
        for i, share in enumerate(shares)
    ]
    return [float(share) for share in shares], slopes


def has_topk(name):
    """Whether this gate has an option `topk`."""
    return "topk" in {f.name for f in dataclasses.fields(gate_class(name).Config)}


def reference_topk(c, logits):
    """The formula of top-k gates, one token at a time, in float64 scalars.

    Args:
        c: a config with topk, score_function, norm_topk_prob, routed_scaling_factor and
            the coefficients of the losses.
        logits: a list of 0-d tensors per token.
    Returns:
        [{expert: weight}] per token, the aux loss (both differentiable), and the smallest
        distance between the last selected score and the next one.
    """
    E, T = len(logits[0]), len(logits)
    weights = []
    load = [0] * E
    mean_score = [0.0] * E
    z_loss = 0.0
    margin = 1.0
    for z in logits:
        top = max(float(v.detach()) for v in z)
        exp = [torch.exp(v - top) for v in z]
        z_loss = z_loss + (top + torch.log(sum(exp))) ** 2 / T
        if c.score_function == "softmax":
            s = [v / sum(exp) for v in exp]
        else:
            s = [1 / (1 + torch.exp(-u)) for u in z]
        order = sorted(range(E), key=lambda e: -float(s[e].detach()))
        if c.topk < E:
            margin = min(margin, float((s[order[c.topk - 1]] - s[order[c.topk]]).detach()))
        norm = sum(s[e] for e in order[: c.topk]) if c.norm_topk_prob else 1.0
        weights.append({e: c.routed_scaling_factor * s[e] / norm for e in order[: c.topk]})
        for e in range(E):
            load[e] += e in weights[-1]
            mean_score[e] = mean_score[e] + s[e] / sum(s) / T
    balance = E * sum(load[e] / (T * c.topk) * mean_score[e] for e in range(E))
    return weights, c.loss_coeff * balance + c.z_loss_coeff * z_loss, margin


# Names under which tests/moe/gates imports the references.
