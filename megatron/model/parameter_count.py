"""Parameter counts by part of the model, and how many parameters one token uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

MODEL_PARTS = {
    "embedding": ("embed_tokens", "embed_positions"),
    "attention": ("self_attn",),
    "routed experts": ("experts",),
    "latent layers": ("fc1_latent_proj", "fc2_latent_proj"),
    "shared experts": ("shared", "shared_gate"),
    "router": ("gate",),
    "dense ffn": ("mlp",),
    "norms": ("input_layernorm", "post_attention_layernorm", "norm"),
    "output layer": ("lm_head",),
    "other": (),
}
"""Module names that identify each part in the path of a parameter; the first match counts"""


@dataclass(frozen=True)
class ParameterCount:
    """Parameter counts of the complete model, also when this rank holds a slice of it."""

    total: int
    parts: dict[str, int]
    """Parameters of each part, with every key of MODEL_PARTS; 0 for a tied output layer"""
    active_min: int
    """Parameters used by a token that visits the fewest experts possible"""
    active_max: int
    """Parameters used by a token that visits the most experts possible"""
    frozen_parts: dict[str, int] = field(default_factory=dict)
    """Parameters of each part that are not trained; parts without any are left out"""

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return self.total - sum(self.frozen_parts.values())


def count_parameters(
    model: nn.Module, experts_per_token: Sequence[float] | None = None
) -> ParameterCount:
    """Count the parameters of a model, on any device including `meta`, before ZeRO shards them.

    Routed experts are stacks [number of local stacks, ...] in the module `experts` of a layer
    with the attributes `num_experts`, the number of stacks over all ranks, and `gate`. All
    stacks are counted, also where this rank holds a slice, and a token uses its share of them:
    as many experts as the gate of the layer says.

    Args:
        experts_per_token: mean number of routed experts that a token uses in each MoE layer;
            None: the fewest and the most that the gates allow.
    """
    moe_layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "num_experts") and hasattr(module, "gate"):
            moe_layers[name] = module
    visited = _visited_experts(moe_layers, experts_per_token)
    parts = dict.fromkeys(MODEL_PARTS, 0)
    frozen_parts: dict[str, int] = {}
    active = [0, 0]
    for name, parameter in model.named_parameters():
        part = part_of(name)
        number = parameter.numel()
        fractions = (1.0, 1.0)
        if part == "routed experts":
            layer_name = name.partition(".experts.")[0]
            layer = moe_layers[layer_name]
            number = number // parameter.shape[0] * layer.num_experts
            fractions = tuple(n / layer.gate.num_experts for n in visited[layer_name])
        parts[part] += number
        if not parameter.requires_grad:
            frozen_parts[part] = frozen_parts.get(part, 0) + number
        for i, fraction in enumerate(fractions):
            active[i] += round(number * fraction)
    return ParameterCount(sum(parts.values()), parts, *active, frozen_parts)


def _visited_experts(
    moe_layers: dict[str, nn.Module], experts_per_token: Sequence[float] | None
) -> dict[str, tuple[float, float]]:
    """Return the fewest and the most routed experts of a token by the name of the layer."""
    visited = {}
    for i, (name, layer) in enumerate(moe_layers.items()):
        gate = layer.gate
        if experts_per_token is None:
            visited[name] = gate.experts_per_token(gate.config, gate.num_experts)
        else:
            # The experts of a token may repeat, as those of PEER's heads.
            mean = min(experts_per_token[i], gate.num_experts)
            visited[name] = (mean, mean)
    return visited


def parameter_table(size: ParameterCount) -> str:
    """Format the counts: one line for each part that has parameters, and the total.

    There is a column for the trainable ones if some parameters are frozen.
    """
    outside_experts = size.total - size.parts["routed experts"]
    lines = [_table_line(size, "parameters", "all", "trainable", "active per token")]
    for part, number in size.parts.items():
        if not number:
            continue
        active = _format_count(number)
        if part == "routed experts":
            active = _format_range(
                size.active_min - outside_experts, size.active_max - outside_experts
            )
        trainable = _format_count(number - size.frozen_parts.get(part, 0))
        lines.append(_table_line(size, part, _format_count(number), trainable, active))
    total = _format_count(size.total)
    active = _format_range(size.active_min, size.active_max)
    lines.append(_table_line(size, "total", total, _format_count(size.trainable), active))
    return "\n".join(lines)


def _table_line(
    size: ParameterCount, name: str, number: str, trainable: str, active: str
) -> str:
    if size.frozen_parts:
        number = f"{number:>12}{trainable:>12}"
    return f"{name:<16}{number:>12}   {active}"


def part_of(name: str) -> str:
    """Return the key of MODEL_PARTS that a parameter of this name belongs to."""
    path = name.split(".")
    for part, modules in MODEL_PARTS.items():
        if any(module in path for module in modules):
            return part
    return "other"


def _format_count(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} B"
    return f"{number / 1e6:.2f} M"


def _format_range(low: int, high: int) -> str:
    if low == high:
        return _format_count(low)
    return f"{_format_count(low)} to {_format_count(high)}"
