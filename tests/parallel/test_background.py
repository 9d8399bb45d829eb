"""BackgroundTask: stored errors, and waiting for the slowest rank."""

from __future__ import annotations

import os
import threading
import time

import pytest

from helpers.spawn import groups_for
from megatron.parallel.background import BackgroundTask
from megatron.parallel.groups import Groups


def finished(work) -> BackgroundTask:
    """Return a task that has ended."""
    task = BackgroundTask("counting", work)
    assert not task.is_running
    task.start()
    task.wait_for_all(Groups())
    return task


def test_task_stores_result_or_oserror():
    assert finished(lambda: 3).outcomes(Groups()) == [(3, "")]
    (outcome,) = finished(lambda: os.listdir("/nowhere")).outcomes(Groups())
    assert outcome.result is None and "No such file" in outcome.error
    assert BackgroundTask("counting", lambda: 3).outcomes(Groups()) == [(None, "")]


def _fail_on_rank1() -> None:
    {}["x"]


def test_unexpected_error_is_raised_with_traceback():
    """It is a mistake in the program, not a failure of the disk."""
    with pytest.raises(KeyError, match="x") as caught:
        finished(_fail_on_rank1).outcomes(Groups())
    assert caught.traceback[-1].name == "_fail_on_rank1"


def _outcomes(failing_rank: int) -> str:
    """Run on a rank: how outcomes of work that fails on one rank are reported."""
    groups = groups_for(1)
    work = _fail_on_rank1 if groups.rank == failing_rank else lambda: groups.rank
    task = BackgroundTask("counting", work)
    task.start()
    task.wait_for_all(groups)
    try:
        return repr(task.outcomes(groups))
    except Exception as error:
        return repr(error)


def test_unexpected_error_ends_all_ranks(ranks2):
    assert ranks2.run(_outcomes, 1) == [
        "RuntimeError(\"counting failed: KeyError('x') on rank 1, which shows the traceback\")",
        "KeyError('x')",
    ]
    both = "[TaskOutcome(result=0, error=''), TaskOutcome(result=1, error='')]"
    assert ranks2.run(_outcomes, 2) == [both] * 2


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
