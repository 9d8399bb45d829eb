"""Mutated checkpoints: every program loads one, or ends with one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import checkpoint_fuzzer, runs

NO_EVALUATION = ("--eval-iters", "0", "--split", "100,0,0", "--zero-stage", "1")


@pytest.fixture(scope="module")
def base(data, ranks1, tmp_path_factory) -> Path:
    """Return a directory of checkpoints after 1 and 2 iterations."""
    out = tmp_path_factory.mktemp("base")
    argv = [*runs.flags(data, out, 2), *NO_EVALUATION, "--save-interval", "1"]
    ranks1.run(runs.train, argv)
    return out / "checkpoints"


@pytest.fixture
def train_argv(data, tmp_path) -> list[str]:
    """Return flags of a run that ends when it has loaded its checkpoint."""
    return [*runs.flags(data, tmp_path, 2), *NO_EVALUATION, "--save=", "--metrics-file="]


@pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 520), marks=pytest.mark.slow)]
)
def test_mutated_checkpoints_end_in_one_line(seeds, base, train_argv, ranks1, tmp_path):
    (failures,) = ranks1.run(
        checkpoint_fuzzer.fuzz, base, tmp_path / "c", train_argv, seeds, timeout=3600
    )
    assert not failures, "\n\n".join(failures)


def test_unchanged_checkpoint_is_read_by_all(base, train_argv, ranks1):
    (outcomes,) = ranks1.run(checkpoint_fuzzer.run_programs, base, train_argv)
    assert [outcome.code for outcome in outcomes] == [0] * 4, outcomes
