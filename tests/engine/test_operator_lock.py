"""No start waits for a lock of a killed process, or needs a compiler that it does not use."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.file_baton import FileBaton

from megatron.engine import distributed, operator_lock
from megatron.engine.operator_lock import lock_operator_builds
from megatron.exit_codes import classify_error

START = """
from megatron.engine import distributed
from megatron.exit_codes import exit_code, exit_process
exit_process(exit_code(lambda: distributed.init_distributed(1, timeout_minutes=0.5)))
"""
HOLD = """
import sys
from torch.utils.file_baton import FileBaton
from megatron.engine.operator_lock import lock_operator_builds
lock_operator_builds(1)
FileBaton(sys.argv[1]).try_acquire()
print("locked", flush=True)
sys.stdin.read()
"""
BUILD = """
from megatron.engine.operator_lock import lock_operator_builds
lock_operator_builds(10)
from deepspeed.comm.torch import build_shm_op
build_shm_op()
"""


@pytest.fixture
def torch_lock(tmp_path, monkeypatch) -> Path:
    """Torch's lock of an operator, left by a killed process; ours is installed."""
    for name in ("try_acquire", "release"):
        monkeypatch.setattr(FileBaton, name, getattr(FileBaton, name))
    lock_operator_builds(0.005)
    folder = tmp_path / "some_operator"
    folder.mkdir()
    path = folder / "lock"
    path.touch()
    return path


def hold(torch_lock: Path) -> subprocess.Popen:
    """Start a process that holds the lock until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(torch_lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n", process.stderr.read()
    return process


def test_cpu_start_compiles_nothing(tmp_path):
    """Neither an old lock nor a PATH without ninja and compiler matters."""
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / "lock").touch()
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", START], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["deepspeed_shm_comm", "lock"]


def test_lock_ends_with_its_process(torch_lock, capfd):
    """A killed process leaves neither our lock nor torch's."""
    with hold(torch_lock) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    torch_lock.touch()
    baton = FileBaton(str(torch_lock))
    assert baton.try_acquire()
    assert not torch_lock.exists()
    line = "compiling DeepSpeed's operator some_operator (once, about a minute)\n"
    assert capfd.readouterr().err == line
    baton.release()


def test_waiting_for_the_lock_is_limited(torch_lock, capfd):
    """A live process keeps the lock; the waiting one says so, and ends after the time limit."""
    with hold(torch_lock) as process:
        with pytest.raises(
            TimeoutError, match="longer than --timeout-minutes 0.005; find it by"
        ) as caught:
            FileBaton(str(torch_lock)).try_acquire()
        assert classify_error(caught.value) == (caught.value, 3)
        assert capfd.readouterr().err == (
            "waiting for another process that compiles some_operator\n"
        )
        process.stdin.close()
        process.wait(timeout=60)
    (torch_lock.parent / "some_operator.so").touch()
    baton = FileBaton(str(torch_lock))
    assert baton.try_acquire()
    assert capfd.readouterr().err == "", "nothing is compiled"
    baton.release()
    assert FileBaton(str(torch_lock)).try_acquire(), "it is free again"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_missing_file_locks_are_reported(number, torch_lock, capfd, monkeypatch):
    """A network file system may have none; the operator is compiled without one."""

    def refuse(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(operator_lock.fcntl, "flock", refuse)
    baton = FileBaton(str(torch_lock))
    assert baton.try_acquire()
    baton.release()
    warning, compiling = capfd.readouterr().err.splitlines()
    assert warning.startswith(
        f"{torch_lock.parent} has no file locks ({os.strerror(number)}): make sure"
    )
    assert compiling.startswith("compiling DeepSpeed's operator some_operator")


def test_own_ninja_is_found_first(monkeypatch):
    programs = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", f"/usr/bin:{programs}")
    distributed.prepare_deepspeed(torch.device("cpu"))
    assert os.environ["PATH"] == f"{programs}:/usr/bin:{programs}"
    distributed.prepare_deepspeed(torch.device("cpu"))
    assert os.environ["PATH"] == f"{programs}:/usr/bin:{programs}", "added once"
    monkeypatch.delenv("PATH")
    distributed.prepare_deepspeed(torch.device("cpu"))
    assert os.environ["PATH"] == f"{programs}:{os.defpath}"


@pytest.mark.slow
def test_killed_compilation_is_repeated(tmp_path):
    """A real operator: the first process and its compiler are killed, the next one compiles."""
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", BUILD]
    first = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert first.stderr.readline().startswith("compiling DeepSpeed's operator")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert again.returncode == 0 and again.stderr.startswith("compiling "), again.stderr
    third = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert third.returncode == 0 and "compiling" not in third.stderr
