"""Groups of runs that differ in the seed only, and what to call them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron.analysis.report.runs import ReportRun
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.fault_tolerance import FaultToleranceConfig
from megatron.config.monitoring import LoggingConfig, ProfilingConfig
from megatron.config.values import flatten_settings

MOST_LABEL_PARTS = 3
"""Settings that a label names at most; beyond that, the name of the first run is clearer"""

_EFFECTIVE_FIELDS = {"load_optim", "load_rng", "override_lr_schedule", "loss_spike_action"}
"""Fields on which results depend, of sections whose other fields cannot change them"""

_ORIGIN = ("train.init_from_hf", "train.load", "train.load_step")
"""Settings of the weights that a run begins with; the last two only with --finetune"""


def _fields_without_effect() -> set[str]:
    """Return fields of a configuration on which the results of a run do not depend.

    The seed is one of them here: runs that differ in it are one group.
    """
    names = {"seed", "log_interval", "eval_interval", "data_cache_path", "num_workers"}
    for section in (CheckpointConfig, FaultToleranceConfig, LoggingConfig, ProfilingConfig):
        names |= {field.name for field in dataclasses.fields(section)}
    return names - _EFFECTIVE_FIELDS


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in the seed only, or to which the user gave the same label."""

    label: str
    runs: tuple[ReportRun, ...]

    def __len__(self) -> int:
        return len(self.runs)


def group_runs(runs: Iterable[ReportRun]) -> list[RunGroup]:
    """Divide runs into groups, in the order of their first runs, with different labels.

    Runs with a label (of the user, or of the axes of a study) are grouped by it, others by their
    configuration without the seed; a run without either is a group of its own.
    """
    members: dict[str, list[ReportRun]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        flat = result_settings(run.config, run.first_config)
        if run.source.label:
            key = f"label {run.source.label}"
        elif flat:
            key = json.dumps(flat, sort_keys=True, default=str)
            settings[key] = flat
        else:
            key = f"path {run.source.path}"
        members.setdefault(key, []).append(run)
    labels = _labels(members, settings)
    return [RunGroup(labels[key], tuple(members[key])) for key in members]


def result_settings(config: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Return the settings on which results depend, as `section.field` (deeper: with more dots).

    Args:
        config: configuration of the run's last start.
        first: configuration of its first start, which the weights that it began with depend on:
            the --load of a resume is the run's own checkpoint.
    """
    ignored = _fields_without_effect() | {"version"}
    flat = {
        setting: value
        for setting, value in flatten_settings(config).items()
        if setting.rpartition(".")[2] not in ignored
    }
    return flat | _origin(flatten_settings(first))


def _origin(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the weights that a run begins with, from those of its first start."""
    names = _ORIGIN if flat.get("train.finetune") else _ORIGIN[:1]
    return {name: flat[name] for name in names if name in flat}


def gate_name(flat: dict[str, Any]) -> str:
    """Return the gate of a configuration; `dense` for a model without experts."""
    return str(flat.get("moe.gate", "")) if flat.get("moe.num_experts") else "dense"


def _labels(
    members: dict[str, list[ReportRun]], settings: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """Name the groups: by label, else by the settings in which they differ, else by the run."""
    labels = {}
    for key, runs in members.items():
        labels[key] = runs[0].source.label
        if not labels[key] and key in settings:
            labels[key] = _label_of_settings(settings[key], settings.values(), runs)
        labels[key] = labels[key] or runs[0].name
    return _made_unique(labels, members)


def _label_of_settings(
    flat: dict[str, Any], others: Iterable[dict[str, Any]], runs: list[ReportRun]
) -> str:
    """Name a configuration by its gate if gates differ, and by what differs with this gate."""
    others = list(others)
    parts = []
    gate = gate_name(flat)
    if len({gate_name(other) for other in others}) > 1 or len(runs) > 1:
        parts.append(gate)
    with_gate = [other for other in others if gate_name(other) == gate]
    names = sorted(set().union(*with_gate))
    differing = [name for name in names if _differs(name, with_gate)]
    if len(differing) > MOST_LABEL_PARTS:
        return ""
    parts += [f"{name.rpartition('.')[2]} {_short(flat.get(name))}" for name in differing]
    return ", ".join(parts)


def _differs(name: str, settings: list[dict[str, Any]]) -> bool:
    """Whether configurations have several values of a setting."""
    return len({json.dumps(flat.get(name), default=str) for flat in settings}) > 1


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_short, value)) or "none"
    return "none" if value in (None, "") else str(value)


def _made_unique(labels: dict[str, str], members: dict[str, list[ReportRun]]) -> dict[str, str]:
    """Add the run's name, then a number, to labels that several groups have."""
    unique: dict[str, str] = {}
    for key, label in labels.items():
        if list(labels.values()).count(label) > 1 and members[key][0].name != label:
            label = f"{label} ({members[key][0].name})"
        number = 2
        candidate = label
        while candidate in unique.values():
            candidate = f"{label} #{number}"
            number += 1
        unique[key] = candidate
    return unique
