"""A rank that ends or hangs ends the run soon.

Its error is printed first, and the other ranks print one line at most.
"""

from __future__ import annotations

import os
import signal

import pytest

from helpers import faulty, runs
from helpers.faulty import Run
from helpers.waiting import LIMIT_SECONDS

SHORT = ["--eval-iters", "0"]
LOST = "error: (another rank|rank [01]) ended, and its message says why, or it was killed"


@pytest.mark.parametrize(
    "fault, code, first",
    [
        (faulty.key_error, 1, "KeyError: 'a broken record'"),
        (faulty.exit_immediately, 7, None),
        (faulty.kill, -9, None),
    ],
)
def test_ending_rank_ends_the_run(fault, code, first, data, tmp_path):
    """Nothing is saved, and the only traceback is that of a rank with an exception."""
    argv = runs.flags(data, tmp_path, 1000, *runs.EP2, *SHORT)
    with Run(argv, tmp_path, faults={1: {5: fault}}) as run:
        assert run.codes() == [1, code], run.text
    (lost,) = run.lines(LOST)
    assert len(run.lines("error:")) == 1
    assert len(run.lines("Traceback")) == (first is not None)
    assert first is None or run.text.index(first) < run.text.index(lost)
    assert not list((tmp_path / "checkpoints").glob("iter_*"))


def test_hanging_data_is_reported_with_traceback(data, tmp_path):
    """The rank that waits for its data ends first, with the stack of its threads.

    It has a fifth of the timeout to do so before the other rank's collective fails: 6 s here.
    """
    argv = runs.flags(data, tmp_path, 1000, *runs.EP2, *SHORT, "--timeout-minutes", "0.5")
    with Run(argv, tmp_path, faults={1: {5: faulty.hang}}) as run:
        assert run.codes() == [1, 3], run.text
    (hanging,) = run.lines(
        "error: a batch of iteration 3 did not come within 0.4 minutes, 0.8 of "
        "--timeout-minutes 0.5"
    )
    (lost,) = run.lines(LOST)
    assert hanging.startswith("[rank 1]")
    assert run.text.index("in hang") < run.text.index(lost)


def test_frozen_rank_exceeds_the_timeout(data, tmp_path):
    """The other rank waits for --timeout-minutes and reports it. A SIGTERM, as the
    launcher sends it, then ends the frozen rank, which does not wait for the dead
    one."""
    argv = runs.flags(data, tmp_path, 1000, *runs.EP2, *SHORT, "--timeout-minutes", "0.25")
    with Run(argv, tmp_path, faults={1: {5: faulty.freeze, 6: faulty.hang}}) as run:
        run.ranks[0].join(LIMIT_SECONDS)
        assert run.ranks[0].exitcode == 3, run.text
        (error,) = run.lines("error:")
        assert "a collective (" in error
        assert "took longer than --timeout-minutes 0.25: another rank hangs" in error
        os.kill(run.ranks[1].pid, signal.SIGTERM)
        os.kill(run.ranks[1].pid, signal.SIGCONT)
        assert run.codes() == [3, 1], run.text
    assert len(run.lines(r"\[rank 1\] error: rank 0 ended, and its message says why")) == 1


def test_killed_data_process_ends_the_run(data, tmp_path):
    argv = runs.flags(data, tmp_path, 1000, *runs.EP2, *SHORT, "--num-workers", "1")
    with Run(argv, tmp_path, faults={1: {5: faulty.kill_worker}}) as run:
        assert run.codes() == [1, 2], run.text
    (killed,) = run.lines(
        r"\[rank 1\] error: process \d+, which reads data for rank 1, was ended by signal "
        "Killed. If memory ran out, lower --num-workers"
    )
    (lost,) = run.lines(LOST)
    assert run.text.index(killed) < run.text.index(lost)
    assert not run.lines("Traceback")
