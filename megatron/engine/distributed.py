"""Start and leave torch.distributed through DeepSpeed."""

from __future__ import annotations

import os
import re
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron import log
from megatron.config.fields import require
from megatron.engine.operator_lock import lock_operator_builds
from megatron.engine.startup_patches import skip_shm_operator, skip_triton_probe
from megatron.parallel.groups import Groups, choose_comm_backend
from megatron.parallel.ranks import is_alone_in_job, set_rank, set_rendezvous


def init_distributed(ep_size: int = 1, timeout_minutes: float = 10.0) -> Groups:
    """Start torch.distributed through DeepSpeed and create the expert-parallel groups.

    Which rank this process is, and where the ranks meet: see `megatron.parallel.ranks`.

    Args:
        ep_size: number of ranks that together hold every expert once.
        timeout_minutes: time limit of every collective.

    Raises:
        ValueError: `ep_size` does not divide the number of ranks, there are more ranks
            than CUDA devices, or the environment does not tell where rank 0 is.
        ConnectionError: the ranks did not find each other.
    """
    set_rank()
    if is_alone_in_job():
        log.get_logger().warning(
            "SLURM_NTASKS is %s, but this process is not a task of srun: the run has one "
            "process. Start it by srun or a launcher for more",
            os.environ["SLURM_NTASKS"],
        )
    world_size = int(os.environ["WORLD_SIZE"])
    require(
        world_size % ep_size == 0,
        "--moe-expert-parallel-size",
        ep_size,
        f"a divisor of the {world_size} ranks",
        "Start another number of ranks or change it.",
    )
    set_rendezvous()
    backend, device, reason = choose_comm_backend()
    _import_deepspeed(device, timeout_minutes)
    import deepspeed

    timeout = timedelta(minutes=timeout_minutes)
    try:
        deepspeed.init_distributed(
            backend, auto_mpi_discovery=False, timeout=timeout, verbose=False
        )
        ep_group, expert_dp_group = _expert_parallel_groups(ep_size)
        # DeepSpeed creates its groups with torch's default timeout of half an hour, and does not
        # change that of the default group when torch.distributed has already been started.
        for group in (dist.group.WORLD, ep_group, expert_dp_group):
            dist.distributed_c10d._set_pg_timeout(timeout, group)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "connectFullMesh" not in str(error):
            raise
        raise ConnectionError(_rendezvous_error(error, timeout_minutes)) from None
    return Groups(
        rank=dist.get_rank(),
        world_size=world_size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        device=device,
        backend=backend,
        reason=reason,
        ep_size=ep_size,
        ep_group=ep_group if ep_size > 1 else None,
    )


def _import_deepspeed(device: torch.device, timeout_minutes: float) -> None:
    """Import DeepSpeed after the environment variables are set that it reads then."""
    prepare_deepspeed(device)
    lock_operator_builds(timeout_minutes)
    import deepspeed  # noqa: F401

    if device.type == "cpu":
        skip_triton_probe()
        skip_shm_operator()
    else:
        torch.cuda.set_device(device)
    log.quiet_deepspeed()


def _expert_parallel_groups(ep_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's expert-parallel and expert-data-parallel group of DeepSpeed.

    They are created at the first call; DeepSpeed keeps them as module globals.
    """
    from deepspeed.utils import groups as ds_groups

    name = f"ep_size_{ep_size}"
    if name not in ds_groups._get_expert_parallel_group_dict():
        ds_groups._create_expert_and_data_parallel(ep_size)
    return (
        ds_groups._get_expert_parallel_group(name),
        ds_groups._get_expert_data_parallel_group(name),
    )


def _rendezvous_error(error: RuntimeError, timeout_minutes: float) -> str:
    """Condense torch's error of ranks that did not find each other to one line."""
    joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
    if joined:
        reason = f"{joined[1]} of {joined[2]} are there"
    else:
        reason = str(error).splitlines()[0][:200]
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or "not set"
    return (
        f"the ranks did not find each other at {address} within --timeout-minutes "
        f"{timeout_minutes:g}: {reason}. Start all of them; check MASTER_ADDR, "
        "MASTER_PORT, the firewall, and on CPU nodes GLOO_SOCKET_IFNAME, which is "
        f"{interface}"
    )


def prepare_deepspeed(device: torch.device) -> None:
    """Set the environment variables that DeepSpeed reads.

    A --deepspeed-config can select operators that DeepSpeed compiles at first use, with the
    first `ninja` of PATH, into a cache keyed by name only. The environment's own ninja comes
    first, because another version would compile everything again, and because PATH has none
    if the environment is not activated. The cache goes into the virtual environment, because
    another environment's torch would load a binary that does not fit it.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != programs:
        os.environ["PATH"] = programs + os.pathsep + path
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault(
            "TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions")
        )


def destroy() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
