"""The public names for writing and trying gates; they stay stable, see docs/gates.md.

The names are imported on first use (PEP 562): `import megatron.moe` does not import
torch, which takes seconds and which command-line parsing does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.config.needs import setting
    from megatron.moe.dispatch.plan import PermutedTokens
    from megatron.moe.experts.expert_type import (
        ExpertContext,
        ExpertType,
        available_expert_types,
        create_experts,
    )
    from megatron.moe.gate import (
        Gate,
        GateContext,
        ParameterGroup,
        available_gates,
        create_gate,
    )
    from megatron.moe.gate_functional import linear_fp32
    from megatron.moe.gate_options import LossConfig, ScopeConfig
    from megatron.moe.losses import aux_losses, z_loss
    from megatron.moe.routing import (
        GateInput,
        LoadBalancingLoss,
        Routing,
        RoutingScores,
        StepTotals,
    )

__all__ = [
    "ExpertContext",
    "ExpertType",
    "Gate",
    "GateContext",
    "GateInput",
    "LoadBalancingLoss",
    "LossConfig",
    "ParameterGroup",
    "PermutedTokens",
    "Routing",
    "RoutingScores",
    "ScopeConfig",
    "StepTotals",
    "aux_losses",
    "available_expert_types",
    "available_gates",
    "create_experts",
    "create_gate",
    "linear_fp32",
    "setting",
    "z_loss",
]

_MODULES = {
    "ExpertContext": "megatron.moe.experts.expert_type",
    "ExpertType": "megatron.moe.experts.expert_type",
    "Gate": "megatron.moe.gate",
    "GateContext": "megatron.moe.gate",
    "GateInput": "megatron.moe.routing",
    "LoadBalancingLoss": "megatron.moe.routing",
    "LossConfig": "megatron.moe.gate_options",
    "ParameterGroup": "megatron.moe.gate",
    "PermutedTokens": "megatron.moe.dispatch.plan",
    "Routing": "megatron.moe.routing",
    "RoutingScores": "megatron.moe.routing",
    "ScopeConfig": "megatron.moe.gate_options",
    "StepTotals": "megatron.moe.routing",
    "aux_losses": "megatron.moe.losses",
    "available_expert_types": "megatron.moe.experts.expert_type",
    "available_gates": "megatron.moe.gate",
    "create_experts": "megatron.moe.experts.expert_type",
    "create_gate": "megatron.moe.gate",
    "linear_fp32": "megatron.moe.gate_functional",
    "setting": "megatron.config.needs",
    "z_loss": "megatron.moe.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # later accesses skip this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
