"""Work in a background thread of every rank, and waiting until all ranks are done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from megatron.parallel.groups import Groups, all_reduce_sum

_POLL_SECONDS = 1.0
"""How long a rank that waits joins its own thread before it asks the others again."""


class BackgroundTask:
    """Work of this rank in a thread; errors are stored for all ranks to act on.

    Args:
        name: the thread's name; error messages begin with it.
        work: the function to run. An OSError is an expected outcome; any other
            exception is also raised in the thread, which prints its traceback.
    """

    def __init__(self, name: str, work: Callable[[], Any]):
        self._name = name
        self._work = work
        self._thread: threading.Thread | None = None
        self.result: Any = None
        self.error = ""
        """The message of the exception that ended the work; empty: none did."""

    def start(self) -> None:
        """Start a daemon thread, which does not keep a failing process alive."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except OSError as error:
            self.error = str(error)
        except BaseException as error:
            self.error = f"{self._name} failed: {error!r}"
            raise

    @property
    def is_running(self) -> bool:
        """Whether the work was started and has not ended."""
        return self._thread is not None and self._thread.is_alive()

    def running_on_any_rank(self, groups: Groups) -> bool:
        """Whether any rank's work is running. A collective: all ranks must call it."""
        running = torch.tensor(float(self.is_running), device=groups.device)
        return all_reduce_sum(running, groups).item() > 0

    def wait_for_all(self, groups: Groups) -> None:
        """Wait until no rank's work is running.

        The wait is a series of short collectives, so that a rank with a slow disk does
        not exceed the time limit of a collective.
        """
        while True:
            if self._thread is not None:
                self._thread.join(_POLL_SECONDS)
            if not self.running_on_any_rank(groups):
                return
