"""Ctrl-C, a scheduler's SIGTERM and a frozen rank under DeepSpeed's launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import runs
from helpers.spawn import free_port

REPO = Path(__file__).resolve().parents[2]


@dataclass
class Launched:
    """Process ids of a launched run."""

    launcher: int
    """The launcher's first process, which leads the session."""
    parent: int
    """The launcher's process that started the ranks."""
    ranks: list[int]


def launch(argv: list[str], act: Callable[[Launched], object]) -> tuple[int, str, float]:
    """Launch two ranks in a session of their own and call `act` after the second step.

    Returns:
        exit code, output, and seconds since `act` was called, once all processes that
        write to the output have ended.
    """
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "pretrain_gpt.py",
        *argv,
        "--num-workers",
        "1",
        "--eval-iters",
        "0",
    ]
    process = subprocess.Popen(
        command,
        cwd=REPO,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    output = []
    ranks = []
    start = 0.0
    try:
        for line in process.stdout:
            output.append(line)
            spawned = re.search(r"process (\d+) spawned", line)
            if spawned:
                ranks.append(int(spawned[1]))
            if not start and re.search(r"iteration +2/", line):
                start = time.monotonic()
                act(Launched(process.pid, parent_of(ranks[0]), ranks))
        return process.wait(), "".join(output), time.monotonic() - start
    finally:
        kill_session(process.pid)


def parent_of(pid: int) -> int:
    """Process id of a process's parent."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def kill_session(leader: int) -> None:
    """Kill all processes of a session that are left."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "-s", str(leader)], capture_output=True, text=True
    )
    for pid in listed.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def check_saved(text: str, out: Path, reason: str) -> None:
    """Check that the run ended for this reason, saved and without an error."""
    found = re.search(rf"this run ends at iteration (\d+) of 100000: {reason}", text)
    assert found, text
    last = int(found[1])
    assert (out / f"checkpoints/iter_{last:07d}").exists()
    assert runs.metrics(out)[-1]["iteration"] == last
    assert "error:" not in text
    assert "megatron" not in text.partition("this run ends")[2], "a traceback of ours"


def test_ctrl_c_saves_and_stops(data, tmp_path):
    """All processes get SIGINT, and the launcher also sends SIGTERM to each rank."""
    _, text, _ = launch(
        runs.flags(data, tmp_path, 100000, *runs.EP2),
        lambda run: os.killpg(run.launcher, signal.SIGINT),
    )
    check_saved(text, tmp_path, "SIG(INT|TERM)")
    announced = "the step ends, a checkpoint is saved if there is --save, then the run exits 0"
    assert text.count(f": {announced}") == 1


def terminate_all(run: Launched) -> None:
    """Send SIGTERM to all processes, as a scheduler does that ends a job."""
    pids = [run.launcher, run.parent, *run.ranks]
    for rank in run.ranks:
        workers = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
        pids += [int(pid) for pid in workers]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(
    "act, code",
    [
        (lambda run: os.kill(run.parent, signal.SIGTERM), 1),
        (lambda run: os.kill(run.ranks[1], signal.SIGTERM), 0),
        (terminate_all, -15),
    ],
    ids=["the launcher's second process", "one rank", "all processes"],
)
def test_sigterm_saves_and_stops(act, code, data, tmp_path):
    """The launcher's exit code is 0 only if no process but ranks got the signal."""
    actual_code, text, _ = launch(runs.flags(data, tmp_path, 100000, *runs.EP2), act)
    assert actual_code == code
    check_saved(text, tmp_path, "SIGTERM")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code, message",
    [
        (
            signal.SIGKILL,
            247,
            "error: rank 1 ended, and its message says why, or it was killed (out of memory?)",
        ),
        (signal.SIGSTOP, 3, "took longer than --timeout-minutes 0.25: another rank hangs"),
    ],
)
def test_lost_rank_ends_the_launcher(number, code, message, data, tmp_path):
    """Killed or frozen; the launcher gives a frozen rank 30 s to end by itself."""
    argv = runs.flags(data, tmp_path, 100000, *runs.EP2, "--timeout-minutes", "0.25")
    actual_code, text, seconds = launch(argv, lambda run: os.kill(run.ranks[1], number))
    assert actual_code == code
    assert seconds < 120, "15 s of timeout, 30 s of the launcher, and a busy machine"
    assert text.count("error:") == 1 and message in text
