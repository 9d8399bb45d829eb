"""Floating-point operations of a model per token, by part and by experts per token.

Counted are matrix products: [a, b] times [b, c] is 2 a b c operations. Normalisation,
activations, softmax, sums and the look-up of embeddings are not counted, and neither is the
optimizer. The backward pass has a product for the gradient of a layer's input and, where its
weights are trained, another one for theirs.

Attention scores are counted in full rectangles of queries and keys, as
`torch.utils.flop_counter` and PaLM (Chowdhery et al. 2022, appendix B) do, although kernels skip
most of what a causal mask hides; `ModelFlops.visible_scores` is the part that the mask leaves.
The backward pass counts twice the forward pass: that a flash kernel computes the scores a second
time is work of the machine and not of the model, like activation recomputation. A sample counts
as one document.

Routers are counted by running them: see `megatron.moe.gate_flops`.

Shape suffixes: D features of a token row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron.model.attend import computed_pairs, padded_head_size, visible_pairs
from megatron.model.attention import Attention
from megatron.model.gpt import GPT
from megatron.model.mla import LatentAttention
from megatron.model.parameter_count import part_of
from megatron.moe.gate_flops import Flops, GateFlops, count_gate
from megatron.moe.layer import MoELayer
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.peer.layer import PEERLayer

FLOP_PARTS = (
    "attention",
    "attention scores",
    "routed experts",
    "zero-computation experts",
    "latent layers",
    "shared experts",
    "router",
    "dense ffn",
    "output layer",
    "other",
)
"""Parts of a model that have matrix products. `attention` stands for its projections; the parts
that also have parameters are named as in `megatron.model.parameter_count`"""


@dataclass(frozen=True)
class ExpertUse:
    """Experts per token of each MoE layer, means over tokens."""

    routed: tuple[float, ...]
    """routed experts, after capacity"""
    zero_computation: tuple[float, ...]
    """zero-computation experts"""

    @staticmethod
    def of_metrics(row: Mapping[str, Any]) -> ExpertUse | None:
        """Return what a row of metrics.jsonl measured; None if a layer's is missing."""
        total = row.get("experts_per_token_by_layer")
        if not total or None in total:
            return None
        fractions = row.get("zero_computation_fraction_by_layer") or [None] * len(total)
        zero_computation = []
        for experts, fraction in zip(total, fractions, strict=True):
            zero_computation.append(experts * (fraction or 0.0))
        routed = [a - b for a, b in zip(total, zero_computation, strict=True)]
        return ExpertUse(tuple(routed), tuple(zero_computation))


@dataclass(frozen=True)
class MoELayerFlops:
    """Operations of one MoE layer that depend on the experts of a token."""

    assignment: Flops
    """of one routed expert for one token"""
    zero_computation: Flops
    """of one zero-computation expert for one token"""
    fewest: int
    """routed experts of a token, at least; those that it has several times count so often"""
    most: int
    """routed experts of a token, at most"""


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a model in training, per token of a full sequence."""

    fixed: dict[str, Flops]
    """of each part, without what depends on the experts of a token; keys as FLOP_PARTS"""
    moe_layers: tuple[MoELayerFlops, ...]
    visible_scores: Flops
    """attention scores of the keys that a query sees, on heads without padding"""
    recomputes: bool
    """whether the blocks' forward pass runs again in the backward pass"""

    @staticmethod
    def of(model: GPT, seq_length: int = 0) -> ModelFlops:
        """Count the operations of a model on any device, before ZeRO shards it.

        Args:
            seq_length: tokens of a sequence; 0: those of the model's configuration.
        """
        seq_length = seq_length or model.config.seq_length
        fixed = dict.fromkeys(FLOP_PARTS, Flops())
        visible = Flops()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".gate." not in f"{name}.":
                flops = _linear(module)
                fixed[part_of(name)] += flops
            if isinstance(module, Attention | LatentAttention):
                fixed["attention scores"] += _computed_scores(module, seq_length)
                visible += _visible_scores(module, seq_length)
        if not model.config.untie_embeddings_and_output_weights:
            fixed["output layer"] += _linear(model.embed_tokens)
        moe_layers = []
        layers = find_moe_layers(model)
        for layer, gate in zip(layers, _count_gates(layers), strict=True):
            fixed["router"] += gate.routing
            moe_layers.append(
                MoELayerFlops(_assignment(layer), gate.zero_computation, *_assignments(layer))
            )
        return ModelFlops(fixed, tuple(moe_layers), visible, model.recompute)

    def fixed_use(self) -> ExpertUse | None:
        """Return the experts per token if the gates leave no choice, else None."""
        if any(layer.fewest != layer.most for layer in self.moe_layers):
            return None
        return self.use([layer.most for layer in self.moe_layers])

    def use(self, routed: float | Sequence[float]) -> ExpertUse:
        """Return an assumed use of the experts, without zero-computation experts.

        Args:
            routed: routed experts per token, of all MoE layers or of each.
        """
        if isinstance(routed, int | float):
            routed = [float(routed)] * len(self.moe_layers)
        return ExpertUse(tuple(routed), (0.0,) * len(routed))

    def parts(self, use: ExpertUse) -> dict[str, Flops]:
        """Return the operations of each part per token; keys as FLOP_PARTS.

        Raises:
            ValueError: `use` has another number of MoE layers.
        """
        if len(use.routed) != len(self.moe_layers):
            raise ValueError(
                f"experts per token are given for {len(use.routed)} MoE layers; allowed: one "
                f"number for each of the {len(self.moe_layers)} of this model. Compare the "
                "run's flags with the model's"
            )
        parts = dict(self.fixed)
        layers = zip(self.moe_layers, use.routed, use.zero_computation, strict=True)
        for layer, routed, zero_computation in layers:
            parts["routed experts"] += layer.assignment * routed
            parts["zero-computation experts"] += layer.zero_computation * zero_computation
        return parts

    def per_token(self, use: ExpertUse) -> Flops:
        """Return the model's operations per token, without recomputation."""
        return sum(self.parts(use).values(), Flops())

    def recomputed(self, use: ExpertUse) -> float:
        """Return the operations per token of the blocks' second forward pass, 0 without it."""
        if not self.recomputes:
            return 0.0
        parts = self.parts(use)
        return self.per_token(use).forward - parts["output layer"].forward

    def computed(self, use: ExpertUse) -> dict[str, float]:
        """Return the operations per token that a training step computes, by part.

        They are those of the forward and the backward pass and of recomputation. Parts without
        any are left out; keys as FLOP_PARTS.
        """
        computed = {}
        for part, flops in self.parts(use).items():
            total = flops.total
            if self.recomputes and part != "output layer":
                total += flops.forward
            if total:
                computed[part] = total
        return computed

    def training_metrics(self, row: Mapping[str, Any], tokens_per_s: float) -> dict[str, float]:
        """Return the metrics of a training row: empty if the use of experts is not known.

        Args:
            row: other metrics, with the experts per token of each MoE layer. They may be
                missing where the gates leave no choice.
            tokens_per_s: of one rank.
        """
        use = ExpertUse.of_metrics(row) or self.fixed_use()
        if use is None:
            return {}
        flops = self.per_token(use).total
        return {"flops_per_token": flops, "tflops_per_s": flops * tokens_per_s / 1e12}


def _linear(module: nn.Module) -> Flops:
    """Return the operations of a layer with one matrix, per row."""
    return Flops.of_matrix(module.weight.numel(), trained=module.weight.requires_grad)


def _assignments(layer: MoELayer) -> tuple[int, int]:
    """Return the fewest and the most routed assignments of a token."""
    gate = layer.gate
    if isinstance(layer, PEERLayer):
        # Heads that choose the same expert look it up each for itself.
        return gate.capacity_k(), gate.capacity_k()
    return gate.experts_per_token(gate.config, gate.num_experts)


def _assignment(layer: MoELayer) -> Flops:
    """Return the operations of one routed expert for one token.

    A token is multiplied once by each matrix of its expert. All parameters but vectors are
    stacks of at least three dimensions.
    """
    total = Flops()
    for stack in layer.experts.parameters():
        if stack.dim() < 3:
            continue
        weights = stack.numel() // stack.shape[0] * layer.num_experts
        per_expert = weights // layer.gate.num_experts
        total += Flops.of_matrix(per_expert, trained=stack.requires_grad)
    return total


def _count_gates(layers: Sequence[MoELayer]) -> list[GateFlops]:
    """Count the gates of a model's layers; gates of equal form and options only once."""
    counted: dict[tuple, GateFlops] = {}
    carries: dict[Any, Callable[[int], Tensor] | None] = {}
    result = []
    for layer in layers:
        gate = layer.gate
        carry = carries.get(layer.carry_key)
        form = [(n, p.shape, p.requires_grad) for n, p in gate.named_parameters()]
        key = (type(gate), repr(gate.config), repr(form), carry is None)
        if key not in counted:
            counted[key] = count_gate(gate, carry)
        carries[layer.carry_key] = counted[key].carry
        result.append(counted[key])
    return result


def _computed_scores(attention: Attention | LatentAttention, length: int) -> Flops:
    """Return the operations of scores and weighted sums as `attend` runs them, per token."""
    if isinstance(attention, LatentAttention):
        # Keys and values are padded to the same size.
        width = max(attention.nope_size + attention.rope_size, attention.value_size)
        pairs = computed_pairs(length)
    else:
        has_sinks = attention.sinks is not None
        width = attention.head_size
        if has_sinks:
            width = padded_head_size(width)
        pairs = computed_pairs(length, attention.window, has_sinks)
    return _scores(attention.num_heads * pairs * 2 * width, length)


def _visible_scores(attention: Attention | LatentAttention, length: int) -> Flops:
    if isinstance(attention, LatentAttention):
        widths = attention.nope_size + attention.rope_size + attention.value_size
        return _scores(attention.num_heads * visible_pairs(length) * widths, length)
    pairs = visible_pairs(length, attention.window)
    return _scores(attention.num_heads * pairs * 2 * attention.head_size, length)


def _scores(multiplications: int, length: int) -> Flops:
    """Return the operations per token of so many multiplications per sequence."""
    forward = 2 * multiplications / length
    return Flops(forward, 2 * forward)
