"""Gates whose own options determine the number, size and position of the experts (PEER).

The Config of such a gate has a method `moe_overrides(moe, num_layers) -> dict`. It takes the
fields of MoEConfig that were set, and returns those that the gate's options determine.
"""

from __future__ import annotations

from typing import Any

from megatron.config.fields import flag_name, require
from megatron.config.flags import EXPERT_OPTIONS, flags_of
from megatron.config.gate_layers import DENSE, parse_gate_layers
from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.config.run_json import parse_stored_values

_OPTIONS_OF_GROUPED_EXPERTS = ("expert_type", "moe_weight_on_input", "moe_latent_size")


def apply_gate_overrides(
    gate_config: Any, moe: dict[str, Any], num_layers: int, gate: str
) -> None:
    """Set the fields in `moe` that the gate's options determine.

    Args:
        gate_config: options of the gate.
        moe: fields of MoEConfig that were set; changed in place.
        gate: name of the gate.
    Raises:
        ValueError: a field was set to another value, or another gate has layers, too.
    """
    if not hasattr(gate_config, "moe_overrides"):
        return
    layers = parse_gate_layers(moe.get("gate", MoEConfig.gate))
    others = [name for name in layers.gates if name != gate]
    require(
        not others,
        "--gate",
        layers.text,
        f"{gate} as the only gate of a model, with {DENSE} layers",
        f"Its options set --num-experts and --moe-ffn-hidden-size, which {' '.join(others)} would "
        "share.",
    )
    known = dict(moe)
    if layers.is_per_layer:
        blocks = range(num_layers)
        known["moe_layers"] = tuple(i for i in blocks if layers.gate_of(i) is not None)
    overrides = gate_config.moe_overrides(known, num_layers)
    if layers.is_per_layer:
        chosen = overrides.pop("moe_layers", known["moe_layers"])
        allowed = f"layers as the flags of {gate} say, which are {list(chosen)}"
        same = sorted(chosen) == list(known["moe_layers"])
        require(same, "--gate", layers.text, allowed, "Set them in one place only.")
    for name, value in overrides.items():
        current = moe.get(name) or value
        require(
            current == value,
            flag_name(name),
            current,
            f"{value!r}, as --gate {gate} and its flags say",
            "Leave it out.",
        )
        moe[name] = value


def refuse_expert_options(
    gate_config: Any, moe: dict[str, Any], expert_config: Any, gate: str
) -> None:
    """Check that no option of grouped experts is set for a gate that has other experts (PEER).

    Args:
        gate_config: options of the gate.
        moe: fields of MoEConfig that were set.
        expert_config: options of the expert type.
        gate: name of the gate.
    Raises:
        ValueError: one is set; the message names its flag.
    """
    if not hasattr(gate_config, "moe_overrides"):
        return
    allowed = f"left out with --gate {gate}, whose experts are of a kind of their own"
    for name in _OPTIONS_OF_GROUPED_EXPERTS:
        default = getattr(MoEConfig, name)
        value = moe.get(name, default)
        require(value == default, flag_name(name), value, allowed)
    for flag in flags_of(type(expert_config), EXPERT_OPTIONS):
        value = getattr(expert_config, flag.name)
        require(value == flag.default, flag.spellings[0], value, allowed)


def drop_gate_overrides(
    stored: dict[str, dict[str, Any]], gate: str, gate_class: type, path: str
) -> list[str]:
    """Remove the fields of MoEConfig that the stored gate's options determined.

    Flags may then change these options, or replace the gate.

    Args:
        stored: sections of a run.json, whose gate options are not checked yet; changed in
            place.
        gate: name of a gate stored there.
        gate_class: its Config.
        path: the run.json, for messages.
    Returns:
        The flags of the removed fields.
    Raises:
        ValueError: an option of the gate is unknown, has a wrong type, or is refused.
    """
    moe = stored.get("moe", {})
    if not hasattr(gate_class, "moe_overrides") or not moe.get("num_experts"):
        return []
    num_layers = stored.get("model", {}).get("num_layers", ModelConfig.num_layers)
    options = parse_stored_values(
        stored.get("gate_options", {}).get(gate, {}),
        f"gate_options.{gate}",
        flags_of(gate_class, "gate_options"),
        path,
    )
    overrides = _overrides(gate_class(**options), moe["num_experts"], num_layers)
    names = [name for name, value in overrides.items() if moe.get(name) == value]
    for name in names:
        del moe[name]
    if "moe_layers" in names:
        # Where --moe-layers is determined, these two can only have their defaults.
        moe.pop("expert_interval", None)
        moe.pop("moe_first_k_dense", None)
    return [flag_name(name) for name in names]


def _overrides(gate_config: Any, num_experts: int, num_layers: int) -> dict[str, Any]:
    """Return the fields that a gate's options determine without the help of --num-experts."""
    try:
        return gate_config.moe_overrides({}, num_layers)
    except ValueError:
        # The options depend on --num-experts, which was therefore set by the user and stays.
        overrides = gate_config.moe_overrides({"num_experts": num_experts}, num_layers)
        del overrides["num_experts"]
        return overrides
