"""Devices of --devices: where cells run at the same time."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.fields import require

_GPUS = re.compile(r"cuda:(\d+(?:\+\d+)*)")


@dataclass(frozen=True)
class Device:
    """Where one cell at a time runs."""

    name: str
    """as in --devices: cpu, cuda:0, or cuda:0+1 for the ranks of one cell on two GPUs"""

    @property
    def gpus(self) -> list[str]:
        """Numbers of the GPUs, counted among those that this process sees; empty: the CPU."""
        if self.name == "cpu":
            return []
        return self.name.removeprefix("cuda:").split("+")

    def environment(self, threads: int) -> dict[str, str]:
        """Return the environment variables of a cell's processes.

        Args:
            threads: of each process on a CPU; OMP_NUM_THREADS takes precedence.
        """
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(map(_visible_name, self.gpus))}
        threads = os.environ.get("OMP_NUM_THREADS", str(threads))
        return {
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": threads,
        }


def parse_devices(text: str, ranks: int) -> list[Device]:
    """Return the devices that --devices names; empty text: the first GPU, or else the CPU.

    Args:
        ranks: processes of each cell, as many as the GPUs of each device.

    Raises:
        ValueError: a device is none, this process does not see it, or a cell has fewer or more
            GPUs than ranks.
    """
    if not text:
        return [_default_device(ranks)]
    devices = []
    for name in text.split(","):
        is_device = name == "cpu" or _GPUS.fullmatch(name) is not None
        allowed = (
            "cpu, cuda:0 or cuda:0+1, with commas between devices that run cells at a time"
        )
        require(is_device, "--devices", name, allowed)
        device = Device(name)
        fits = not device.gpus or len(device.gpus) == ranks
        advice = f"The study has {ranks} rank(s) per cell."
        require(fits, "--devices", name, "as many GPUs as a cell has ranks", advice)
        is_unique = len(set(device.gpus)) == len(device.gpus)
        require(is_unique, "--devices", name, "each GPU once for a cell: it holds one rank")
        for gpu in device.gpus:
            _require_gpu(gpu)
        devices.append(device)
    return devices


def _visible_name(gpu: str) -> str:
    """Return the name of a GPU in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpu
    return [name.strip() for name in visible.split(",") if name.strip()][int(gpu)]


def _require_gpu(gpu: str) -> None:
    """Raise ValueError unless this process sees a GPU."""
    import torch

    number = torch.cuda.device_count()
    allowed = "a GPU that this process sees, counted from 0"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    advice = f"It sees {number}"
    if visible is not None:
        advice += f" with CUDA_VISIBLE_DEVICES={visible}"
    require(int(gpu) < number, "--devices", f"cuda:{gpu}", allowed, f"{advice}.")


def _default_device(ranks: int) -> Device:
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" or torch.cuda.device_count() < ranks:
        return Device("cpu")
    return Device("cuda:" + "+".join(str(number) for number in range(ranks)))


def threads_per_rank(devices: Sequence[Device], ranks: int) -> int:
    """Return the threads of each rank on the CPU, so that cells share the cores evenly."""
    on_cpu = sum(1 for device in devices if not device.gpus)
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // max(1, on_cpu * ranks))
