"""Signals and the end of a run's time: the step ends, a checkpoint is saved, the exit code is 0, on all ranks."""

from __future__ import annotations

import time

from helpers import faulty, runs
from helpers.faulty import Run

SHORT = ["--eval-iters", "0"]  # 2 micro-batches a step on each of two ranks, and no others


def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(finished, data, tmp_path):
    """Rank 1 and its reader of data get it in step 3, from several sides: a checkpoint, and what follows is exact."""
    argv = runs.flags(data, tmp_path, 20, *runs.EP2, *SHORT, "--num-workers", "1")
    with Run(
        argv, tmp_path, faults={1: {5: faulty.stop_worker_too, 6: faulty.terminate}}
    ) as run:
        assert run.codes() == [0, 0], run.text
    assert [m["iteration"] for m in runs.metrics(tmp_path)] == [1, 2, 3]
    assert len(run.lines("this run ends at iteration 3 of 20: SIGTERM")) == 1 and not run.lines(
        "error|Traceback"
    )
    with Run(
        [*argv, "--load", str(tmp_path / "checkpoints"), "--exit-interval", "6"], tmp_path
    ) as run:
        assert run.codes() == [0, 0], run.text
    assert len(run.lines("this run ends at iteration 6 of 20: --exit-interval 6")) == 1
    got, expected = runs.metrics(tmp_path), runs.metrics(finished)[:6]
    for key in ("iteration", "loss", "aux_loss", "lr", "grad_norm", "consumed_samples"):
        assert [m[key] for m in got] == [m[key] for m in expected], key


def test_the_first_rank_says_at_once_what_will_happen_and_a_second_signal_ends_it_at_once(
    data, tmp_path
):
    argv = runs.flags(data, tmp_path, 20, *runs.EP2, *SHORT)
    with Run(argv, tmp_path, faults={0: {5: faulty.terminate_again}}) as run:
        codes = run.codes()
    assert codes == [128 + 15, 1], run.text
    assert (
        len(
            run.lines(
                "SIGTERM: the step ends, a checkpoint is saved if there is --save, then the run exits 0"
            )
        )
        == 1
    )
    assert len(run.lines("^error: SIGTERM again: this process ends at once")) == 1
    assert not list((tmp_path / "checkpoints").glob("iter_*"))


def test_a_run_ends_when_its_time_is_over(data, tmp_path):
    """It is counted from the start of the process, and a run that has not reached it goes on."""
    argv = [*runs.flags(data, tmp_path, 20), *SHORT, "--exit-duration-in-mins"]
    with Run([*argv, "59.5"], tmp_path, ranks=1, started=time.time() - 3600) as run:
        assert run.codes() == [0], run.text
    assert (
        len(run.lines("this run ends at iteration 1 of 20: --exit-duration-in-mins 59.5")) == 1
    )
    assert (tmp_path / "checkpoints/latest").exists()
    more = ["--load", str(tmp_path / "checkpoints"), "--exit-interval", "3"]
    with Run([*argv, "61", *more], tmp_path, ranks=1, started=time.time() - 3600) as run:
        assert run.codes() == [0], run.text
    assert [m["iteration"] for m in runs.metrics(tmp_path)] == [1, 2, 3]
