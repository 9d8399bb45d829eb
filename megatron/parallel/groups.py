"""Process groups and device of this rank, passed by argument as one record."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.config.fields import require


@dataclass(frozen=True)
class Groups:
    """This rank's place among all ranks, its device, and its process groups.

    Consecutive ranks together hold every expert once: ep_rank = rank % ep_size.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    backend: str = "none"
    reason: str = "one process, no process group"
    """The reason for this backend and device."""
    ep_size: int = 1
    ep_group: dist.ProcessGroup | None = None
    """The ranks that together hold every expert once; None: experts not sharded."""

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def __deepcopy__(self, memo: dict) -> Groups:
        """Return itself: copies of a model communicate in the same process groups."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.ep_group is not None:
            raise TypeError(
                "a model whose experts are sharded holds process groups, which exist in this "
                "process only, and cannot be pickled; allowed: its state_dict()"
            )
        return self.__dict__


def choose_comm_backend() -> tuple[str, torch.device, str]:
    """Choose NCCL if this rank has a CUDA device, and gloo on the CPU otherwise.

    Returns:
        (backend, device, reason).

    Raises:
        ValueError: there are fewer CUDA devices on this machine than local ranks.
    """
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
        "Start fewer ranks per node (NUM_GPUS, --num_gpus), or under srun let each task see "
        "all GPUs of its node (--gpu-bind=none).",
    )
    return "nccl", torch.device("cuda", local_rank), f"torch finds {count} CUDA device(s)"


def all_reduce_sum(t: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sum `t` in place over all ranks; does nothing for one rank."""
    if groups.world_size > 1:
        dist.all_reduce(t)
    return t


def all_reduce_mean(value: float, groups: Groups) -> float:
    """Average a number over all ranks.

    The sum is taken in fp64, so that the order of ranks cannot change printed digits.
    """
    t = torch.tensor(value, dtype=torch.float64, device=groups.device)
    return all_reduce_sum(t, groups).item() / groups.world_size


def all_gather_objects(value: Any, groups: Groups) -> list[Any]:
    """Gather one small object per rank, on all ranks, ordered by rank.

    Objects are pickled, which is safe between the processes of one run.
    """
    if groups.world_size == 1:
        return [value]
    values: list[Any] = [None] * groups.world_size
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(compute: Callable[[], Any], groups: Groups) -> Any:
    """Call `compute` on rank 0 only and return its result on all ranks.

    Raises:
        ValueError, OSError: `compute` raised it on rank 0; then all ranks raise it.
    """
    message: list[Any] = [None]
    if groups.is_rank0:
        try:
            message = [compute()]
        except (ValueError, OSError) as error:
            message = [error]
    if groups.world_size > 1:
        dist.broadcast_object_list(message, device=groups.device)
    (result,) = message
    if isinstance(result, Exception):
        raise result
    return result
