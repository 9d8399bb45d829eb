"""Stopping a run between two steps: on a signal, or when its time is over.

On SIGTERM or SIGINT the step ends, a checkpoint is saved, and the exit code is 0. A
signal to one rank is enough, because all ranks exchange their status after each step.

A thread reads the signals. Python's own handlers run in the main thread between two
bytecodes, and the main thread may be in a collective that never ends.

On SIGTERM, SIGINT, or when one of its processes has failed, DeepSpeed's launcher sends
SIGTERM to each rank and its children, one rank after the other, and SIGKILL 30 s later
to those that still run. This has three consequences. After Ctrl-C, rank 0 receives both
signals: the second of two kinds is not a second request to stop. Scheduler and launcher
may send the same signal: a repetition within `REPEAT_SECONDS` is not a second request
either. And SIGTERM may mean that another rank is dead, for which no rank should wait: a
rank that finds a peer on this machine gone ends immediately.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from socket import gethostname
from typing import NoReturn

import torch
from torch import Tensor

from megatron.config.fault_tolerance import FaultToleranceConfig
from megatron.log import get_logger, report_error
from megatron.parallel.groups import Groups, all_gather_objects, all_reduce_sum

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 2.0
"""A signal repeated sooner arrived twice, from scheduler and launcher."""
_CLOSE = 0
"""Byte that ends the thread; no signal has this number."""


@dataclass(frozen=True)
class StepConsensus:
    """What every rank knows after a step, the same on all ranks."""

    lm_loss: float
    """Language-model loss, mean over ranks."""
    aux_loss: float
    """Auxiliary loss, mean over ranks."""
    bad_ranks: int
    """Number of ranks whose loss was NaN or infinite."""
    stop_reason: str
    """Why the run ends after this step; empty: it continues."""


class GracefulStop:
    """Decides after each step, together with the other ranks, whether the run ends.

    A context manager: inside, a stop signal is a request to stop; afterwards the signal
    handlers are the previous ones again.

    Args:
        started: start of the process as `time.time`, from which
            --exit-duration-in-mins counts; None: now.
    """

    def __init__(
        self, config: FaultToleranceConfig, groups: Groups, started: float | None = None
    ):
        self.groups = groups
        self.minutes = config.exit_duration_in_mins
        self._deadline = math.inf
        if self.minutes:
            elapsed = 0.0 if started is None else time.time() - started
            self._deadline = time.monotonic() - elapsed + 60 * self.minutes
        self.stop_signal: signal.Signals | None = None
        """The first stop signal this rank received."""
        self._stop_reason = ""
        self._peer_pids: dict[int, int] = {}
        self._previous_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> GracefulStop:
        self._peer_pids = local_peer_pids(self.groups)
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(
            target=self._listen, args=(reader,), name="signals", daemon=True
        )
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            # A shell starts background jobs with SIGINT ignored: it stays ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, _do_nothing)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()
        signal.set_wakeup_fd(self._previous_fd)
        # Closing our end would not end the thread: processes forked since hold it, too.
        os.write(self._writer, bytes([_CLOSE]))
        self._thread.join()
        os.close(self._writer)

    def all_reduce_step_status(self, lm_loss: Tensor, aux_loss: Tensor) -> StepConsensus:
        """Exchange losses and stop requests after a step, in one small all-reduce.

        Args:
            lm_loss: this rank's language-model loss, 0-d.
            aux_loss: this rank's auxiliary loss, 0-d.
        """
        requests = [self.stop_signal == number for number in STOP_SIGNALS]
        requests.append(time.monotonic() >= self._deadline)
        losses = torch.stack([lm_loss, aux_loss]).double()
        is_bad = (~losses.isfinite().all()).double()[None]
        requests = torch.tensor(requests, dtype=torch.float64, device=losses.device)
        status = all_reduce_sum(torch.cat([losses, is_bad, requests]), self.groups)
        lm_sum, aux_sum, bad_ranks, *ranks_by_request = status.tolist()
        reasons = [number.name for number in STOP_SIGNALS]
        reasons.append(f"--exit-duration-in-mins {self.minutes:g}")
        self._stop_reason = ""
        for reason, ranks in zip(reasons, ranks_by_request, strict=True):
            if ranks:
                self._stop_reason = reason
                break
        world_size = self.groups.world_size
        return StepConsensus(
            lm_sum / world_size, aux_sum / world_size, int(bad_ranks), self._stop_reason
        )

    def _listen(self, reader: int) -> None:
        """Read signal numbers from the pipe, one byte each, until `_CLOSE` arrives."""
        first_seen: dict[int, float] = {}
        with open(reader, "rb", buffering=0) as pipe:
            while True:
                byte = pipe.read(1)
                if not byte or byte[0] == _CLOSE:
                    return
                if byte[0] not in STOP_SIGNALS:
                    continue
                number = signal.Signals(byte[0])
                now = time.monotonic()
                if number not in first_seen:
                    first_seen[number] = now
                    self._request_stop(number)
                elif now - first_seen[number] >= REPEAT_SECONDS:
                    _exit_immediately(
                        f"{number.name} again: this process ends immediately, without a "
                        "checkpoint",
                        128 + number,
                    )

    def _request_stop(self, number: signal.Signals) -> None:
        dead = [rank for rank, pid in self._peer_pids.items() if not _is_alive(pid)]
        if number == signal.SIGTERM and dead and not self._stop_reason:
            _exit_immediately(
                f"rank {dead[0]} ended, and its message says why, or it was killed (out of "
                "memory?); this rank stops with it",
                1,
            )
        if self.stop_signal is not None:
            return
        self.stop_signal = number
        if self.groups.is_rank0:
            get_logger().info(
                "%s: the step ends, a checkpoint is saved if there is --save, then the run "
                "exits 0; %s again after %g s ends it immediately",
                number.name,
                number.name,
                REPEAT_SECONDS,
            )


def local_peer_pids(groups: Groups) -> dict[int, int]:
    """Collect process ids, by rank, of the other ranks visible on this machine."""
    this_host = gethostname()
    hosts_and_pids = all_gather_objects((this_host, os.getpid()), groups)
    return {
        rank: pid
        for rank, (host, pid) in enumerate(hosts_and_pids)
        if rank != groups.rank and host == this_host and _is_alive(pid)
    }


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _exit_immediately(message: str, code: int) -> NoReturn:
    report_error(RuntimeError(message), immediately=True)
    os._exit(code)


def _do_nothing(*_: object) -> None:
    """Replace the default handler, which would end the process: the thread acts."""
