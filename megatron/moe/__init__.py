"""The public names for writing and trying gates.

The names are imported on first use (PEP 562): `import megatron.moe` does not import
torch, which takes seconds and which command-line parsing does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.moe.gate import Gate, available_gates, create_gate
    from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing

__all__ = [
    "Gate",
    "GateInput",
    "LoadBalancingLoss",
    "Routing",
    "available_gates",
    "create_gate",
]

_MODULES = {
    "Gate": "megatron.moe.gate",
    "GateInput": "megatron.moe.routing",
    "LoadBalancingLoss": "megatron.moe.routing",
    "Routing": "megatron.moe.routing",
    "available_gates": "megatron.moe.gate",
    "create_gate": "megatron.moe.gate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # later accesses skip this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
