"""Small MoE layers of any gate for tests, and references that take one assignment at a time."""

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
    """An MoE layer with the gate of this name; `moe` are fields of MoEConfig."""
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
        expert_options,
        layer=layer,
        seed=seed,
        groups=groups or Groups(),
    )


def make_input(tokens, seed=0, scale=1.0):
    """Hidden states [1, tokens, D] and token ids [1, tokens]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, D, generator=g) * scale
    return x, torch.randint(0, 50, (1, tokens), generator=g)


def make_carry(gate, tokens, seed=0, scale=1.0):
    """A carry as the previous MoE layer's gate may return it: a number for each choice."""
    g = torch.Generator().manual_seed(seed + 1000)
    num_choices = gate.num_experts + len(gate.zero_computation_experts)
    return torch.randn(tokens, num_choices, generator=g) * scale


def reference_layer(layer, x_TD, routing, dispatched=None):
    """y_t = sum over the gate's assignments, or over some of them: one expert call each."""
    y = [torch.zeros(D) for _ in x_TD]
    for a in range(len(routing.token_A)) if dispatched is None else dispatched:
        t = int(routing.token_A[a])
        e = int(routing.expert_A[a])
        if e >= layer.num_experts:
            out = layer.gate.zero_computation_experts[e - layer.num_experts](x_TD[t : t + 1])[0]
        elif layer.gate.expert_kind == "peer":
            out = reference_peer_expert(layer.experts, e, x_TD[t])
        else:
            out = reference_expert(layer, e, x_TD[t])
        y[t] = y[t] + routing.weight_A[a] * out
    return torch.stack(y)


def reference_peer_expert(tables, e, x):
    """One SwiGLU expert in PEER's tables, on [D]: one hidden unit at a time."""
    return sum(
        activate("swiglu", tables.w_in[e, j] @ x, tables.w_up[e, j] @ x) * tables.w_out[e, j]
        for j in range(tables.width)
    )


def reference_expert(layer, e, x):
    """One SwiGLU expert on [..., D]."""
    w1, w3, w2 = (getattr(layer.experts, name)[e].T for name in ("w1", "w3", "w2"))
    return activate("swiglu", x @ w1, x @ w3) @ w2


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
