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


STEPS = (keep_mean_over_layers,)
"""In this order; steps of gate options come before the one that changes their layout"""


def migrate_run_json(content: dict[str, Any]) -> dict[str, Any]:
    """Apply all steps."""
    for step in STEPS:
        content = step(content)
    return content
