"""Small mixture layers of any gate for tests, and a dumb per-assignment mixture to compare them with."""

from __future__ import annotations

import dataclasses
from decimal import Decimal

import torch

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import make_moe_layer
from megatron.moe.experts.activations import activate
from megatron.moe.gate import create_gate, gate_class
from megatron.parallel.groups import Groups

D, E = 8, 4


def make_layer(
    name, groups=None, num_experts=E, seed=0, shared=0, options=None, layer=0, **moe
):
    gate = create_gate(
        name,
        hidden_size=D,
        num_experts=num_experts,
        layer=layer,
        num_moe_layers=layer + 1,
        vocab_size=50,
        seed=seed,
        init_std=0.5,
        **(options or {}),
    )
    model = ModelConfig(
        num_layers=1,
        hidden_size=D,
        num_attention_heads=1,
        ffn_hidden_size=12,
        activation="swiglu",
        init_method_std=0.4,
    )
    return make_moe_layer(
        gate,
        model,
        MoEConfig(num_experts=num_experts, moe_shared_experts=shared, gate=name, **moe),
        layer=layer,
        seed=seed,
        groups=groups or Groups(),
    )


def make_input(tokens, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, D, generator=g) * scale, torch.randint(
        0, 50, (1, tokens), generator=g
    )


def make_carry(gate, tokens, seed=0, scale=1.0):
    """What the previous mixture layer's gate may hand on: a number for each choice."""
    g = torch.Generator().manual_seed(seed + 1000)
    return (
        torch.randn(tokens, gate.num_experts + len(gate.zero_computation_experts), generator=g)
        * scale
    )


def dumb_layer(layer, x_TD, routing, kept=None):
    """y_t = sum over the gate's own list (or some of it); one expert call per assignment."""
    y = [torch.zeros(D) for _ in x_TD]
    for a in range(len(routing.token_A)) if kept is None else kept:
        t, e, w = int(routing.token_A[a]), int(routing.expert_A[a]), routing.weight_A[a]
        if e >= layer.num_experts:
            out = layer.gate.zero_computation_experts[e - layer.num_experts](x_TD[t : t + 1])[0]
        elif layer.gate.expert_kind == "peer":
            n = layer.experts
            out = sum(
                activate("swiglu", n.w_in[e, j] @ x_TD[t], n.w_up[e, j] @ x_TD[t])
                * n.w_out[e, j]
                for j in range(n.width)
            )
        else:
            out = dumb_expert(layer, e, x_TD[t])
        y[t] = y[t] + w * out
    return torch.stack(y)


def dumb_expert(layer, e, x):
    """One SwiGLU expert on [..., D]."""
    w1, w3, w2 = (getattr(layer.experts, name)[e].T for name in ("w1", "w3", "w2"))
    return activate("swiglu", x @ w1, x @ w3) @ w2


def exact_shares(logits):
    """Sigmoids divided by their sum, and the derivative [i][j] of share i with respect to logit j. In decimals, whose
    exponents have no end: nothing underflows."""
    s = [1 / (1 + (-Decimal(z)).exp()) for z in logits]
    w = [v / sum(s) for v in s]
    slopes = [
        [w[i] * ((i == j) - w[j]) * (1 - s[j]) for j in range(len(s))] for i in range(len(s))
    ]
    return [float(v) for v in w], [[float(v) for v in row] for row in slopes]


def has_topk(name):
    return "topk" in {f.name for f in dataclasses.fields(gate_class(name).Config)}


def dumb_top_k(c, logits):
    """[{expert: weight}] per token, the aux loss, and how near the nearest tie was: one token at a time, in float64
    scalars that autograd follows, from the formula of top-k gates.

    Args:
        c: with topk, score_function, norm_topk_prob, routed_scaling_factor and the coefficients of the losses.
        logits: a list of 0-d tensors per token.
    """
    E, T = len(logits[0]), len(logits)
    weights, load, mean, lse, margin = [], [0] * E, [0.0] * E, 0.0, 1.0
    for z in logits:
        top = max(float(v.detach()) for v in z)
        exp = [torch.exp(v - top) for v in z]
        lse = lse + (top + torch.log(sum(exp))) ** 2 / T
        s = [
            v / sum(exp) if c.score_function == "softmax" else 1 / (1 + torch.exp(-u))
            for u, v in zip(z, exp)
        ]
        order = sorted(range(E), key=lambda e: -float(s[e].detach()))
        if c.topk < E:
            margin = min(margin, float((s[order[c.topk - 1]] - s[order[c.topk]]).detach()))
        norm = sum(s[e] for e in order[: c.topk]) if c.norm_topk_prob else 1.0
        weights.append({e: c.routed_scaling_factor * s[e] / norm for e in order[: c.topk]})
        for e in range(E):
            load[e] += e in weights[-1]
            mean[e] = mean[e] + s[e] / sum(s) / T
    balance = E * sum(load[e] / (T * c.topk) * mean[e] for e in range(E))
    return weights, c.loss_coeff * balance + c.z_loss_coeff * lse, margin
