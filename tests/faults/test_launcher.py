"""Ctrl-C, a scheduler's SIGTERM and a frozen rank under DeepSpeed's launcher, which has its own way with them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import runs

REPO = Path(__file__).resolve().parents[2]


def launch(
    argv: list[str], port: int, act: Callable[[int, int, list[int]], object]
) -> tuple[int, str, float]:
    """Start two ranks in a session of their own; after the second step, `act` on the launcher's first process, the one
    that started the ranks, and the ranks.

    Returns:
        exit code, output, seconds from then on. All processes that write to the output have ended.
    """
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(port),
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
    said, ranks, start = [], [], 0.0
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"process (\d+) spawned", line):
                ranks.append(int(found[1]))
            if not start and re.search(r"iteration +2/", line):
                parent = int(
                    Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1]
                )
                start = time.monotonic()
                act(process.pid, parent, ranks)
        return process.wait(), "".join(said), time.monotonic() - start
    finally:
        with_session = subprocess.run(
            ["ps", "-o", "pid=", "-s", str(process.pid)], capture_output=True, text=True
        )
        for pid in with_session.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


def check_saved(text: str, out: Path, why: str) -> None:
    found = re.search(rf"this run ends at iteration (\d+) of 100000: {why}", text)
    assert found, text
    ends = int(found[1])
    assert (out / f"checkpoints/iter_{ends:07d}").exists() and runs.metrics(out)[-1][
        "iteration"
    ] == ends
    assert "error:" not in text
    assert "megatron" not in text.partition("this run ends")[2], "a traceback of ours"


def test_ctrl_c(data, tmp_path):
    """All processes get SIGINT, and the ranks SIGTERM from the launcher besides, one after the other."""
    _, text, _ = launch(
        runs.flags(data, tmp_path, 100000, *runs.EP2),
        29701,
        lambda first, parent, ranks: os.killpg(first, signal.SIGINT),
    )
    check_saved(text, tmp_path, "SIG(INT|TERM)")
    assert (
        text.count(
            ": the step ends, a checkpoint is saved if there is --save, then the run exits 0"
        )
        == 1
    )


def to_all(first: int, parent: int, ranks: list[int]) -> None:
    workers = [Path(f"/proc/{rank}/task/{rank}/children").read_text().split() for rank in ranks]
    for pid in (first, parent, *ranks, *(int(pid) for pids in workers for pid in pids)):
        os.kill(pid, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(
    "act, code",
    [
        (lambda first, parent, ranks: os.kill(parent, signal.SIGTERM), 1),
        (lambda first, parent, ranks: os.kill(ranks[1], signal.SIGTERM), 0),
        (to_all, -15),
    ],
    ids=["the one that started the ranks", "one rank", "all processes"],
)
def test_a_schedulers_sigterm(act, code, data, tmp_path):
    """The launcher's exit code is its own: 0 only when nothing but ranks got the signal."""
    got, text, _ = launch(runs.flags(data, tmp_path, 100000, *runs.EP2), 29702, act)
    assert got == code
    check_saved(text, tmp_path, "SIGTERM")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code, said",
    [
        (
            signal.SIGKILL,
            247,
            "error: rank 1 ended, and its message says why, or it was killed (out of memory?)",
        ),
        (signal.SIGSTOP, 3, "took longer than --timeout-minutes 0.1: another rank hangs"),
    ],
)
def test_a_rank_that_is_killed_or_frozen_ends_the_launcher(number, code, said, data, tmp_path):
    """It gives a frozen rank 30 s to end by itself."""
    argv = runs.flags(data, tmp_path, 100000, *runs.EP2, "--timeout-minutes", "0.1")
    got, text, seconds = launch(
        argv, 29703, lambda first, parent, ranks: os.kill(ranks[1], number)
    )
    assert got == code and seconds < 60
    assert text.count("error:") == 1 and said in text
