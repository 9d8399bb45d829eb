"""Ends a rank that waits for its data forever, as for a file on a network file system that does not answer.

Only waiting for data is watched. Everything else that ranks wait for is a collective, and those have a time limit of
their own, --timeout-minutes. Gloo's raises in the rank that waits, and megatron/pretrain.py makes one line of it.
NCCL's is kept by a thread of torch, which aborts the process (TORCH_NCCL_ASYNC_ERROR_HANDLING, on by default).
Evaluations, checkpoints and the first step's compilation take as long as they take.
"""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Callable, Iterable, Iterator

from megatron.data.loader import Batch
from megatron.log import report_error

SHARE = 0.8
"""of --timeout-minutes: a rank says that it hangs before the others say that they waited for it"""
CODE = 3


class Watchdog:
    """A thread that counts while the main thread waits for a batch. A context manager.

    It counts its own ticks, so that a process that was stopped and goes on (Ctrl-Z, a suspended machine) is not taken
    for one that hangs.

    Args:
        minutes: --timeout-minutes.
        end: what is called with the exit code.
    """

    def __init__(self, minutes: float, end: Callable[[int], object] = os._exit):
        self.minutes, self.end = minutes, end
        self._limit = 60 * SHARE * minutes
        self._tick = min(1.0, self._limit / 20)
        self._waiting, self._ticks = "", 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def reading(self, batches: Iterable[Batch], what: str) -> Iterator[Batch]:
        """The same batches; `what` says in the message what they are."""
        batches = iter(batches)
        while True:
            self._ticks, self._waiting = 0, what
            try:
                batch = next(batches, None)
            finally:
                self._waiting = ""
            if batch is None:
                return
            yield batch

    def _watch(self) -> None:
        while not self._closed.wait(self._tick):
            self._ticks += 1
            if (what := self._waiting) and self._ticks * self._tick >= self._limit:
                report_error(
                    TimeoutError(
                        f"{what} did not come within {self._limit / 60:.3g} minutes, {SHARE:g} of --timeout-minutes "
                        f"{self.minutes:g}: its file system may not answer. If reading takes so long, raise "
                        "--timeout-minutes. What each thread of this rank does:"
                    ),
                    at_once=True,
                )
                faulthandler.dump_traceback()
                self.end(CODE)
                return
