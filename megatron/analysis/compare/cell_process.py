"""The processes of one cell: pretrain_gpt.py on every rank, with their output in log.txt."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.analysis.compare.devices import Device
from megatron.io.atomic_write import write_text
from megatron.log import get_logger

LOG_FILE = "log.txt"
COMMAND_FILE = "command.txt"
LOCK_FILE = "lock"

GRACE_SECONDS = 120.0
"""Time for processes to save a checkpoint after SIGTERM, before SIGKILL"""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_ERROR = re.compile(r"^(\[rank \d+\] )?error: (?P<text>.*)")
_FOLLOWING_ERROR = re.compile(r"^(another rank|rank \d+) ended|^SIG(TERM|INT) outside of")
"""Errors that follow from that of another rank"""
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt)(:|$)")
_LONGEST_ERROR = 1000
"""Characters of an error line that are stored"""


LOCK_SECONDS = 300.0
"""How long to wait for the processes of a killed runner, which save a checkpoint and end"""
_POLL_SECONDS = 0.05


class CellLocked(Exception):
    """Processes of an earlier runner still run the cell."""


def lock_deadline() -> float:
    """Return until when to wait for a locked cell, as `time.monotonic`."""
    return time.monotonic() + LOCK_SECONDS


@contextlib.contextmanager
def cell_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a cell, so that no process runs it; wait for one of a killed runner.

    Raises:
        ValueError: it has not ended after LOCK_SECONDS.
        OSError: the folder cannot be written.
    """
    deadline = lock_deadline()
    is_first = True
    with open(folder / LOCK_FILE, "a") as lock:
        while True:
            try:
                _lock(lock.fileno(), folder)
                break
            except CellLocked:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"processes of an earlier runner still run the cell {folder}; end them"
                    ) from None
            if is_first:
                get_logger().info("cell %s: waiting for an earlier process", folder.name)
            is_first = False
            time.sleep(_POLL_SECONDS)
        yield


@dataclass
class CellProcess:
    """The running processes of a cell."""

    folder: Path
    device: Device
    processes: list[subprocess.Popen]
    log_start: int
    """size of log.txt before this attempt"""
    started: float = field(default_factory=time.monotonic)
    _asked_to_end: float | None = None
    """when the processes were asked to end, as `time.monotonic`"""

    @staticmethod
    def start(
        folder: Path,
        command: Sequence[str],
        device: Device,
        ranks: int,
        threads: int,
    ) -> CellProcess:
        """Start a command on every rank, without waiting for it.

        The kernel sends SIGTERM to the processes when the runner dies, however it does. They
        hold a lock on the folder, so that no other runner starts the cell before they have
        ended.

        Args:
            folder: of the cell, for log.txt and command.txt.
            threads: of each process on a CPU.

        Raises:
            CellLocked: processes of an earlier runner have not ended yet.
            OSError: a file cannot be written, or a process cannot be started.
        """
        folder.mkdir(parents=True, exist_ok=True)
        environment = device.environment(threads)
        with open(folder / LOCK_FILE, "a") as lock, open(folder / LOG_FILE, "ab") as log:
            _lock(lock.fileno(), folder)
            settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
            shown = f"{' '.join(settings)} {shlex.join(command)}"
            write_text(folder / COMMAND_FILE, f"# {ranks} rank(s)\n{shown}\n")
            started = CellProcess(folder, device, [], log.tell())
            try:
                for variables in _rank_variables(ranks):
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **environment, **variables},
                        pass_fds=[lock.fileno()],
                        start_new_session=True,
                        preexec_fn=_end_with_parent(os.getpid()),
                    )
                    started.processes.append(process)
            except OSError:
                started.kill()
                raise
        return started

    def poll(self) -> int | None:
        """Return the exit code when all processes have ended, else None.

        When one fails, the others are asked to end. Processes that do not end in time are
        killed. The code is that of the first rank that failed; negative: the number of a signal.
        """
        codes = [process.poll() for process in self.processes]
        failed = [code for code in codes if code]
        if None not in codes:
            return failed[0] if failed else 0
        if failed:
            self.terminate()
        asked = self._asked_to_end
        if asked is not None and time.monotonic() - asked > GRACE_SECONDS:
            self.kill()
        return None

    def terminate(self) -> None:
        """Ask the processes to save a checkpoint and end. Does nothing the second time."""
        if self._asked_to_end is not None:
            return
        self._asked_to_end = time.monotonic()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the processes and their children immediately, and wait for them."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def error_line(self, code: int) -> str:
        """Return why this attempt failed, from its log and its exit code, in one line."""
        with open(self.folder / LOG_FILE, "rb") as file:
            file.seek(self.log_start)
            text = file.read().decode(errors="replace")
        found = error_of_log(text)
        if code < 0:
            name = signal.Signals(-code).name
            ended = f"ended by {name}"
            if code == -signal.SIGKILL:
                ended += " (out of memory?)"
            return f"{ended}; {found}" if found else ended
        return found or f"exit code {code}, and nothing in {LOG_FILE}"


def error_of_log(text: str) -> str:
    """Return the first error in the output of a run, or else of a traceback, or the last line."""
    errors = []
    exceptions = []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if match := _ERROR.match(line):
            errors.append(match["text"])
        elif _EXCEPTION.match(line):
            exceptions.append(line)
    causes = [error for error in errors if not _FOLLOWING_ERROR.match(error)]
    for found in (causes[:1], exceptions[-1:], errors[:1], lines[-1:]):
        if found:
            return found[0][:_LONGEST_ERROR]
    return ""


def pretrain_command(program: Path, words: Sequence[str]) -> list[str]:
    """Return the command that runs pretrain_gpt.py with this Python."""
    return [sys.executable, str(program), *words]


def _lock(descriptor: int, folder: Path) -> None:
    """Lock a cell until this process and those that inherit the file have closed it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CellLocked(str(folder)) from None
    except OSError:
        return  # a file system without locks: --output is locked or warned about likewise


def _rank_variables(ranks: int) -> list[dict[str, str]]:
    """Return the variables by which the ranks of a cell find each other."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = []
    for rank in range(ranks):
        variables.append(
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        )
    return variables


def _end_with_parent(parent: int):
    """Return a function for the child that lets it end with its parent (Linux)."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before
            os._exit(128 + signal.SIGTERM)

    return prepare
