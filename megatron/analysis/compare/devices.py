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
        """Numbers of the GPUs; empty: the CPU."""
        if self.name == "cpu":
            return []
        return self.name.removeprefix("cuda:").split("+")

    def environment(self, threads: int) -> dict[str, str]:
        """Return the environment variables of a cell's processes.

        Args:
            threads: of each process on a CPU; OMP_NUM_THREADS takes precedence.
        """
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
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
        ValueError: a device is none, or a GPU is named twice or has no rank.
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
        devices.append(device)
    _refuse_shared_gpus(devices)
    return devices


def _refuse_shared_gpus(devices: Sequence[Device]) -> None:
    gpus = [gpu for device in devices for gpu in device.gpus]
    for gpu in gpus:
        require(gpus.count(gpu) == 1, "--devices", f"cuda:{gpu}", "each GPU once")


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
