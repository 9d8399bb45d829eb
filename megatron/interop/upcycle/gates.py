"""Gates of an upcycled model: initial routers, and the factor of the experts' outputs.

Experts are slices of a dense layer: one slice for full copies, G for granular ones, E for a split.
The layer equals the dense one if the weights of a token's experts with the same slice add up to 1
for every slice. With copies all slices are there; of a split only k of E, which then have the
weight E / k (LLaMA-MoE).

With granular copies the rows of the router are equal within a copy (virtual groups, He et al.
2024), so that the k = G t best experts are the slices of t complete copies.

Shape suffixes: D hidden, E experts, T tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.config.fields import require
from megatron.interop.upcycle.experts import seeded
from megatron.moe.gate import Gate
from megatron.moe.routing import GateInput, Routing

_SMALL = 1e-6
"""Factor of a router's weights that leaves no preference of experts"""
_LEAST_SHARE = 1e-3
"""Share of the initial weights below which a gate without preferences chooses no expert"""
_TOKENS_PER_EXPERT = 16
"""Tokens per expert on which the weights of a gate are added up"""


@dataclass(frozen=True)
class StartWeights:
    """Weights of the slices of the dense layer for a token at the start of the training."""

    lowest: float
    """lowest weight of any slice for any token, added up over its copies; 0: left out"""
    highest: float
    """highest weight"""

    @property
    def are_one(self) -> bool:
        """Whether every slice has the weight 1 for every token: the layer is the dense one."""
        return max(abs(self.lowest - 1), abs(self.highest - 1)) < 1e-4


def build_gate(gate: Gate) -> Gate:
    """Return a gate with its initial values from one that may be on `meta`."""
    return type(gate)(gate.config, gate.context)


@torch.no_grad()
def uniform_weight_sum(gate: Gate) -> float:
    """Return what the weights of a token's experts add up to if the router prefers none of them.

    It is the mean over random tokens, whose logits are so small that they order the experts and
    change no weight. A gate that chooses no expert then, such as one with ReLU, and one without a
    linear router are taken with their initial logits.
    """
    initial = _mean_weight_sum(gate)
    neutral = copy.deepcopy(gate)
    if not isinstance(getattr(neutral, "router", None), nn.Linear):
        return initial
    for parameter in neutral.router.parameters():
        parameter.mul_(_SMALL)
    mean = _mean_weight_sum(neutral)
    return mean if mean > _LEAST_SHARE * initial else initial


@torch.no_grad()
def start_weights(gate: Gate, num_slices: int, weight_scale: float) -> StartWeights:
    """Return the range of the slices' weights for random tokens.

    Args:
        gate: with its initial values. Expert e is slice e modulo `num_slices`.
        num_slices: number of different slices among the experts.
        weight_scale: factor of the experts' down projections.
    """
    routing, num_tokens = _route(gate)
    weight_A = _routed_weights(routing, gate) * weight_scale
    place_A = routing.token_A * num_slices + routing.expert_A % num_slices
    weight_TS = torch.zeros(num_tokens * num_slices, dtype=torch.float64)
    weight_TS.index_add_(0, place_A, weight_A)
    return StartWeights(weight_TS.min().item(), weight_TS.max().item())


def _mean_weight_sum(gate: Gate) -> float:
    """Route random tokens, and return the mean sum of the weights of a token's routed experts."""
    routing, num_tokens = _route(gate)
    return _routed_weights(routing, gate).sum().item() / num_tokens


def _routed_weights(routing: Routing, gate: Gate) -> Tensor:
    """Return the weights in fp64, with 0 for zero-computation experts."""
    return routing.weight_A.double() * (routing.expert_A < gate.num_experts)


def _route(gate: Gate) -> tuple[Routing, int]:
    """Route random tokens of unit mean square in evaluation mode; return their number, too."""
    num_tokens = _TOKENS_PER_EXPERT * gate.num_experts
    x_TD = torch.randn(num_tokens, gate.context.hidden_size, generator=seeded("tokens"))
    token_ids_T = torch.arange(num_tokens) % (gate.context.vocab_size or num_tokens)
    was_training = gate.training
    gate.eval()
    routing = gate(GateInput(x_TD, token_ids_T))
    gate.train(was_training)
    return routing, num_tokens


@torch.no_grad()
def repeat_router_rows(gate: Gate, granularity: int) -> None:
    """Give the experts of each copy, which are consecutive, the router row of the first of them.

    Raises:
        ValueError: the gate has no router with one row per expert.
    """
    weight_ED = expert_rows(gate, "--granularity", granularity)
    weight_ED.copy_(weight_ED[::granularity].repeat_interleave(granularity, 0))


@torch.no_grad()
def set_router_centres(gate: Gate, centre_ED: Tensor) -> None:
    """Set the rows of the router to directions, scaled as the gate's random rows are.

    Raises:
        ValueError: the gate has no router with one row per expert.
    """
    weight_ED = expert_rows(gate, "--router-init", "centroids")
    rms = centre_ED.square().mean().sqrt().clamp_min(1e-30)
    weight_ED.copy_(centre_ED * (gate.context.init_std / rms))


def expert_rows(gate: Gate, flag: str, value: object) -> Tensor:
    """Return the rows [E, D] of the gate's router that belong to the routed experts.

    Args:
        flag: what needs them, for the error message.
        value: its value.
    Raises:
        ValueError: the gate has no router with one row per expert.
    """
    router = getattr(gate, "router", None)
    rows = gate.num_experts + len(gate.zero_computation_experts)
    has_rows = isinstance(router, nn.Linear) and len(router.weight) == rows
    name = getattr(type(gate), "name", type(gate).__name__)
    require(
        has_rows,
        flag,
        value,
        "left out with a gate whose router has not one row per expert",
        f"Gate {name} has another router.",
    )
    return router.weight[: gate.num_experts]
