"""Signals before training begins: one line and the documented exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import runs
from helpers.spawn import free_port

REPO = Path(__file__).resolve().parents[2]
LINE = "error: {} outside of the training loop: this process ends immediately, and there is"
FORK = """
import os, signal, sys
from megatron.startup_signals import end_on_stop_signals
end_on_stop_signals()
child = os.fork()
if child == 0:
    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)
    signal.pause()
sys.stdin.readline()
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""


def started(argv: list[str], **env: str) -> subprocess.Popen:
    """Start a program in this repository with pipes as its streams."""
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=REPO,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_during_imports_is_one_line(number, tmp_path):
    """The import of torch is replaced by one that never ends."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(600)\n"
    )
    process = started(["pretrain_gpt.py"], PYTHONPATH=f"{tmp_path}:{REPO}")
    assert process.stdout.readline() == "importing\n", process.stderr.read()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr.startswith(LINE.format(number.name)) and stderr.count("\n") == 1


def test_signal_while_waiting_for_ranks_is_one_line(data, tmp_path):
    """Rank 0 waits in C++ code for a rank that does not come."""
    port = free_port()
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = started(["pretrain_gpt.py", *runs.flags(data, tmp_path)], **env)
    wait_for_listener(port, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert stderr.startswith(LINE.format("SIGTERM")) and stderr.count("\n") == 1


def test_other_ranks_end_in_silence(tmp_path):
    """The launcher ends them by a signal because another rank has failed, which says why."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(600)\n"
    )
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    process = started(["pretrain_gpt.py"], PYTHONPATH=f"{tmp_path}:{REPO}", **env)
    assert process.stdout.readline() == "importing\n", process.stderr.read()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (143, "", "")


def wait_for_listener(port: int, process: subprocess.Popen) -> None:
    """Wait until a process listens on a port of this machine."""
    listening = f":{port:04X} "
    while process.poll() is None:
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines():
                if listening in line and line.split()[3] == "0A":
                    return
    pytest.fail(process.stderr.read())


def test_forked_child_has_its_own_signals():
    """A signal to a child of fork ends the child and does not reach its parent."""
    process = started(["-c", FORK])
    assert process.stdout.readline() == "True\n", process.stderr.read()
    stdout, stderr = process.communicate("\n", timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "-15\n", "")


def test_ignored_signal_stays_ignored():
    code = "\n".join(
        [
            "import os, signal",
            "from megatron.startup_signals import end_on_stop_signals",
            "signal.signal(signal.SIGINT, signal.SIG_IGN)",
            "end_on_stop_signals()",
            "os.kill(os.getpid(), signal.SIGINT)",
            "print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)",
        ]
    )
    stdout, stderr = started(["-c", code]).communicate(timeout=60)
    assert (stdout, stderr) == ("True\n", "")
