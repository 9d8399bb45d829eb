"""Signals and the end of a run's time: all ranks save and exit with code 0."""

from __future__ import annotations

import time

from helpers import faulty, runs
from helpers.faulty import Run

# With 2 micro-batches per step on each of two ranks and no others.
SHORT = ["--eval-iters", "0"]


def test_signal_to_one_rank_stops_all(finished, data, tmp_path):
    """Rank 1 and its data process get signals in step 3, several times and from others.

    A checkpoint is saved, and the resumed run equals the uninterrupted one.
    """
    argv = runs.flags(data, tmp_path, 20, *runs.EP2, *SHORT, "--num-workers", "1")
    faults = {1: {5: faulty.stop_worker_too, 6: faulty.terminate}}
    with Run(argv, tmp_path, faults=faults) as run:
        assert run.codes() == [0, 0], run.text
    assert [m["iteration"] for m in runs.metrics(tmp_path)] == [1, 2, 3]
    assert len(run.lines("this run ends at iteration 3 of 20: SIGTERM")) == 1
    assert not run.lines("error|Traceback")
    argv += ["--load", str(tmp_path / "checkpoints"), "--exit-interval", "6"]
    with Run(argv, tmp_path) as run:
        assert run.codes() == [0, 0], run.text
    assert len(run.lines("this run ends at iteration 6 of 20: --exit-interval 6")) == 1
    resumed = runs.metrics(tmp_path)
    expected = runs.metrics(finished)[:6]
    for key in ("iteration", "loss", "aux_loss", "lr", "grad_norm", "consumed_samples"):
        assert [m[key] for m in resumed] == [m[key] for m in expected], key


def test_second_signal_ends_the_run_immediately(data, tmp_path):
    """Rank 0 logs at the first signal what will happen, and at the second one ends."""
    argv = runs.flags(data, tmp_path, 20, *runs.EP2, *SHORT)
    with Run(argv, tmp_path, faults={0: {5: faulty.terminate_again}}) as run:
        codes = run.codes()
    assert codes == [128 + 15, 1], run.text
    announced = run.lines(
        "SIGTERM: the step ends, a checkpoint is saved if there is --save, then the run exits 0"
    )
    assert len(announced) == 1
    assert len(run.lines("^error: SIGTERM again: this process ends immediately")) == 1
    assert not list((tmp_path / "checkpoints").glob("iter_*"))


def test_run_ends_when_time_is_over(data, tmp_path):
    """It counts from the start of the process; a run within its time continues."""
    argv = [*runs.flags(data, tmp_path, 20), *SHORT, "--exit-duration-in-mins"]
    with Run([*argv, "59.5"], tmp_path, ranks=1, started=time.time() - 3600) as run:
        assert run.codes() == [0], run.text
    ends = run.lines("this run ends at iteration 1 of 20: --exit-duration-in-mins 59.5")
    assert len(ends) == 1
    assert (tmp_path / "checkpoints/latest").exists()
    more = ["--load", str(tmp_path / "checkpoints"), "--exit-interval", "3"]
    # Ten minutes are enough for two steps also on a busy machine.
    with Run([*argv, "70", *more], tmp_path, ranks=1, started=time.time() - 3600) as run:
        assert run.codes() == [0], run.text
    assert [m["iteration"] for m in runs.metrics(tmp_path)] == [1, 2, 3]
