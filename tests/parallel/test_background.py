"""Work in threads of the ranks: errors are kept, and waiting for the slowest is many short collectives."""

from __future__ import annotations

import os
import threading
import time

import pytest

from helpers.spawn import groups_for
from megatron.parallel.background import BackgroundTask
from megatron.parallel.groups import Groups


def test_results_and_expected_errors():
    for work, result, error in (
        (lambda: 3, 3, ""),
        (lambda: os.listdir("/nowhere"), None, "No such file"),
    ):
        job = BackgroundTask("reading", work)
        assert not job.is_running
        job.start()
        job.wait_for_all(Groups())
        assert job.result == result and error in job.error and bool(error) == bool(job.error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_of_ours_is_told_too():
    job = BackgroundTask("counting", lambda: {}["x"])
    job.start()
    job.wait_for_all(Groups())
    assert job.error == "counting failed: KeyError('x')"


def _wait_for_the_slow_one(seconds):
    from megatron.parallel import background

    groups, patience, asked = groups_for(1), background._POLL_SECONDS, []
    ask = BackgroundTask.running_on_any_rank

    def timed(self, groups):
        start = time.monotonic()
        busy = ask(self, groups)
        asked.append(time.monotonic() - start)
        return busy

    job = BackgroundTask("sleeping", lambda: threading.Event().wait(seconds * groups.rank))
    background._POLL_SECONDS, BackgroundTask.running_on_any_rank = 0.05, timed
    try:
        job.start()
        job.wait_for_all(groups)
    finally:
        background._POLL_SECONDS, BackgroundTask.running_on_any_rank = patience, ask
    return len(asked), max(asked)


def test_no_collective_waits_for_the_slowest(ranks2):
    """Rank 0 has nothing to do for two seconds, and a --timeout-minutes of less would not end it."""
    for number, longest in ranks2.run(_wait_for_the_slow_one, 2.0):
        assert number > 5 and longest < 1.5
