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
from megatron.config.schema import require
from megatron.engine.startup_patches import skip_triton_probe
from megatron.parallel.groups import Groups, choose_comm_backend


def init_distributed(ep_size: int = 1, timeout_minutes: float = 10.0) -> Groups:
    """Start torch.distributed through DeepSpeed and make the expert-parallel groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as the launcher sets them; without them this is a
    run of one process.

    Raises:
        ValueError: `ep_size` does not divide the number of ranks, or there are more ranks than CUDA devices.
        ConnectionError: the ranks did not find each other.
    """
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):  # 0: a free port, enough for one process
        os.environ.setdefault(name, value)
    world_size = int(os.environ["WORLD_SIZE"])
    require(
        world_size % ep_size == 0,
        "--moe-expert-parallel-size",
        ep_size,
        f"a divisor of the {world_size} ranks",
        "Start another number of ranks or change it.",
    )
    backend, device, reason = choose_comm_backend()
    prepare_deepspeed(device)
    import deepspeed
    from deepspeed.utils import groups as ds_groups

    if device.type == "cpu":
        skip_triton_probe()

    log.quiet_deepspeed()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    name = f"ep_size_{ep_size}"
    try:
        deepspeed.init_distributed(
            backend,
            auto_mpi_discovery=False,
            timeout=timedelta(minutes=timeout_minutes),
            verbose=False,
        )
        if name not in ds_groups._get_expert_parallel_group_dict():
            ds_groups._create_expert_and_data_parallel(ep_size)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "connectFullMesh" not in str(error):
            raise
        raise ConnectionError(_rendezvous_error(error, timeout_minutes)) from None
    for group in (
        ds_groups._get_expert_parallel_group(name),
        ds_groups._get_expert_data_parallel_group(name),
    ):
        # DeepSpeed makes them with torch's default of half an hour.
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)
    return Groups(
        rank=dist.get_rank(),
        world_size=world_size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        device=device,
        backend=backend,
        reason=reason,
        ep_size=ep_size,
        ep_group=ds_groups._get_expert_parallel_group(name) if ep_size > 1 else None,
    )


def _rendezvous_error(error: RuntimeError, timeout_minutes: float) -> str:
    """One line for the many that torch has when ranks do not find each other."""
    joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
    why = (
        f"{joined[1]} of {joined[2]} are there" if joined else str(error).splitlines()[0][:200]
    )
    network = os.environ.get("GLOO_SOCKET_IFNAME") or "not set"
    return (
        f"the ranks did not find each other at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within "
        f"--timeout-minutes {timeout_minutes:g}: {why}. Start all of them; check MASTER_ADDR, MASTER_PORT, the "
        f"firewall, and on CPU nodes GLOO_SOCKET_IFNAME, which is {network}"
    )


def prepare_deepspeed(device: torch.device) -> None:
    """Set what DeepSpeed reads from the environment, before its first import.

    Its CPU communication operator is compiled at first use into a cache keyed by name only, so the cache goes into
    the virtual environment: another environment's torch would otherwise load a binary that does not fit it.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault(
            "TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions")
        )


def destroy() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
