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


def _gate(content: dict[str, Any]) -> Any:
    """Return the stored name of the gate, or the default of version 2."""
    moe = content.get("moe")
    return moe.get("gate", "topk") if isinstance(moe, dict) else "topk"


STEPS = (keep_mean_over_layers, rename_cap_of_threshold)
"""In this order; steps of gate options come before the one that changes their layout"""


def migrate_run_json(content: dict[str, Any]) -> dict[str, Any]:
    """Apply all steps."""
    for step in STEPS:
        content = step(content)
    return content
