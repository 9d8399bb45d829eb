"""Parameter counts by part of the model, and how many of them one token uses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

PARTS = {
    "embedding": ("embed_tokens", "embed_positions"),
    "attention": ("self_attn",),
    "routed experts": ("experts",),
    "shared experts": ("shared",),
    "router": ("gate",),
    "dense ffn": ("mlp",),
    "norms": ("input_layernorm", "post_attention_layernorm", "norm"),
    "output layer": ("lm_head",),
    "other": (),
}
"""part -> the names that mark it in a parameter's path; the first part that matches has it"""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of the whole model, whatever slice of it this rank holds."""

    total: int
    parts: dict[str, int]
    """part -> parameters, every key of PARTS; a tied output layer has none of its own"""
    active_min: int
    """parameters that one token uses when it visits the fewest experts it may"""
    active_max: int
    """the same for the most experts"""


def count_parameters(
    model: nn.Module, experts_per_token: tuple[int, int] = (0, 0)
) -> ParameterCount:
    """Count the parameters of a model, on any device (`meta` too) and before ZeRO shards them.

    Routed experts are stacks [stacks here, ...] in the module `experts` of a layer with the attributes `num_experts`,
    how many stacks there are over all ranks, and `gate`. All are counted, also where this rank holds a slice, and one
    token uses its share of them.

    Args:
        experts_per_token: fewest and most routed experts that one token visits.
    """
    parts, active = dict.fromkeys(PARTS, 0), [0, 0]
    layers = {
        name: module for name, module in model.named_modules() if hasattr(module, "num_experts")
    }
    for name, parameter in model.named_parameters():
        part, number, shares = part_of(name), parameter.numel(), (1.0, 1.0)
        if part == "routed experts":
            layer = layers[name.partition(".experts.")[0]]
            number = number // parameter.shape[0] * layer.num_experts
            shares = tuple(k / layer.gate.num_experts for k in experts_per_token)
        parts[part] += number
        active = [a + round(number * share) for a, share in zip(active, shares)]
    return ParameterCount(sum(parts.values()), parts, *active)


def parameter_table(size: ParameterCount) -> str:
    """The counts as text: one line for each part that has parameters, then the total."""
    outside = size.total - size.parts["routed experts"]
    lines = [f"{'parameters':<16}{'all':>12}   active per token"]
    for part, number in size.parts.items():
        used = (number, number)
        if part == "routed experts":
            used = (size.active_min - outside, size.active_max - outside)
        if number:
            lines.append(f"{part:<16}{_unit(number):>12}   {_span(*used)}")
    lines.append(
        f"{'total':<16}{_unit(size.total):>12}   {_span(size.active_min, size.active_max)}"
    )
    return "\n".join(lines)


def part_of(name: str) -> str:
    """The key of PARTS that a parameter of this name belongs to."""
    words = name.split(".")
    return next(
        (part for part, marks in PARTS.items() if any(mark in words for mark in marks)), "other"
    )


def _unit(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _span(low: int, high: int) -> str:
    return _unit(low) if low == high else f"{_unit(low)} to {_unit(high)}"
