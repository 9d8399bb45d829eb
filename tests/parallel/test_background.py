"""BackgroundTask: stored errors, and waiting for the slowest rank."""

from __future__ import annotations

import os
import threading
import time

import pytest

from helpers.spawn import groups_for
from megatron.parallel.background import BackgroundTask
from megatron.parallel.groups import Groups


def test_task_stores_result_or_oserror():
    for work, result, error in (
        (lambda: 3, 3, ""),
        (lambda: os.listdir("/nowhere"), None, "No such file"),
    ):
        task = BackgroundTask("reading", work)
        assert not task.is_running
        task.start()
        task.wait_for_all(Groups())
        assert task.result == result
        assert error in task.error and bool(error) == bool(task.error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_task_stores_unexpected_errors():
    task = BackgroundTask("counting", lambda: {}["x"])
    task.start()
    task.wait_for_all(Groups())
    assert task.error == "counting failed: KeyError('x')"


def _wait_for_slow_rank(seconds: float, poll_seconds: float) -> tuple[int, float]:
    """On a rank: number of collectives, and seconds of the longest."""
    from megatron.parallel import background

    groups = groups_for(1)
    durations = []
    original_poll = background._POLL_SECONDS
    original_query = BackgroundTask.running_on_any_rank

    def timed_query(self, groups):
        start = time.monotonic()
        running = original_query(self, groups)
        durations.append(time.monotonic() - start)
        return running

    task = BackgroundTask("sleeping", lambda: threading.Event().wait(seconds * groups.rank))
    background._POLL_SECONDS = poll_seconds
    BackgroundTask.running_on_any_rank = timed_query
    try:
        task.start()
        task.wait_for_all(groups)
    finally:
        background._POLL_SECONDS = original_poll
        BackgroundTask.running_on_any_rank = original_query
    return len(durations), max(durations)


def test_waiting_is_many_short_collectives(ranks2):
    """Rank 0 waits four seconds for rank 1, longer than any single collective takes."""
    for count, longest in ranks2.run(_wait_for_slow_rank, 4.0, 0.05):
        assert count > 5 and longest < 3.5
