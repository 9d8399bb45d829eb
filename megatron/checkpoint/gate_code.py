"""The code of a run's gates: recorded in checkpoints, and compared when one is loaded.

A gate may be a file of the user or of an installed package. A checkpoint records where its
gates came from and a hash of their code. It is a record only: nothing is imported from a path
that a checkpoint names.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron.config.schema import RunConfig
from megatron.log import warn_on_rank0
from megatron.moe.gate import available_gates
from megatron.moe.gate_registry import (
    REGISTRY,
    GateOrigin,
    expert_type_origin,
    gate_origin,
)
from megatron.parallel.groups import Groups, all_gather_objects

_SHOWN_DIGITS = 12
"""Digits of a SHA-256 in messages"""


def describe_gates(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return the fields of `GateOrigin` of each gate of a run, by name."""
    if not config.moe.num_experts:
        return {}
    return {name: asdict(gate_origin(name)) for name in config.moe.gate_layers.gates}


def describe_expert_types(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return the fields of `GateOrigin` of the expert type of a run, by name."""
    if not config.moe.num_experts:
        return {}
    return {config.moe.expert_type: asdict(expert_type_origin(config.moe.expert_type))}


def require_known_gates(saved: dict[str, dict[str, str]], where: str) -> None:
    """Check that the gates of a checkpoint are built-in, installed or imported.

    Args:
        saved: result of `describe_gates` in the checkpoint; empty in those of earlier versions.
        where: name of the checkpoint for messages.

    Raises:
        ValueError: one is not.
    """
    for name, fields in saved.items():
        if name in available_gates():
            continue
        origin = _origin(fields)
        advice = "give --gate-path with that file or a copy of it"
        if origin.package:
            advice = f"install {origin.package}, or give its file with --gate-path"
        reason = REGISTRY.conflicts.get(name) or REGISTRY.failures.get(name)
        if reason:
            advice = reason
        raise ValueError(
            f"checkpoint {where} was made with the gate {name!r} of {origin}, which is not "
            f"imported (a path in a checkpoint never is): {advice}"
        )


def warn_of_changed_gates(
    saved: dict[str, dict[str, str]], current: dict[str, dict[str, str]], kind: str = "gate"
) -> None:
    """Log one line for each gate, or expert type, whose code is not that of the checkpoint.

    Args:
        kind: what the names are, for messages.
    """
    for name, fields in current.items():
        old = _origin(saved.get(name, {}))
        new = _origin(fields)
        if old.sha256 and new.sha256 and old.sha256 != new.sha256:
            warn_on_rank0(
                "the code of %s %s has changed since the checkpoint: %s has the SHA-256 %s, "
                "and %s had %s",
                kind,
                name,
                new,
                new.sha256[:_SHOWN_DIGITS],
                old,
                old.sha256[:_SHOWN_DIGITS],
            )


def require_same_gates_on_ranks(config: RunConfig, groups: Groups) -> None:
    """Check that all ranks have imported the same code from outside the tree.

    Raises:
        ValueError: the files of two ranks differ; then all ranks raise it.
    """
    _require_same_on_ranks(describe_gates(config), "gate", groups)
    _require_same_on_ranks(describe_expert_types(config), "expert type", groups)


def _require_same_on_ranks(
    described: dict[str, dict[str, str]], kind: str, groups: Groups
) -> None:
    if all(fields["kind"] == "built-in" for fields in described.values()):
        return
    on_ranks = all_gather_objects(described, groups)
    for name in described:
        first = on_ranks[0][name]
        for rank, gates in enumerate(on_ranks):
            if gates[name]["sha256"] != first["sha256"]:
                raise ValueError(
                    f"the code of {kind} {name!r} differs between ranks: {first['path']} has the "
                    f"SHA-256 {first['sha256'][:_SHOWN_DIGITS]} on rank 0, and "
                    f"{gates[name]['path']} has {gates[name]['sha256'][:_SHOWN_DIGITS]} on rank "
                    f"{rank}; put the same file on every node"
                )


def _origin(fields: dict[str, Any]) -> GateOrigin:
    """Return the origin that a checkpoint records, of which a later version may have more."""
    known = {name: fields[name] for name in GateOrigin.__dataclass_fields__ if name in fields}
    return GateOrigin(**{"kind": "", **known})
