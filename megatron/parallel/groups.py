"""Process groups and the device, found once and passed by argument as one `Groups` record."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron import log
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
    def is_first(self) -> bool:
        return self.rank == 0


def choose_backend() -> tuple[str, torch.device, str]:
    """(backend, device, why): NCCL on CUDA when there is a device for this rank, gloo on the CPU otherwise."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "gloo", torch.device("cpu"), "DS_ACCELERATOR=cpu is set"
    if not torch.cuda.is_available():
        return "gloo", torch.device("cpu"), "torch finds no CUDA device"
    count = torch.cuda.device_count()
    require(local_rank < count, "LOCAL_RANK", local_rank, f"below the {count} CUDA devices of this machine",
            "Start fewer ranks per node (NUM_GPUS, --num_gpus).")
    return "nccl", torch.device("cuda", local_rank), f"torch finds {count} CUDA device(s)"


def init(ep_size: int = 1, timeout_minutes: float = 10.0) -> Groups:
    """Start torch.distributed through DeepSpeed and make the expert-parallel groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as the launcher sets them; without them this is a
    run of one process.

    Raises:
        ValueError: `ep_size` does not divide the number of ranks, or there are more ranks than CUDA devices.
        ConnectionError: the ranks did not find each other.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "0")):  # 0: a free port, enough for one process
        os.environ.setdefault(name, value)
    world_size = int(os.environ["WORLD_SIZE"])
    require(world_size % ep_size == 0, "--moe-expert-parallel-size", ep_size, f"a divisor of the {world_size} ranks",
            "Start another number of ranks or change it.")
    backend, device, reason = choose_backend()
    prepare_deepspeed(device)
    import deepspeed
    from deepspeed.utils import groups as ds_groups

    if device.type == "cpu":
        settle_triton()

    log.quiet_deepspeed()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    name = f"ep_size_{ep_size}"
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timedelta(minutes=timeout_minutes),
                                   verbose=False)
        if name not in ds_groups._get_expert_parallel_group_dict():
            ds_groups._create_expert_and_data_parallel(ep_size)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "connectFullMesh" not in str(error):
            raise
        raise ConnectionError(_not_joined(error, timeout_minutes)) from None
    for group in (ds_groups._get_expert_parallel_group(name), ds_groups._get_expert_data_parallel_group(name)):
        # DeepSpeed makes them with torch's default of half an hour.
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)
    return Groups(
        rank=dist.get_rank(), world_size=world_size, local_rank=int(os.environ["LOCAL_RANK"]), device=device,
        backend=backend, reason=reason, ep_size=ep_size,
        ep_group=ds_groups._get_expert_parallel_group(name) if ep_size > 1 else None,
    )


def _not_joined(error: RuntimeError, timeout_minutes: float) -> str:
    """One line for the many that torch has when ranks do not find each other."""
    joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
    why = f"{joined[1]} of {joined[2]} are there" if joined else str(error).splitlines()[0][:200]
    network = os.environ.get("GLOO_SOCKET_IFNAME") or "not set"
    return (f"the ranks did not find each other at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within "
            f"--timeout-minutes {timeout_minutes:g}: {why}. Start all of them; check MASTER_ADDR, MASTER_PORT, the "
            f"firewall, and on CPU nodes GLOO_SOCKET_IFNAME, which is {network}")


def prepare_deepspeed(device: torch.device) -> None:
    """Set what DeepSpeed reads from the environment, before its first import.

    Its CPU communication operator is compiled at first use into a cache keyed by name only, so the cache goes into
    the virtual environment: another environment's torch would otherwise load a binary that does not fit it.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def settle_triton() -> None:
    """Have DeepSpeed find that its own Triton kernels are of no use here, as it would, but without importing Triton.

    Its expert-parallel layer asks at import, and the answer without a GPU is always no.
    """
    if "triton" in sys.modules:
        return
    sys.modules["triton"] = None  # an import of it now fails
    try:
        importlib.import_module("deepspeed.ops.triton_ops._triton")
    finally:
        del sys.modules["triton"]


def all_reduce_sum(t: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sum `t` in place over all ranks; a no-op for one rank."""
    if groups.world_size > 1:
        dist.all_reduce(t)
    return t


def all_reduce_mean(value: float, groups: Groups) -> float:
    """Mean of a number over all ranks, in fp64 so that the order of ranks cannot change printed digits."""
    t = torch.tensor(value, dtype=torch.float64, device=groups.device)
    return all_reduce_sum(t, groups).item() / groups.world_size


def gather(value: Any, groups: Groups) -> list[Any]:
    """Every rank's value, on all ranks. It is pickled: for small things, between our own processes."""
    if groups.world_size == 1:
        return [value]
    values: list[Any] = [None] * groups.world_size
    dist.all_gather_object(values, value)
    return values


def from_first(ask: Callable[[], Any], groups: Groups) -> Any:
    """Rank 0's answer, on all ranks. Its ValueError or OSError is raised on all of them."""
    answer: list[Any] = [None]
    if groups.is_first:
        try:
            answer = [ask()]
        except (ValueError, OSError) as error:
            answer = [error]
    if groups.world_size > 1:
        dist.broadcast_object_list(answer, device=groups.device)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
