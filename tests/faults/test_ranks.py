"""A rank that ends or hangs ends the whole run soon, and its error comes first; the others say one line at most."""

from __future__ import annotations

import os
import signal

import pytest

from helpers import faulty, runs
from helpers.faulty import Run

SHORT = ["--eval-iters", "0"]
LOST = "error: (another rank|rank [01]) ended, and its message says why, or it was killed"


@pytest.mark.parametrize(
    "fault, code, first",
    [
        (faulty.key_error, 1, "KeyError: 'a broken record'"),
        (faulty.exit_at_once, 7, None),
        (faulty.kill, -9, None),
    ],
)
def test_a_rank_that_ends(fault, code, first, data, tmp_path):
    with Run(
        runs.flags(data, tmp_path, 1000, *runs.EP2, *SHORT), tmp_path, faults={1: {5: fault}}
    ) as run:
        assert run.codes() == [1, code], run.text
    (said,) = run.lines(LOST)
    assert len(run.lines("error:")) == 1 and len(run.lines("Traceback")) == (first is not None)
    assert first is None or run.text.index(first) < run.text.index(said)
    assert not list((tmp_path / "checkpoints").glob("iter_*"))


def test_a_rank_that_hangs_in_its_data_says_where(data, tmp_path):
    argv = runs.flags(data, tmp_path, 1000, *runs.EP2, *SHORT, "--timeout-minutes", "0.05")
    with Run(argv, tmp_path, faults={1: {5: faulty.hang}}) as run:
        assert run.codes() == [1, 3], run.text
    (named,) = run.lines(
        "error: a batch of iteration 3 did not come within 0.04 minutes, 0.8 of --timeout-minutes 0.05"
    )
    (said,) = run.lines(LOST)
    assert named.startswith("[rank 1]") and run.text.index("in hang") < run.text.index(said)


def test_a_rank_that_is_frozen(data, tmp_path):
    """The other waits for --timeout-minutes and says so. Then a SIGTERM, as the launcher sends it, ends the first,
    whatever it does: for a dead rank nobody waits."""
    argv = runs.flags(data, tmp_path, 1000, *runs.EP2, *SHORT, "--timeout-minutes", "0.05")
    with Run(argv, tmp_path, faults={1: {5: faulty.freeze, 6: faulty.hang}}) as run:
        run.ranks[0].join(60)
        assert run.ranks[0].exitcode == 3, run.text
        (said,) = run.lines("error:")
        assert (
            "a collective (" in said
            and "took longer than --timeout-minutes 0.05: another rank hangs" in said
        )
        os.kill(run.ranks[1].pid, signal.SIGTERM)
        os.kill(run.ranks[1].pid, signal.SIGCONT)
        assert run.codes() == [3, 1], run.text
    assert len(run.lines(r"\[rank 1\] error: rank 0 ended, and its message says why")) == 1


def test_a_process_that_reads_data_is_killed(data, tmp_path):
    argv = runs.flags(data, tmp_path, 1000, *runs.EP2, *SHORT, "--num-workers", "1")
    with Run(argv, tmp_path, faults={1: {5: faulty.kill_worker}}) as run:
        assert run.codes() == [1, 2], run.text
    (named,) = run.lines(
        r"\[rank 1\] error: process \d+, which reads data for rank 1, was ended by signal Killed. If "
        "memory ran out, lower --num-workers"
    )
    (said,) = run.lines(LOST)
    assert run.text.index(named) < run.text.index(said) and not run.lines("Traceback")
