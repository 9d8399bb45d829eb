"""Work in a forked process: its errors, and its end with its parent."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.waiting import wait_until
from megatron.data.sampling.blend import parse_blend
from megatron.exit_codes import classify_error
from megatron.parallel import forked
from megatron.parallel.forked import ForkedWork


def outcome(function) -> Exception | None:
    work = ForkedWork("counts", function, classify_error)
    result = work.wait()
    with pytest.raises(ChildProcessError):  # it has been waited for
        os.waitpid(work.pid, os.WNOHANG)
    return result


def process_is_gone(pid: int) -> bool:
    try:
        state = re.search(r"\) (\S)", Path(f"/proc/{pid}/stat").read_text())[1]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_work_is_done_in_another_process(tmp_path):
    path = tmp_path / "pid"
    work = ForkedWork("counts", lambda: path.write_text(str(os.getpid())), classify_error)
    assert work.wait() is None
    assert int(path.read_text()) == work.pid != os.getpid()
    assert process_is_gone(work.pid)


@pytest.fixture
def stick_children(monkeypatch):
    """Return a function that lets the next `n` children of os.fork never return from it.

    Each is waited for `seconds`. The function returns the list to which all pids are added.
    """

    def stick(n: int, seconds: float) -> list[int]:
        fork, pids = os.fork, []

        def fork_with_stuck_children():
            pid = fork()
            if pid == 0 and len(pids) < n:
                while True:
                    signal.pause()
            pids.append(pid)
            return pid

        monkeypatch.setattr(os, "fork", fork_with_stuck_children)
        monkeypatch.setattr(forked, "_SECONDS_TO_START", seconds)
        return pids

    return stick


def test_child_that_never_runs_is_replaced(stick_children, tmp_path):
    """A child inherits the interpreter's locks as they were, and may wait for one forever."""
    pids = stick_children(2, seconds=1.0)
    open_before = len(os.listdir("/proc/self/fd"))
    path = tmp_path / "pid"
    # A child that is slow to run on a busy machine is replaced, too.
    work = ForkedWork("counts", lambda: path.write_text(str(os.getpid())), classify_error)
    assert work.wait() is None
    assert len(pids) >= 3 and int(path.read_text()) == work.pid == pids[-1]
    assert all(process_is_gone(pid) for pid in pids)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_no_child_that_runs_is_an_error(stick_children):
    pids = stick_children(99, seconds=0.05)
    with pytest.raises(OSError, match="no process that counts could be started: 5 forked"):
        ForkedWork("counts", print, classify_error)
    assert len(pids) == 5 and all(process_is_gone(pid) for pid in pids)


def test_errors_reach_the_parent():
    def refuse():
        parse_blend(["0.5", "a", "b"])

    def missing():
        Path("/nowhere/file").read_bytes()

    error = outcome(refuse)
    assert type(error) is ValueError and str(error).startswith("--data-path is '0.5 a b'; ")
    error = outcome(missing)
    assert isinstance(error, FileNotFoundError) and error.filename == "/nowhere/file"


@pytest.mark.parametrize(
    "bug, message",
    [
        (lambda: {}["x"], "KeyError: 'x'"),
        (lambda: np.zeros(3) + np.zeros(4), "ValueError: operands could not be broadcast"),
        (lambda: torch.zeros(3).view(4), "RuntimeError: shape '[4]' is invalid"),
    ],
)
def test_bug_prints_its_traceback(bug, message, capfd):
    """A ValueError of a package is a mistake in the program, as in a run of one rank."""
    error = outcome(bug)
    assert isinstance(error, RuntimeError)
    assert re.fullmatch(r"process \d+, which counts, failed; see above", str(error))
    printed = capfd.readouterr().err
    assert message in printed and "in <lambda>" in printed


def test_killed_child_is_explained():
    error = outcome(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert isinstance(error, OSError)
    assert re.match(r"process \d+, which counts, was ended by signal Killed. If", str(error))


def test_child_ignores_ctrl_c_but_not_sigterm():
    assert outcome(lambda: os.kill(os.getpid(), signal.SIGINT)) is None
    error = outcome(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert "ended by signal Terminated" in str(error)


def test_child_ends_with_its_parent(tmp_path):
    """The parent is killed while the child waits."""
    path = tmp_path / "pid"
    parent = os.fork()
    if parent == 0:
        work = ForkedWork("counts", threading.Event().wait, classify_error)
        path.write_text(f"{work.pid}\n")
        threading.Event().wait()
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"), "the child's id")
    child = int(path.read_text())
    assert not process_is_gone(child)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: process_is_gone(child), "the child's end")


def test_descriptors_are_closed():
    before = sorted(os.listdir("/proc/self/fd"))
    for work in (lambda: None, lambda: os._exit(3)):
        outcome(work)
    assert sorted(os.listdir("/proc/self/fd")) == before
