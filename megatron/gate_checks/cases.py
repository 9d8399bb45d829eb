"""The gate under test with its options, and the small layers, inputs and references of the checks.

Shape suffixes: T tokens, D hidden, A assignments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import make_moe_layer
from megatron.moe.experts.activations import activate
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import Gate, create_gate, gate_class
from megatron.moe.gate_registry import import_gate_files
from megatron.moe.layer import MoELayer
from megatron.moe.routing import GateInput, Routing
from megatron.parallel.groups import Groups

HIDDEN_SIZE = 8
NUM_TOKEN_IDS = 50


def require_that(ok: bool, message: str) -> None:
    """Raise AssertionError with a message unless `ok`; unlike `assert` also under `python -O`."""
    if not ok:
        raise AssertionError(message)


@dataclass(frozen=True)
class GateCase:
    """A gate with its options, from which every check builds what it needs."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    """fields of the gate's Config"""
    num_experts: int = 4
    gate_paths: tuple[str, ...] = ()
    """files to load in every rank before the gate is built"""

    def import_files(self) -> None:
        """Import the gate's files in this rank."""
        import_gate_files(self.gate_paths)

    @property
    def gate_class(self) -> type[Gate]:
        """The class of the gate."""
        return gate_class(self.name)

    @property
    def sees_other_tokens(self) -> bool:
        """Whether the gate declares that a token's experts depend on other tokens."""
        return self.gate_class.sees_other_tokens

    @property
    def is_stochastic(self) -> bool:
        """Whether the gate declares that its forward pass draws random numbers in training."""
        return self.gate_class.stochastic

    def gate(self, **sizes: Any) -> Gate:
        """Build the gate of the second of two MoE layers, which receives a carry.

        Args:
            sizes: arguments of `create_gate` that replace the defaults here.
        """
        arguments: dict[str, Any] = {
            "hidden_size": HIDDEN_SIZE,
            "num_experts": self.num_experts,
            "layer": 1,
            "num_moe_layers": 2,
            "vocab_size": NUM_TOKEN_IDS,
            "init_std": 0.5,
            **self.options,
            **sizes,
        }
        return create_gate(self.name, **arguments)

    def layer(
        self,
        groups: Groups | None = None,
        expert_options: dict[str, Any] | None = None,
        *,
        seed: int = 0,
        layer: int = 1,
        shared: int = 0,
        **moe: Any,
    ) -> MoELayer:
        """Build an MoE layer with this gate.

        Args:
            layer: index among the MoE layers.
            shared: number of shared experts.
            moe: further fields of MoEConfig.
        """
        gate = self.gate(seed=seed, layer=layer, num_moe_layers=layer + 1)
        model = ModelConfig(
            num_layers=1,
            hidden_size=HIDDEN_SIZE,
            num_attention_heads=1,
            ffn_hidden_size=12,
            activation="swiglu",
            init_method_std=0.4,
        )
        config = MoEConfig(
            num_experts=self.num_experts, moe_shared_experts=shared, gate=self.name, **moe
        )
        return make_moe_layer(
            gate,
            model,
            config,
            expert_options,
            layer=layer,
            seed=seed,
            groups=groups or Groups(),
        )


def make_input(tokens: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return hidden states [1, tokens, D] and token ids [1, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    x_BSD = torch.randn(1, tokens, HIDDEN_SIZE, generator=generator) * scale
    return x_BSD, torch.randint(0, NUM_TOKEN_IDS, (1, tokens), generator=generator)


def make_carry(gate: Gate, tokens: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return a carry as the previous MoE layer's gate may: a number for each choice."""
    generator = torch.Generator().manual_seed(seed + 1000)
    num_choices = gate.num_experts + len(gate.zero_computation_experts)
    return torch.randn(tokens, num_choices, generator=generator) * scale


def layer_input(layer: MoELayer, tokens: int, spread: float = 1.0) -> tuple[Tensor, FFNContext]:
    """Return hidden states, which require a gradient, and the context of some tokens.

    Args:
        spread: below 1 the tokens are nearly equal, at 0 they are equal.
    """
    x_BSD, ids_BS = make_input(tokens)
    carry = make_carry(layer.gate, tokens)
    if spread != 1:
        x_BSD = x_BSD[:, :1].lerp(x_BSD, spread)
        ids_BS = ids_BS[:, :1].repeat(1, tokens)
        carry = carry[:1].lerp(carry, spread)
    return x_BSD.requires_grad_(), FFNContext(ids_BS, carry)


def rows_of(context: FFNContext, rows: slice) -> FFNContext:
    """Return the context of some of the tokens."""
    return FFNContext(context.token_ids_BS[:, rows], context.carry[rows])


def route(layer: MoELayer, x_BSD: Tensor, context: FFNContext) -> Routing:
    """Return the routing of a layer's gate."""
    sequence_T = torch.zeros(x_BSD.shape[1], dtype=torch.int64)
    return layer.gate(GateInput(x_BSD[0], context.token_ids_BS[0], sequence_T, context.carry))


def expert_sets(routing: Routing, tokens: int) -> list[list[tuple[int, float]]]:
    """Return the (expert, weight) pairs of every token, sorted by expert."""
    pairs: list[list[tuple[int, float]]] = [[] for _ in range(tokens)]
    assignments = zip(
        routing.token_A.tolist(),
        routing.expert_A.tolist(),
        routing.weight_A.tolist(),
        strict=True,
    )
    for token, expert, weight in assignments:
        pairs[token].append((expert, weight))
    return [sorted(token_pairs) for token_pairs in pairs]


def within_capacity(layer: MoELayer, routing: Routing, tokens: int, factor: float) -> list[int]:
    """Return the positions of the assignments of highest priority within the capacity."""
    gate = layer.gate
    limits = gate.capacities(tokens, factor, 1)
    if limits is None:
        even = factor * gate.capacity_k() * tokens / gate.num_experts
        limits = [min(tokens, max(1, math.ceil(even)))] * gate.num_experts
        limits += [tokens] * len(gate.zero_computation_experts)
    priority_A = routing.priority_A
    if priority_A is None:
        priority_A = routing.weight_A.abs()
    priority = priority_A.tolist()
    dispatched = []
    for choice, limit in enumerate(limits):
        mine = [a for a, e in enumerate(routing.expert_A.tolist()) if e == choice]
        dispatched += sorted(mine, key=lambda a: (-priority[a], a))[:limit]
    return dispatched


def reference_layer(
    layer: MoELayer, x_TD: Tensor, routing: Routing, dispatched: Iterable[int] | None = None
) -> Tensor:
    """Return the layer's output by a loop with one expert call for each assignment.

    Args:
        dispatched: positions of the assignments that count; None: all.
    """
    y = [torch.zeros(HIDDEN_SIZE) for _ in x_TD]
    if dispatched is None:
        dispatched = range(len(routing.token_A))
    for a in dispatched:
        t = int(routing.token_A[a])
        e = int(routing.expert_A[a])
        y[t] = y[t] + routing.weight_A[a] * reference_choice(layer, e, x_TD[t])
    return torch.stack(y)


def reference_choice(layer: MoELayer, choice: int, x_D: Tensor) -> Tensor:
    """Return the output of one routed or zero-computation expert for one token."""
    num_experts = layer.gate.num_experts
    if choice >= num_experts:
        return layer.gate.zero_computation_experts[choice - num_experts](x_D[None])[0]
    if layer.gate.expert_kind == "peer":
        return reference_peer_expert(layer.experts, choice, x_D)
    return reference_expert(layer, choice, x_D)


def reference_peer_expert(tables: Any, e: int, x_D: Tensor) -> Tensor:
    """Return the output of one SwiGLU expert of PEER's tables, one hidden unit at a time."""
    return sum(
        activate("swiglu", tables.w_in[e, j] @ x_D, tables.w_up[e, j] @ x_D)
        * tables.w_out[e, j]
        for j in range(tables.width)
    )


def reference_expert(layer: MoELayer, e: int, x: Tensor) -> Tensor:
    """Return the output of one SwiGLU expert on [..., D]."""
    w1, w3, w2 = (getattr(layer.experts, name)[e].T for name in ("w1", "w3", "w2"))
    return activate("swiglu", x @ w1, x @ w3) @ w2
