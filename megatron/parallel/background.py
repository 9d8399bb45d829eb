"""Work in a background thread of every rank, and waiting until all ranks are done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megatron.parallel.groups import Groups, all_gather_objects, all_reduce_sum

_POLL_SECONDS = 1.0
"""How long a rank that waits joins its own thread before it asks the others again."""


class TaskOutcome(NamedTuple):
    """How the work of one rank ended."""

    result: Any
    """What it returned; None if it failed or was not started."""
    error: str
    """The message of the OSError that ended it; empty: none did."""


class BackgroundTask:
    """Work of this rank in a thread, whose outcome all ranks learn from `outcomes`.

    Args:
        name: the thread's name, for messages.
        work: the function to run. An OSError is an expected outcome; any other exception is
            a mistake in the program, and ends it on all ranks.
    """

    def __init__(self, name: str, work: Callable[[], Any]):
        self._name = name
        self._work = work
        self._thread: threading.Thread | None = None
        self._result: Any = None
        self._error = ""
        self._bug: BaseException | None = None

    def start(self) -> None:
        """Start a daemon thread, which does not keep a failing process alive."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except OSError as error:
            self._error = str(error)
        except BaseException as error:
            self._bug = error

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

    def outcomes(self, groups: Groups) -> list[TaskOutcome]:
        """Return how the work of every rank ended, by rank, once none is running.

        A collective: all ranks must call it.

        Raises:
            RuntimeError: the work of another rank raised an exception other than OSError.
            BaseException: the work of this rank did, which is raised here with its traceback.
        """
        bug = ""
        if self._bug is not None:
            bug = f"{self._name} failed: {self._bug!r}"
        answers = all_gather_objects((self._result, self._error, bug), groups)
        if self._bug is not None:
            raise self._bug
        for rank, (_, _, bug) in enumerate(answers):
            if bug:
                raise RuntimeError(f"{bug} on rank {rank}, which shows the traceback")
        return [TaskOutcome(result, error) for result, error, _ in answers]
