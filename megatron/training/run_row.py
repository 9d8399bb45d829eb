"""The row of metrics that describes a run: the first one of each start and each resume."""

from __future__ import annotations

import json
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import megatron
from megatron.config.run_json import run_json_text
from megatron.config.schema import RunConfig
from megatron.data.ingest.encoder_pool import usable_cores
from megatron.model.parameter_count import ParameterCount
from megatron.parallel.groups import Groups


def describe_run(
    config: RunConfig,
    groups: Groups,
    size: ParameterCount,
    iteration: int,
    started: float | None = None,
) -> dict[str, Any]:
    """Return the row of kind `run`: what was started, on which machine, and the model's size.

    `config` is the content of a run.json. Rows that follow are the run's, up to the next row of
    this kind, and repeat what was logged after `iteration` before.

    Args:
        config: the resolved configuration.
        groups: the data-parallel ranks.
        size: parameters of the complete model.
        iteration: optimizer steps that are done at this start.
        started: when the process started, as `time.time`; None: now.
    """
    if started is None:
        started = time.time()
    return {
        "kind": "run",
        "iteration": iteration,
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "version": megatron.__version__,
        "world_size": groups.world_size,
        "device": device_name(groups.device),
        "cpu": cpu_name(),
        "cpu_cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "total_parameters": size.total,
        "active_parameters_min": size.active_min,
        "active_parameters_max": size.active_max,
        "parameters": dict(size.parts),
        "config": json.loads(run_json_text(config)),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the type of another device, such as `cpu`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def cpu_name(cpuinfo: str | Path = "/proc/cpuinfo") -> str:
    """Return the model of the processor, or its architecture where the system names no model.

    Args:
        cpuinfo: the file in which Linux describes its processors.
    """
    try:
        lines = Path(cpuinfo).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return platform.machine()
