"""Runs in which something happens to a rank at a known moment: before it reads its n-th micro-batch."""

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
    """One rank, as `killable.run` is, with its faults."""
    from megatron import pretrain
    from megatron.data.loader import BatchLoader

    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in any run: the server has made its own the default
    read, count, main = BatchLoader.__next__, itertools.count(1), pretrain.main

    def reading(self):
        if fault := faults.get(next(count)):
            fault()
        return read(self)

    BatchLoader.__next__ = reading
    pretrain.main = lambda argv: main(argv, started)
    killable.run(argv, rank, ranks, port, output)


class Run:
    """A run, as a context manager: at its end its processes end.

    Args:
        faults: by rank and number of the micro-batch (counted from 1, evaluations included): what happens then.
        started: when the process did, as the run is told.
    """

    def __init__(
        self,
        argv: list[str],
        folder: Path,
        ranks: int = 2,
        faults: dict[int, dict[int, Fault]] | None = None,
        started: float | None = None,
    ):
        self.output, port = folder / "output.txt", free_port()
        # no daemons: those may not start processes that read data
        self.ranks = [
            killable.server().Process(
                target=run,
                args=(
                    argv,
                    rank,
                    ranks,
                    port,
                    str(self.output),
                    (faults or {}).get(rank, {}),
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

    def codes(self, timeout: float = 60) -> list[int]:
        """Exit codes of all ranks, which must be there in time."""
        end = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        assert None not in codes, f"{codes}: {self.text}"
        return codes

    @property
    def text(self) -> str:
        return self.output.read_text()

    def lines(self, pattern: str) -> list[str]:
        return [line for line in self.text.splitlines() if re.search(pattern, line)]


# Faults


def key_error() -> None:
    raise KeyError("a broken record")


def exit_at_once() -> None:
    os._exit(7)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    threading.Event().wait()


def terminate() -> None:
    """SIGTERM, at once again (as when scheduler and launcher both send it), and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)


def terminate_again() -> None:
    """Twice, and the second one later; then nothing comes to an end by itself."""
    from megatron.training import graceful_stop

    graceful_stop.REPEAT_SECONDS = 0.0
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    hang()


def kill_worker() -> None:
    (worker,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)


def stop_worker_too() -> None:
    """As the launcher does: SIGTERM to the rank's processes, then to the rank. It matters that another sends it."""
    (worker,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for number, process in (("INT", worker), ("TERM", worker), ("TERM", os.getpid())):
        subprocess.run(["kill", f"-{number}", str(process)], check=True)
