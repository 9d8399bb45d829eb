"""The factor with which the experts of a token add up to the dense layer.

With S different slices of the dense layer among the experts, the weights of a token's experts must
add up to S. The factor is S / s with the sum s of a gate that prefers no expert
(`megatron.interop.upcycle.gates`):

    s = 1 with weights that are divided by their sum: S
    s = k / E with softmax over all experts: S E / k, which is E x G^2 / k for the E x G experts
        of granular copies (He et al. 2024) and their S = G
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron.config.fields import flag_name, require
from megatron.interop.upcycle.flags import UpcycleRequest
from megatron.interop.upcycle.gates import build_gate, uniform_weight_sum
from megatron.log import get_logger
from megatron.model.gpt import GPT
from megatron.moe.gate import Gate

_GATE_FACTOR = "routed_scaling_factor"
_LARGEST_DENOMINATOR = 1000
_ROUNDING = 1e-5


@dataclass(frozen=True)
class ScaledRequest:
    """A request whose gates have their factors."""

    request: UpcycleRequest
    weight_scales: Mapping[str, float]
    """factor of the experts' down projections by the name of the gate"""


def set_scales(request: UpcycleRequest, model: GPT) -> ScaledRequest:
    """Choose the factor of each gate of the model.

    Args:
        model: the MoE model, which may be on `meta`.
    Raises:
        ValueError: the weights of a gate's experts add up to 0 or less.
    """
    config = request.config
    gate_options: dict[str, dict[str, Any]] = dict(config.gate_options)
    scales = {}
    for name in config.moe.gate_layers.gates:
        scales[name] = 1.0
        if request.options.scale == "none":
            continue
        total = _weight_sum(_first_gate(request, model, name), name)
        factor = _simple(request.num_slices / total)
        options = gate_options.get(name, {})
        if factor == 1:
            continue
        if _is_in_gate(request, options):
            factor = _simple(options[_GATE_FACTOR] * factor)
            gate_options[name] = {**options, _GATE_FACTOR: factor}
            get_logger().info("gate %s: %s is %.6g", name, flag_name(_GATE_FACTOR), factor)
        else:
            scales[name] = factor
            get_logger().info(
                "gate %s: the experts' down projections are multiplied by %.6g", name, factor
            )
    config = replace(config, gate_options=gate_options)
    return ScaledRequest(replace(request, config=config), scales)


def _first_gate(request: UpcycleRequest, model: GPT, name: str) -> Gate:
    """Return the gate of the first block that has this one."""
    layer = next(i for i in request.moe_layers if request.config.moe.gate_of(i) == name)
    return build_gate(model.layers[layer].mlp.gate)


def _weight_sum(gate: Gate, name: str) -> float:
    total = uniform_weight_sum(gate)
    require(
        total > 0,
        f"the sum of the weights of gate {name}",
        total,
        "a positive number, by which the experts are scaled",
        "Set --scale none.",
    )
    return total


def _is_in_gate(request: UpcycleRequest, options: Mapping[str, Any]) -> bool:
    """Return whether the factor belongs to the gate: it has the option, and no flag sets it."""
    flag = flag_name(_GATE_FACTOR).removeprefix("--")
    is_set = any(given.endswith(flag) for given in request.set_flags)
    return not request.options.scales_weights and _GATE_FACTOR in options and not is_set


def _simple(value: float) -> float:
    """Return the fraction of small numbers that is meant, such as 8 / 3, if there is one.

    The sums of weights are rounded to fp32.
    """
    fraction = float(Fraction(value).limit_denominator(_LARGEST_DENOMINATOR))
    if abs(fraction - value) <= _ROUNDING * abs(value):
        return fraction
    return value
