"""What one MoE layer keeps for its backward pass and needs while it runs, in bytes.

A gate is run on a few random tokens, so that any gate counts, also one outside the tree. What
the dispatch and the experts allocate follows from the numbers of tokens and assignments.

Letters: T tokens of a micro-batch on one rank, A assignments of them, D features of a row, H
width of an expert, P pairs of an assignment and a hidden unit (PEER).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.analysis.live_memory import LiveMemory
from megatron.config.schema import RunConfig
from megatron.moe.decisions import DecisionRecorder
from megatron.moe.experts.activations import is_gated
from megatron.moe.gate import Gate, create_gate
from megatron.moe.routing import GateInput

_INDEX_BYTES = 8
"""int64"""
_WEIGHT_BYTES = 4
"""fp32 routing weights and scores"""
_FEWEST_TOKENS = 64


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one MoE layer on one rank, without its dense parts and without gradients."""

    kept: int
    """from the forward to the backward pass; under recomputation, only during the latter"""
    kept_under_recomputation: int
    """from the forward to the backward pass under recomputation: decisions and plan"""
    forward: int
    """temporary during the forward pass"""
    backward: int
    """temporary during the backward pass"""
    dispatch: int
    """part of the above: rows sent and received, and the permutations"""


@dataclass(frozen=True)
class GateActivations:
    """Bytes per token of a gate."""

    kept: float
    decisions: float
    """what recomputation repeats, see `megatron.moe.decisions`"""
    forward: float
    backward: float


def gate_activations(
    name: str, config: RunConfig, vocab_size: int, dtype: torch.dtype
) -> GateActivations:
    """Run a gate on random tokens, forward and backward, on the CPU.

    The bytes per token are the difference of two runs divided by that of their tokens, so
    that what does not depend on tokens drops out.

    Args:
        dtype: compute dtype of the model.
    """
    options: Mapping[str, Any] = config.gate_options.get(name, {})
    gate = create_gate(
        name,
        hidden_size=config.model.hidden_size,
        num_experts=config.moe.num_experts,
        vocab_size=vocab_size,
        **options,
    )
    few = _FEWEST_TOKENS
    small = _measure(gate, few, vocab_size, dtype)
    large = _measure(gate, 2 * few, vocab_size, dtype)
    differences = (max(0, b - a) / few for a, b in zip(small, large, strict=True))
    return GateActivations(*differences)


def _measure(
    gate: Gate, num_tokens: int, vocab_size: int, dtype: torch.dtype
) -> tuple[int, int, int, int]:
    """Return the bytes (kept, decisions, forward, backward) of a number of tokens."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, gate.context.hidden_size, generator=generator).to(dtype)
    ids_T = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    inp = GateInput(
        x_TD.requires_grad_(),
        token_ids_T=ids_T,
        sequence_T=torch.zeros_like(ids_T),
        num_sequences=1,
    )
    recorder = DecisionRecorder()
    memory = LiveMemory()
    with memory:
        memory.add(x_TD)
        memory.add(ids_T)
        start = memory.bytes
        routing = gate(inp)
        kept = memory.bytes - start
        forward = memory.peak - memory.bytes
        memory.reset_peak()
        if routing.weight_A.requires_grad:
            (routing.weight_A.sum() + routing.aux_loss).backward()
        backward = memory.peak - start - kept
        del routing
        before = memory.bytes
        with torch.no_grad(), gate.use_decisions(recorder):
            gate(inp)
        decisions = memory.bytes - before
    gate.zero_grad()
    return kept, decisions, forward, max(0, backward)


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one MoE layer on one rank."""

    tokens: int
    assignments: int
    """after capacity; with sharded experts as many are received as are sent"""
    hidden_size: int
    row_size: int
    """features of a row that is sent to an expert: hidden_size, or --moe-latent-size"""
    width: int
    activation: str
    itemsize: int
    """bytes of a number in the compute dtype"""
    ep_size: int
    fused: bool = True
    """whether the experts' two products are one operation, which saves pre-activations only"""
    by_expert: bool = False
    """whether experts run one after the other (the CPU), without buffers for all rows"""


def grouped_layer_activations(sizes: LayerSizes, gate: GateActivations) -> LayerActivations:
    """Return the bytes of a layer whose experts are grouped matrix products."""
    s = sizes
    rows = s.assignments * s.row_size * s.itemsize
    hidden = s.assignments * s.width * s.itemsize
    products = 2 if is_gated(s.activation) else 1
    # The gate's lists, three permutations, and weights in the gate's and the experts' order.
    plan = s.assignments * 3 * _INDEX_BYTES + s.tokens * 2 * _INDEX_BYTES
    kept_plan = plan + s.assignments * _WEIGHT_BYTES
    dispatch = kept_plan
    kept = kept_plan + products * hidden
    forward = rows
    backward = rows
    if not s.fused:
        # Rows, the activation's factors, weighted rows and outputs.
        kept += 2 * rows + 2 * hidden
        forward += hidden
        backward += 2 * hidden
    if not s.by_expert:
        forward += hidden
        backward += (products + 1) * hidden
    if s.ep_size > 1:
        # Received rows stay for the backward pass. Sent rows and returned outputs do not.
        received_plan = s.assignments * (3 * _INDEX_BYTES + 2 * _WEIGHT_BYTES)
        kept += rows + received_plan
        forward += rows
        backward += rows
        dispatch += 2 * rows + received_plan
    return _with_gate(s, gate, kept, plan, forward, backward, dispatch)


def peer_layer_activations(sizes: LayerSizes, gate: GateActivations) -> LayerActivations:
    """Return the bytes of a PEER layer, whose experts are looked up per pair."""
    s = sizes
    pairs = s.assignments * s.width
    tables = 2 if is_gated(s.activation) else 1
    # Pairs in two orders, each with a row and a token or a position.
    pair_lists = pairs * 4 * _INDEX_BYTES + s.tokens * _INDEX_BYTES
    kept = pair_lists + pairs * _WEIGHT_BYTES * (tables + 2)
    forward = pairs * 2 * _INDEX_BYTES
    backward = pairs * _WEIGHT_BYTES * 3
    plan = 0
    dispatch = pair_lists
    if s.ep_size > 1:
        # Every rank has the tokens of all, and its part of their outputs.
        tokens = s.tokens * s.ep_size * s.row_size * s.itemsize
        plan = s.assignments * 3 * _INDEX_BYTES
        kept += tokens + plan
        forward += 2 * tokens
        backward += 2 * tokens
        dispatch += 2 * tokens + plan
    return _with_gate(s, gate, kept, plan, forward, backward, dispatch)


def _with_gate(
    sizes: LayerSizes,
    gate: GateActivations,
    kept: int,
    plan: int,
    forward: int,
    backward: int,
    dispatch: int,
) -> LayerActivations:
    tokens = sizes.tokens
    return LayerActivations(
        kept=kept + round(gate.kept * tokens),
        kept_under_recomputation=plan + round(gate.decisions * tokens),
        forward=max(forward, round(gate.forward * tokens)),
        backward=max(backward, round(gate.backward * tokens)),
        dispatch=dispatch,
    )
