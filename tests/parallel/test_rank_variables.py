"""Ranks from a launcher, from srun and from mpirun; refusals where they cannot be derived."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.spawn import free_port
from megatron.parallel import ranks

REPO = Path(__file__).resolve().parents[2]
PREFIXES = ("SLURM_", "OMPI_", "PMI_", "MPI_", "MV2_", "MASTER_")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "7",
}
# Starts the process group, sums the ranks, and says what the rank found.
PROGRAM = """
import os, torch
from megatron.engine import distributed
from megatron.exit_codes import exit_code, exit_process
from megatron.parallel.groups import all_reduce_sum
def run():
    groups = distributed.init_distributed(1, timeout_minutes=1)
    total = int(all_reduce_sum(torch.tensor(groups.rank + 1), groups))
    line = f"rank {groups.rank} {groups.local_rank} {groups.world_size} {total}\\n"
    os.write(1, line.encode())  # in one piece: both ranks write to one pipe
exit_process(exit_code(run))
"""


def without_ranks() -> dict[str, str]:
    """This process's environment without variables of any launcher."""
    kept = dict(os.environ)
    for name in os.environ:
        if name.startswith(PREFIXES) or name in NAMES:
            del kept[name]
    return kept


def start(**env: str) -> subprocess.Popen:
    """Start `PROGRAM` as srun or mpirun would."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**without_ranks(), **env},
        cwd=REPO,
    )


def output(process: subprocess.Popen) -> str:
    """Wait for a program that succeeds; return its last line."""
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stdout.splitlines()[-1]


MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}
PMI2 = {**SRUN, "PMI_RANK": "1", "PMI_SIZE": "2"}


@pytest.mark.parametrize(
    "env, found, meeting_point",
    [
        ({}, ("0", "1", "0"), ("127.0.0.1", "0")),
        ({"LOCAL_RANK": "2"}, ("0", "1", "2"), ("127.0.0.1", "0")),
        (SRUN, ("1", "2", "1"), ("127.0.0.1", "17388")),
        (MPIRUN, ("3", "4", "1"), None),
        (HYDRA, ("2", "3", "2"), ("127.0.0.1", "29500")),
        (MVAPICH, ("1", "2", "1"), ("127.0.0.1", "29500")),
        ({**SRUN, "PMIX_RANK": "1"}, ("1", "2", "1"), ("127.0.0.1", "17388")),
        (PMI2, ("1", "2", "1"), ("127.0.0.1", "17388")),
        (
            {**PMI2, "SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "a"},
            ("1", "2", "1"),
            ("a", "17388"),
        ),
        ({**SRUN, **HYDRA, "SLURM_PROCID": "0"}, ("2", "3", "2"), ("127.0.0.1", "17387")),
        ({**SRUN, **MPIRUN}, ("3", "4", "1"), None),
        ({**PMI2, **MPIRUN}, ("3", "4", "1"), None),
        ({**SRUN, **MPIRUN, **TORCHRUN}, ("5", "6", "1"), ("a", "7")),
        (
            {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            ("0", "1", "0"),
            ("127.0.0.1", "0"),
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            ("0", "1", "0"),
            ("127.0.0.1", "0"),
        ),
        (
            {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
            ("0", "1", "0"),
            ("127.0.0.1", "0"),
        ),
    ],
    ids=[
        "nothing",
        "LOCAL_RANK alone",
        "srun",
        "Open MPI",
        "Hydra",
        "MVAPICH",
        "srun with PMIx",
        "srun with PMI-2",
        "srun with PMI-2 on two nodes",
        "Hydra in a step of its daemons",
        "Open MPI in a step of its daemons",
        "Open MPI in a step with PMI-2",
        "torchrun in a step",
        "step of one task",
        "batch script of a job of several tasks",
        "mpirun of one rank",
    ],
)
def test_ranks_come_from_what_started_them(env, found, meeting_point):
    """Where they meet, too; None: no variable tells it."""
    environ = dict(env)
    ranks.set_rank(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == found
    again = dict(environ)
    ranks.set_rank(again)
    assert again == environ
    if meeting_point is None:
        with pytest.raises(ValueError, match="MASTER_ADDR is not set, and WORLD_SIZE is 4"):
            ranks.set_rendezvous(environ)
        return
    ranks.set_rendezvous(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == meeting_point


@pytest.mark.parametrize(
    "name",
    ["PMIX_RANK", "PALS_RANKID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"],
)
def test_rank_without_a_size_is_refused(name):
    """Each rank would train on its own."""
    with pytest.raises(ValueError, match=f"^{name} is '0'; allowed: only where the number of"):
        ranks.set_rank({name: "0"})


@pytest.mark.parametrize(
    "env, message",
    [
        ({"WORLD_SIZE": "2"}, "RANK is None; allowed: 0 to 1, below WORLD_SIZE"),
        ({"RANK": "0"}, "WORLD_SIZE is None; allowed: the number of ranks"),
        ({**TORCHRUN, "RANK": "6"}, "RANK is '6'; allowed: 0 to 5"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1'; allowed: 0 to 5"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; allowed"),
        ({**TORCHRUN, "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'; allowed"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "none of MPI_LOCALRANKID .*; set LOCAL_RANK"),
    ],
)
def test_incomplete_ranks_are_refused(env, message):
    with pytest.raises(ValueError, match=message):
        ranks.set_rank(dict(env))


def rendezvous(env: dict[str, str]) -> tuple[str, int]:
    environ = dict(env)
    ranks.set_rank(environ)
    ranks.set_rendezvous(environ)
    return environ["MASTER_ADDR"], int(environ["MASTER_PORT"])


def test_meeting_point_is_derived_or_set():
    assert rendezvous({}) == ("127.0.0.1", 0)
    assert rendezvous(TORCHRUN) == ("a", 7)
    assert rendezvous({**MPIRUN, "MASTER_ADDR": "a"}) == ("a", 29500)
    assert rendezvous(HYDRA) == ("127.0.0.1", 29500)
    address, port = rendezvous(SRUN)
    assert address == "127.0.0.1" and 15000 <= port < 30000
    other_step = rendezvous({**SRUN, "SLURM_STEP_ID": "2"})[1]
    other_job = rendezvous({**SRUN, "SLURM_JOB_ID": "78"})[1]
    assert len({port, other_step, other_job}) == 3
    assert rendezvous({**SRUN, "SLURM_JOB_ID": ""})[1] == 29500


@pytest.mark.parametrize(
    "env",
    [{**MPIRUN, "MASTER_ADDR": "a"}, {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, HYDRA],
    ids=["Open MPI on two machines", "Open MPI on one", "Hydra on one"],
)
def test_ranks_of_mpirun_share_one_port(env):
    """Daemons that srun started have the number of a step; the local ranks do not.

    On several machines those that ssh started have no number of the job either.
    """
    local = rendezvous({**env, "SLURM_JOB_ID": "77"})[1]
    daemon = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3", "SLURM_PROCID": "0"}
    assert rendezvous({**env, **daemon, "SLURM_STEP_NUM_TASKS": "1"})[1] == local
    if "MASTER_ADDR" in env:
        assert rendezvous(env)[1] == local == 29500
        return
    assert 15000 <= local < 30000
    assert rendezvous({**env, "SLURM_JOB_ID": "78"})[1] != local, "a node of two jobs"


@pytest.mark.parametrize(
    "scontrol, address",
    [
        ("echo node-3; echo node-4", "node-3"),
        (
            "echo bad list >&2; exit 1",
            "`scontrol show hostnames node-[3-4]` gives no host: bad",
        ),
        ("exit 0", "gives no host: it printed nothing; set MASTER_ADDR"),
        (None, "gives no host: .*scontrol"),
    ],
)
def test_first_host_comes_from_scontrol(scontrol, address, tmp_path, monkeypatch):
    """A stand-in for Slurm's program checks its arguments."""
    if scontrol is not None:
        program = tmp_path / "scontrol"
        check = "[ \"$*\" = 'show hostnames node-[3-4]' ] || exit 9"
        program.write_text(f"#!/bin/bash\n{check}\n{scontrol}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    env = {**SRUN, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node-[3-4]"}
    if address == "node-3":
        assert rendezvous(env)[0] == address
        return
    with pytest.raises(ValueError, match=address.replace("[", r"\[")):
        rendezvous(env)


@pytest.mark.parametrize(
    "env, message",
    [
        (
            MPIRUN,
            "MASTER_ADDR is not set, and WORLD_SIZE is 4; set it to the address of rank 0",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "2"}, "and neither is SLURM_JOB_NODELIST"),
    ],
)
def test_unknown_meeting_point_is_refused(env, message):
    with pytest.raises(ValueError, match=message):
        rendezvous(env)


def test_tasks_of_srun_are_one_run():
    """Two real processes with Slurm's variables find each other."""
    port = str(free_port())
    env = {**SRUN, "MASTER_PORT": port}
    tasks = [start(**{**env, "SLURM_PROCID": i, "SLURM_LOCALID": i}) for i in "01"]
    assert [output(task) for task in tasks] == ["rank 0 0 2 3", "rank 1 1 2 3"]


def test_ranks_of_mpirun_are_one_run():
    env = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    env["MASTER_PORT"] = str(free_port())
    started = []
    for i in "01":
        rank = {"OMPI_COMM_WORLD_RANK": i, "OMPI_COMM_WORLD_LOCAL_RANK": i}
        started.append(start(**env, **rank))
    assert [output(process) for process in started] == ["rank 0 0 2 3", "rank 1 1 2 3"]


def test_batch_shell_waits_for_no_other_task():
    """A program started directly in a batch script of a job of two tasks runs alone."""
    process = start(SLURM_JOB_ID="77", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stdout.endswith("rank 0 0 1 1\n")
    assert "SLURM_NTASKS is 2, but this process is not a task of srun" in stdout


def test_refused_rank_is_one_line():
    process = start(RANK="one", WORLD_SIZE="2", LOCAL_RANK="0")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert (
        stderr.startswith("error: RANK is 'one'; allowed: 0 to 1") and stderr.count("\n") == 1
    )


def test_torchrun_starts_a_run(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--master-port", str(free_port()), str(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env=without_ranks(),
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("rank")]
    assert sorted(lines) == ["rank 0 0 2 3", "rank 1 1 2 3"]
