"""Ends a rank that waits for its data forever, e.g. on a hanging network file system.

Only waiting for data is watched. All other waiting of ranks is in collectives, which
have the time limit --timeout-minutes, except for the building of sample indices, which
has none. Gloo raises the timeout in the rank that waits,
and `megatron.exit_codes` condenses it to one line; NCCL's is detected by a thread of
torch, which aborts the process (TORCH_NCCL_ASYNC_ERROR_HANDLING, on by default).
Evaluations as a unit, checkpoints and the first step's compilation have no limit.
"""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Callable, Iterable, Iterator

from megatron.data.loader import Batch
from megatron.log import report_error

_LIMIT_SHARE = 0.8
"""Share of --timeout-minutes that a batch may take: a rank reports that it hangs before
the others report that they waited for it."""
_EXIT_CODE = 3


class Watchdog:
    """A thread that ends the process when the main thread waits too long for a batch.

    A context manager: the thread runs inside it. The thread counts its own ticks
    instead of reading a clock, so that a process that was stopped and continued
    (Ctrl-Z, a suspended machine) is not taken for one that hangs.

    Args:
        minutes: --timeout-minutes.
        end: function that is called with the exit code.
    """

    def __init__(self, minutes: float, end: Callable[[int], object] = os._exit):
        self.minutes = minutes
        self.end = end
        self._limit_s = 60 * _LIMIT_SHARE * minutes
        self._tick_s = min(1.0, self._limit_s / 20)
        self._waiting_for = ""
        self._ticks = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def reading(self, batches: Iterable[Batch], what: str) -> Iterator[Batch]:
        """Yield the same batches while watching how long each takes to arrive.

        Args:
            what: name of a batch in the error message.
        """
        batches = iter(batches)
        while True:
            self._ticks = 0
            self._waiting_for = what
            try:
                batch = next(batches, None)
            finally:
                self._waiting_for = ""
            if batch is None:
                return
            yield batch

    def _watch(self) -> None:
        while not self._closed.wait(self._tick_s):
            self._ticks += 1
            what = self._waiting_for  # one read: the main thread may reset it
            if what and self._ticks * self._tick_s >= self._limit_s:
                report_error(self._timeout_error(what), immediately=True)
                faulthandler.dump_traceback()
                self.end(_EXIT_CODE)
                return

    def _timeout_error(self, what: str) -> TimeoutError:
        return TimeoutError(
            f"{what} did not come within {self._limit_s / 60:.3g} minutes, "
            f"{_LIMIT_SHARE:g} of --timeout-minutes {self.minutes:g}: its file system may "
            "not answer. If reading takes that long, raise --timeout-minutes. What each "
            "thread of this rank does:"
        )
