"""Migration of a run.json from version 2 to 3, as a list of small steps.

Version 3 changed the meaning of settings that runs had stored. Each step rewrites one of them,
so that the run computes what it was trained with. A step takes and returns the content, whose
types are not checked yet, and changes no nested object in place.
"""

from __future__ import annotations

from typing import Any


def keep_mean_over_layers(content: dict[str, Any]) -> dict[str, Any]:
    """Store that auxiliary losses are averaged over MoE layers, as they were up to version 2."""
    moe = content.get("moe")
    if not isinstance(moe, dict) or not moe.get("num_experts"):
        return content
    return {**content, "moe": {"moe_aux_loss_reduction": "mean", **moe}}


def rename_cap_of_threshold(content: dict[str, Any]) -> dict[str, Any]:
    """Rename the option `topk` of the gate `threshold`, which capped its experts per token."""
    options = content.get("gate_options")
    if not isinstance(options, dict) or "topk" not in options or _gate(content) != "threshold":
        return content
    renamed = {"threshold_max_experts": options["topk"], **options}
    del renamed["topk"]
    return {**content, "gate_options": renamed}


_AUTOMATIC_NUMBERS = {"moepp": "num_constant_experts", "tcmoe": "num_null_experts"}
"""By gate, the option whose value for an automatic number was 0 and is -1, as 0 means none"""


def rename_automatic_numbers(content: dict[str, Any]) -> dict[str, Any]:
    """Store -1 for numbers of choices without an expert that follow from other options."""
    options = content.get("gate_options")
    gate = _gate(content)
    if not isinstance(options, dict) or not isinstance(gate, str):
        return content
    name = _AUTOMATIC_NUMBERS.get(gate)
    if name not in options or options[name] != 0 or type(options[name]) is not int:
        return content
    return {**content, "gate_options": {**options, name: -1}}


_CAPACITY_FACTORS = ("moe_train_capacity_factor", "moe_eval_capacity_factor")
_LARGEST_FACTOR = 1e100
"""Above any factor with an effect; larger integers have no quotient"""
_TOPK_2 = (
    "topk",
    "cosine",
    "deepseek_v2",
    "deepseek_v3",
    "remoe",
    "tcmoe",
    "expert_choice",
)
"""Gates of version 2 whose default of `topk` was 2; a gate outside the tree stores it"""
_NO_K = ("threshold", "moepp", "hash", "base")
"""Gates whose capacity did not change: without k, or like MoE++ with k in all versions"""


def divide_capacity_factors(content: dict[str, Any]) -> dict[str, Any]:
    """Divide capacity factors by the number of experts per token, k.

    The capacity was ceil(factor * T / E) rows and is ceil(factor * k * T / E) now, each between
    --moe-min-capacity and T, which did not change. The rule rounds off the error of the
    division, so that the same number of rows results.
    """
    moe = content.get("moe")
    k = _experts_per_token(content)
    if not isinstance(moe, dict) or k is None:
        return content
    divided = {}
    for name in _CAPACITY_FACTORS:
        factor = moe.get(name)
        if type(factor) in (int, float) and abs(factor) < _LARGEST_FACTOR:
            divided[name] = factor / k
    return {**content, "moe": {**moe, **divided}}


def _experts_per_token(content: dict[str, Any]) -> int | None:
    """Return k of the stored gate, or None where its capacity stays as it is."""
    gate = _gate(content)
    options = content.get("gate_options", {})
    if gate in _NO_K or not isinstance(options, dict):
        return None
    if gate == "peer":
        per_head = _integer(options, "peer_topk", 16)
        most = _integer(content["moe"], "num_experts", per_head)
        k = _integer(options, "peer_num_heads", 8) * min(per_head, most)
    else:
        k = _integer(options, "topk", 2 if gate in _TOPK_2 else 1)
    return k if k > 1 else None


def _integer(options: dict[str, Any], name: str, default: int) -> int:
    """Return an option, or 1 for a value that the gate will refuse."""
    value = options.get(name, default)
    return value if type(value) is int and 0 < value < 2**31 else 1


def _gate(content: dict[str, Any]) -> Any:
    """Return the stored name of the gate, or the default of version 2."""
    moe = content.get("moe")
    return moe.get("gate", "topk") if isinstance(moe, dict) else "topk"


def name_gate_of_options(content: dict[str, Any]) -> dict[str, Any]:
    """Store the gate's options under its name: runs had one gate up to version 2."""
    options = content.get("gate_options")
    if not isinstance(options, dict) or not options:
        return content
    return {**content, "gate_options": {str(_gate(content)): options}}


STEPS = (
    keep_mean_over_layers,
    rename_cap_of_threshold,
    rename_automatic_numbers,
    divide_capacity_factors,
    name_gate_of_options,
)
"""In this order; steps of gate options come before the one that changes their layout"""


def migrate_run_json(content: dict[str, Any]) -> dict[str, Any]:
    """Apply all steps.

    A file without a version counts as an old one. If it has options by gate, it was written by
    hand for version 3, and nothing changes.
    """
    options = content.get("gate_options")
    if isinstance(options, dict) and any(isinstance(value, dict) for value in options.values()):
        return content
    for step in STEPS:
        content = step(content)
    return content
