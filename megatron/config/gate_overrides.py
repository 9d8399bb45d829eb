"""Gates whose own options say how many experts there are, how wide, and in which layers (PEER).

Such a gate's Config has a method `moe_overrides(moe, num_layers) -> dict`: from the fields of MoEConfig that were set, those
that it decides.
"""

from __future__ import annotations

from typing import Any

from megatron.config.schema import ModelConfig, require


def apply(gate_config: Any, moe: dict[str, Any], num_layers: int, gate: str) -> None:
    """Put what the gate's options say into `moe`, the fields of MoEConfig that were set.

    Raises:
        ValueError: they contradict what was set.
    """
    if not hasattr(gate_config, "moe_overrides"):
        return
    for name, value in gate_config.moe_overrides(moe, num_layers).items():
        told = moe.get(name) or value
        require(
            told == value,
            f"--{name.replace('_', '-')}",
            told,
            f"{value!r}, as --gate {gate} and its flags say",
            "Leave it out.",
        )
        moe[name] = value


def drop_derived(stored: dict[str, dict[str, Any]], gate_class: type) -> str:
    """Take out of a run.json what its gate's options said of the mixture, so that flags can say it anew.

    Args:
        stored: sections of run.json; the gate's options not checked yet.
        gate_class: the Config of the gate stored there.
    Returns:
        what was taken out, as the end of a sentence about the gate's options; empty if nothing was.
    """
    moe, options = stored.get("moe", {}), stored.get("gate_options", {})
    if not hasattr(gate_class, "moe_overrides") or not moe.get("num_experts"):
        return ""
    config = gate_class(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    )
    num_layers = stored.get("model", {}).get("num_layers", ModelConfig.num_layers)
    try:
        said = config.moe_overrides({}, num_layers)
    except ValueError:  # the number of experts was --num-experts, which stays
        said = config.moe_overrides({"num_experts": moe["num_experts"]}, num_layers)
        del said["num_experts"]
    names = [name for name, value in said.items() if moe.get(name) == value]
    for name in names:
        del moe[name]
    if "moe_layers" in names:  # then these are defaults that nobody set
        for name in ("expert_interval", "moe_first_k_dense"):
            moe.pop(name, None)
    flags = " ".join(f"--{name.replace('_', '-')}" for name in names)
    return f" with the {flags} that came from them" if names else ""
