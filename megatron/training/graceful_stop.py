"""When a run ends between two steps: a signal, or the end of the time it was given. All ranks agree after each step.

SIGTERM and SIGINT: the step ends, a checkpoint is saved, the exit code is 0. One rank that gets the signal is enough.
Signals are read by a thread: Python's own handlers run in the main thread between two lines of Python, and that thread
may be in a collective that never ends.

What DeepSpeed's launcher does: on SIGTERM, SIGINT, or when one of its processes failed, it sends SIGTERM to each rank
and its children, one rank after the other, and SIGKILL after 30 s to those that are still there. So after Ctrl-C rank
0 gets both signals, others get SIGTERM late, and a SIGTERM may also mean that another rank is dead, for which nobody
should wait: neither the second of two kinds nor one that follows at once is taken for a second wish to stop, and with
a neighbour gone a rank ends at once.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.fault_tolerance import FaultToleranceConfig
from megatron.log import get_logger, report_error
from megatron.parallel.groups import Groups, all_reduce_sum

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENOUGH = 0  # no signal has this number
REPEAT_SECONDS = 2.0  # what comes sooner is the same signal on two ways: from the scheduler and from the launcher


@dataclass(frozen=True)
class StepConsensus:
    """What every rank knows after a step."""

    lm_loss: float
    aux_loss: float
    """means over ranks"""
    bad_ranks: int
    """ranks whose loss was NaN or infinite"""
    reason: str
    """why the run ends here; empty: it goes on"""


class GracefulStop:
    """Knows whether to stop. A context manager: within, signals are wishes; afterwards they are what they were.

    Args:
        started: when the process did, as `time.time`; None: now.
    """

    def __init__(
        self, config: FaultToleranceConfig, groups: Groups, started: float | None = None
    ):
        self.groups, self.minutes = groups, config.exit_duration_in_mins
        passed = 0.0 if started is None else time.time() - started
        self._deadline = (
            time.monotonic() - passed + 60 * self.minutes if self.minutes else math.inf
        )
        self.signal: signal.Signals | None = None
        """the first one"""
        self._reason = ""
        self._neighbours: dict[int, int] = {}
        self._undo: list[tuple] = []

    def __enter__(self) -> GracefulStop:
        self._neighbours = local_peer_pids(self.groups)
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(
            target=self._listen, args=(reader,), name="signals", daemon=True
        )
        self._thread.start()
        self._undo = [
            (
                signal.set_wakeup_fd,
                signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False),
            )
        ]
        for number in SIGNALS:
            if (
                signal.getsignal(number) != signal.SIG_IGN
            ):  # as in a shell's background job: it stays ignored
                self._undo.append(
                    (signal.signal, number, signal.signal(number, _leave_it_to_the_thread))
                )
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            function, *arguments = self._undo.pop()
            function(*arguments)
        os.write(
            self._writer, bytes([ENOUGH])
        )  # its end would not do: processes forked since then have it, too
        self._thread.join()
        os.close(self._writer)

    def agree(self, lm_loss: Tensor, aux_loss: Tensor) -> StepConsensus:
        """Exchange what ranks must decide alike, after each step: one small all-reduce; none for one rank.

        Args:
            lm_loss, aux_loss: 0-d, of this rank.
        """
        wishes = [self.signal == number for number in SIGNALS] + [
            time.monotonic() >= self._deadline
        ]
        losses = torch.stack([lm_loss, aux_loss]).double()
        row = torch.cat(
            [
                losses,
                (~losses.isfinite().all()).double()[None],
                torch.tensor(wishes, dtype=torch.float64, device=losses.device),
            ]
        )
        lm_loss, aux_loss, bad_ranks, *wishes = all_reduce_sum(row, self.groups).tolist()
        names = [
            *(number.name for number in SIGNALS),
            f"--exit-duration-in-mins {self.minutes:g}",
        ]
        self._reason = next(
            (name for name, ranks in zip(names, wishes, strict=True) if ranks), ""
        )
        ranks = self.groups.world_size
        return StepConsensus(lm_loss / ranks, aux_loss / ranks, int(bad_ranks), self._reason)

    def _listen(self, reader: int) -> None:
        """The thread: each byte is the number of a signal, or says that it is enough."""
        seen: dict[int, float] = {}
        with open(reader, "rb", buffering=0) as pipe:
            while (byte := pipe.read(1)) and byte[0] != ENOUGH:
                now = time.monotonic()
                if byte[0] not in SIGNALS:
                    continue
                first = seen.setdefault(byte[0], now)
                if first == now:
                    self._request_stop(signal.Signals(byte[0]))
                elif now - first >= REPEAT_SECONDS:
                    name = signal.Signals(byte[0]).name
                    self._end(
                        f"{name} again: this process ends at once, without a checkpoint",
                        128 + byte[0],
                    )

    def _request_stop(self, number: signal.Signals) -> None:
        gone = [rank for rank, process in self._neighbours.items() if not _is_alive(process)]
        if number == signal.SIGTERM and gone and not self._reason:
            self._end(
                f"rank {gone[0]} ended, and its message says why, or it was killed (out of memory?); this rank "
                "stops with it",
                1,
            )
        if self.signal is None:
            self.signal = number
            if self.groups.is_rank0:
                get_logger().info(
                    "%s: the step ends, a checkpoint is saved if there is --save, then the run exits 0; "
                    "%s again after %g s ends it at once",
                    number.name,
                    number.name,
                    REPEAT_SECONDS,
                )

    def _end(self, message: str, code: int) -> NoReturn:
        report_error(RuntimeError(message), at_once=True)
        os._exit(code)


def local_peer_pids(groups: Groups) -> dict[int, int]:
    """The other ranks on this machine, by their process ids: those that can be seen from here."""
    if groups.world_size == 1:
        return {}
    everyone: list = [None] * groups.world_size
    mine = (socket.gethostname(), os.getpid())
    dist.all_gather_object(everyone, mine)
    return {
        rank: process
        for rank, (host, process) in enumerate(everyone)
        if rank != groups.rank and host == mine[0] and _is_alive(process)
    }


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def _leave_it_to_the_thread(*_: object) -> None:
    """A handler has to be there, or the signal would do what it does by default."""
