"""Runs with a fault on a chosen rank, just before it reads its n-th micro-batch."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from helpers import killable
from helpers.spawn import free_port
from helpers.waiting import LIMIT_SECONDS

Fault = Callable[[], object]


def run(
    argv: list[str],
    rank: int,
    ranks: int,
    port: int,
    output: str,
    faults: dict[int, Fault],
    started: float | None,
) -> None:
    """In a forked process: one rank of a run, as in `killable.run`, with its faults."""
    from megatron import pretrain
    from megatron.data.loader import BatchLoader

    # As in any run: the fork server has made its own start method the default.
    multiprocessing.set_start_method("fork", force=True)
    read = BatchLoader.__next__
    main = pretrain.main
    count = itertools.count(1)

    def read_with_faults(self):
        fault = faults.get(next(count))
        if fault is not None:
            fault()
        return read(self)

    BatchLoader.__next__ = read_with_faults
    pretrain.main = lambda argv: main(argv, started)
    killable.run(argv, rank, ranks, port, output)


class Run:
    """A run whose processes are killed when the context manager ends.

    Args:
        faults: by rank and number of the micro-batch (counted from 1, evaluations
            included), the function that is called then.
        started: start of the process, which is passed to `pretrain.main`.
    """

    def __init__(
        self,
        argv: list[str],
        folder: Path,
        ranks: int = 2,
        faults: dict[int, dict[int, Fault]] | None = None,
        started: float | None = None,
    ):
        self.output = folder / "output.txt"
        port = free_port()
        faults = faults or {}
        # Not daemons: those may not start processes that read data.
        self.ranks = [
            killable.server().Process(
                target=run,
                args=(
                    argv,
                    rank,
                    ranks,
                    port,
                    str(self.output),
                    faults.get(rank, {}),
                    started,
                ),
            )
            for rank in range(ranks)
        ]

    def __enter__(self) -> Run:
        for process in self.ranks:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def codes(self, timeout: float = LIMIT_SECONDS) -> list[int]:
        """Wait for all ranks, at most `timeout` seconds; return their exit codes."""
        end = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        assert None not in codes, f"{codes}: {self.text}"
        return codes

    @property
    def text(self) -> str:
        """Everything that the ranks have printed."""
        return self.output.read_text()

    def lines(self, pattern: str) -> list[str]:
        """Printed lines in which the pattern is found."""
        return [line for line in self.text.splitlines() if re.search(pattern, line)]


# Faults


def key_error() -> None:
    raise KeyError("a broken record")


def exit_immediately() -> None:
    os._exit(7)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    threading.Event().wait()


def terminate() -> None:
    """Send SIGTERM twice, as scheduler and launcher together do, and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)


def terminate_again() -> None:
    """Send SIGTERM twice, the second as if after the repeat time, and then hang."""
    from megatron.training import graceful_stop

    graceful_stop.REPEAT_SECONDS = 0.0
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    hang()


def kill_worker() -> None:
    """Kill the process that reads this rank's data."""
    os.kill(_worker_pid(), signal.SIGKILL)


def stop_worker_too() -> None:
    """Send signals to the data process and this rank, from another process.

    This is what the launcher does: SIGTERM to the rank's children, then to the rank.
    """
    worker = _worker_pid()
    for number, pid in (("INT", worker), ("TERM", worker), ("TERM", os.getpid())):
        subprocess.run(["kill", f"-{number}", str(pid)], check=True)


def _worker_pid() -> int:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    (worker,) = children
    return int(worker)
