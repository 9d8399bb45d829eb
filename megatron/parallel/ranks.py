"""This process's rank: from a launcher, or from srun or mpirun when there is no launcher.

torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT, which the rest of the program reads. Where they are missing, they are set here
from the variables of Slurm, Open MPI, or another MPI whose process manager is Hydra (MPICH,
Intel MPI). Without any of these the run has one process.

This module is imported before torch.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import MutableMapping
from dataclasses import dataclass

from megatron.config.fields import require

Environment = MutableMapping[str, str]
_ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
_DEFAULT_PORT = 29500


@dataclass(frozen=True)
class _Starter:
    """A program that starts ranks, and the variables in which they find their place."""

    name: str
    rank: str
    sizes: tuple[str, ...]
    """Number of ranks; the first that is set counts, as for all variables here."""
    local_ranks: tuple[str, ...]
    local_sizes: tuple[str, ...] = ()
    """Number of ranks on this machine."""
    only_with: str = ""
    """Without this variable the others do not mean that the process is one of several."""


# mpirun may itself start its daemons by srun, so its variables come first, unless they are
# srun's own (`_is_pmi_of_srun`). In the shell of salloc or of a batch script, SLURM_NTASKS is the
# size of the job and SLURM_PROCID is 0, but there is no SLURM_STEP_ID; salloc's interactive step
# has one, and a size of 1.
_STARTERS = (
    _Starter(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Starter(
        "mpirun",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"),
        ("MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ),
    _Starter(
        "mpirun",
        "MV2_COMM_WORLD_RANK",
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Starter(
        "srun",
        "SLURM_PROCID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        ("SLURM_LOCALID",),
        only_with="SLURM_STEP_ID",
    ),
)


# Variables of other process managers (PRRTE, Cray's PALS), which do not tell the number of ranks.
_RANKS_WITHOUT_SIZE = ("PMIX_RANK", "PALS_RANKID")


def set_rank(environ: Environment = os.environ) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK unless a launcher has.

    Raises:
        ValueError: one is missing where others are set, or is no number in its range.
    """
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        starter = _find_starter(environ)
        if starter is None:
            _refuse_unknown_size(environ)
            for name, value in _ONE_PROCESS.items():
                environ.setdefault(name, value)
            return
        if "LOCAL_RANK" not in environ:
            environ["LOCAL_RANK"] = _local_rank(starter, environ)
        environ["WORLD_SIZE"] = _first_set(starter.sizes, environ)
        environ["RANK"] = environ[starter.rank]
    world_size = _number(environ, "WORLD_SIZE", 1, None, "the number of ranks")
    _number(environ, "RANK", 0, world_size, f"0 to {world_size - 1}, below WORLD_SIZE")
    _number(environ, "LOCAL_RANK", 0, None, "the number of this rank on its node")


def set_rendezvous(environ: Environment = os.environ) -> None:
    """Set MASTER_ADDR and MASTER_PORT, where the ranks meet, unless a launcher has.

    Raises:
        ValueError: nothing tells where rank 0 is.
    """
    world_size = int(environ["WORLD_SIZE"])
    starter = _find_starter(environ)
    if "MASTER_ADDR" not in environ:
        address = "127.0.0.1"
        if world_size > 1:
            address = _rank0_address(starter, environ)
        environ["MASTER_ADDR"] = address
    if "MASTER_PORT" not in environ:
        port = 0  # any free port, which is enough for one process
        if world_size > 1:
            port = _shared_port(starter, environ)
        environ["MASTER_PORT"] = str(port)


def is_alone_in_job(environ: Environment = os.environ) -> bool:
    """Whether this one process has a Slurm job of several tasks, for which srun would start
    several."""
    tasks = environ.get("SLURM_NTASKS", "")
    return environ.get("WORLD_SIZE") == "1" and tasks.isdigit() and int(tasks) > 1


def _find_starter(environ: Environment) -> _Starter | None:
    """Return what started this process together with others; None: it is the only one."""
    for starter in _STARTERS:
        if starter.only_with and starter.only_with not in environ:
            continue
        if starter.rank == "PMI_RANK" and _is_pmi_of_srun(environ):
            continue
        size = _first_set(starter.sizes, environ)
        if starter.rank in environ and size is not None:
            return starter if size != "1" else None
    return None


def _refuse_unknown_size(environ: Environment) -> None:
    """Raise ValueError if a process manager has started this process and maybe others.

    Each of them would train on its own.
    """
    managers = [starter for starter in _STARTERS if not starter.only_with]
    sizes = [size for starter in managers for size in starter.sizes]
    if _first_set(tuple(sizes), environ) is not None:
        return
    for name in (*(starter.rank for starter in managers), *_RANKS_WITHOUT_SIZE):
        require(
            name not in environ,
            name,
            environ.get(name),
            "only where the number of ranks is known, too",
            "Set RANK, WORLD_SIZE and LOCAL_RANK from your launcher's variables, or start the "
            "ranks by torchrun.",
        )


def _is_pmi_of_srun(environ: Environment) -> bool:
    """Whether the variables of PMI are those that srun itself sets (`srun --mpi=pmi2`).

    Where srun has started the daemons of an mpirun instead, its tasks are the nodes.
    """
    tasks = _first_set(("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), environ)
    is_same_place = (environ.get("SLURM_PROCID"), tasks) == (
        environ.get("PMI_RANK"),
        environ.get("PMI_SIZE"),
    )
    return "SLURM_STEP_ID" in environ and is_same_place


def _first_set(names: tuple[str, ...], environ: Environment) -> str | None:
    return next((environ[name] for name in names if name in environ), None)


def _local_rank(starter: _Starter, environ: Environment) -> str:
    local_rank = _first_set(starter.local_ranks, environ)
    if local_rank is None:
        raise ValueError(
            f"{starter.rank} is {environ[starter.rank]}, but none of "
            f"{' '.join(starter.local_ranks)} is set; set LOCAL_RANK to the number of this rank "
            "on its node, counted from 0, or start the ranks by torchrun or deepspeed"
        )
    return local_rank


def _number(environ: Environment, name: str, least: int, end: int | None, allowed: str) -> int:
    """Return a variable as a number in [least, end).

    Raises:
        ValueError: it is not set, or is no such number.
    """
    value = environ.get(name)
    is_number = value is not None and value.isdecimal()
    in_range = is_number and int(value) >= least and (end is None or int(value) < end)
    require(
        in_range,
        name,
        value,
        allowed,
        "A launcher sets RANK, WORLD_SIZE and LOCAL_RANK together; without one, unset them.",
    )
    return int(value)


def _rank0_address(starter: _Starter | None, environ: Environment) -> str:
    """Return the address of rank 0's machine as this rank knows it."""
    if starter is not None and starter.name == "srun":
        return _first_host_of_step(environ)
    world_size = environ["WORLD_SIZE"]
    if _are_all_on_this_machine(starter, environ):
        return "127.0.0.1"
    raise ValueError(
        f"MASTER_ADDR is not set, and WORLD_SIZE is {world_size}; set it to the address of "
        "rank 0's node on all ranks, such as `mpirun -x MASTER_ADDR=...`"
    )


def _are_all_on_this_machine(starter: _Starter | None, environ: Environment) -> bool:
    """Whether mpirun says so, to every rank alike."""
    if starter is None or starter.name != "mpirun":
        return False
    return _first_set(starter.local_sizes, environ) == environ["WORLD_SIZE"]


def _first_host_of_step(environ: Environment) -> str:
    """Return the host of the first task of a Slurm step, which is rank 0."""
    nodes = _first_set(("SLURM_STEP_NUM_NODES", "SLURM_NNODES"), environ)
    if nodes == "1":
        return "127.0.0.1"
    hosts = _first_set(("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), environ)
    if hosts is None:
        raise ValueError(
            "MASTER_ADDR is not set, and neither is SLURM_JOB_NODELIST; set MASTER_ADDR to the "
            "address of the first node"
        )
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    else:
        if listed.returncode == 0 and listed.stdout.split():
            return listed.stdout.split()[0]
        reason = " ".join(listed.stderr.split()) or "it printed nothing"
    raise ValueError(
        f"MASTER_ADDR is not set, and `scontrol show hostnames {hosts}` gives no host: "
        f"{reason}; set MASTER_ADDR to the address of the first node"
    )


def _shared_port(starter: _Starter | None, environ: Environment) -> int:
    """Return a port on which all ranks agree, a different one for each step or job of Slurm.

    Only srun gives the same step to all ranks. mpirun's daemons on other machines have a step of
    their own when srun has started them, and no variables of the job when ssh has.
    """
    job = environ.get("SLURM_JOB_ID", "")
    step = "0"
    if starter is not None and starter.name == "srun":
        step = environ.get("SLURM_STEP_ID", "")
    elif not _are_all_on_this_machine(starter, environ):
        return _DEFAULT_PORT
    if not (job.isdecimal() and step.isdecimal()):
        return _DEFAULT_PORT
    # Below the range from which Linux gives ports to clients.
    return 15000 + (int(job) * 31 + int(step)) % 15000
