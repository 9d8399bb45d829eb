"""Process groups and the device, found once and passed by argument as one `Groups` record."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.config.schema import require


@dataclass(frozen=True)
class Groups:
    """Who this process is. Consecutive ranks share one set of experts: ep_rank = rank % ep_size."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    backend: str = "none"
    reason: str = "one process, no process group"
    ep_size: int = 1
    ep_group: dist.ProcessGroup | None = None
    """ranks that together hold every expert once; None when experts are not sharded"""

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0


def choose_comm_backend() -> tuple[str, torch.device, str]:
    """(backend, device, why): NCCL on CUDA when there is a device for this rank, gloo on the CPU otherwise."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "gloo", torch.device("cpu"), "DS_ACCELERATOR=cpu is set"
    if not torch.cuda.is_available():
        return "gloo", torch.device("cpu"), "torch finds no CUDA device"
    count = torch.cuda.device_count()
    require(
        local_rank < count,
        "LOCAL_RANK",
        local_rank,
        f"below the {count} CUDA devices of this machine",
        "Start fewer ranks per node (NUM_GPUS, --num_gpus).",
    )
    return "nccl", torch.device("cuda", local_rank), f"torch finds {count} CUDA device(s)"


def all_reduce_sum(t: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sum `t` in place over all ranks; a no-op for one rank."""
    if groups.world_size > 1:
        dist.all_reduce(t)
    return t


def all_reduce_mean(value: float, groups: Groups) -> float:
    """Mean of a number over all ranks, in fp64 so that the order of ranks cannot change printed digits."""
    t = torch.tensor(value, dtype=torch.float64, device=groups.device)
    return all_reduce_sum(t, groups).item() / groups.world_size


def all_gather_objects(value: Any, groups: Groups) -> list[Any]:
    """Every rank's value, on all ranks. It is pickled: for small things, between our own processes."""
    if groups.world_size == 1:
        return [value]
    values: list[Any] = [None] * groups.world_size
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(ask: Callable[[], Any], groups: Groups) -> Any:
    """Rank 0's answer, on all ranks. Its ValueError or OSError is raised on all of them."""
    answer: list[Any] = [None]
    if groups.is_rank0:
        try:
            answer = [ask()]
        except (ValueError, OSError) as error:
            answer = [error]
    if groups.world_size > 1:
        dist.broadcast_object_list(answer, device=groups.device)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]
