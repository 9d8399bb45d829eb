"""Killed runs lose only the steps since the last checkpoint."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch

from helpers import engines, killable, runs
from helpers.spawn import free_port
from helpers.waiting import wait_until
from megatron.checkpoint import directory
from megatron.checkpoint.manifest import check_files


def training_rows(out: Path) -> list[dict]:
    """The training rows of metrics.jsonl, without a last line that a kill cut short."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if row["kind"] == "train"]


def flags(data: str, out: Path, *more: str) -> list[str]:
    """Flags of a run that saves after every step."""
    return [
        *runs.flags(data, out, 2000, *runs.EP2),
        "--eval-iters",
        "0",
        "--save-interval",
        "1",
        "--keep-last",
        "3",
        *more,
    ]


def start_and_kill(argv: list[str], out: Path, delay: float) -> bool:
    """Kill all ranks `delay` seconds after their first step.

    Returns:
        whether a checkpoint was being written at that moment.
    """
    rows_before = len(training_rows(out))
    processes = killable.start(argv, 2, free_port(), str(out / "log"))

    def has_stepped() -> bool:
        assert all(p.is_alive() for p in processes), (out / "log").read_text()[-3000:]
        return len(training_rows(out)) > rows_before

    try:
        wait_until(has_stepped, "the first step", limit=300)
        time.sleep(delay)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    return bool(list((out / "checkpoints/checkpoint.partial").glob("iter_*")))


def newest(folder: Path) -> int:
    """Iteration of the newest checkpoint; all checkpoints must be valid."""
    valid, corrupt = directory.list_checkpoints(folder)
    assert not corrupt
    for entry in valid:
        check_files(entry.path, entry.manifest["files"], entry.manifest)
    return valid[0].manifest["iteration"] if valid else 0


def kill_repeatedly(data: str, out: Path, times: int) -> int:
    """Kill a run, resume it and check that it continued from the newest checkpoint.

    Returns:
        how many kills came while a checkpoint was being written.
    """
    rng = random.Random(times)
    inside_save = 0
    folder = out / "checkpoints"
    load = ["--load", str(folder), "--load-or-init"]
    for i in range(times):
        saved = newest(folder)
        rows_before = len(training_rows(out))
        more = ["--async-save"] if i % 2 else []
        argv = flags(data, out, *load, *more)
        inside_save += start_and_kill(argv, out, rng.uniform(0, 0.5))
        rows = training_rows(out)[rows_before:]
        assert rows[0]["iteration"] == saved + 1, "it resumes after the newest checkpoint"
        # Lost are at most the step that was being saved and the step being trained.
        assert newest(folder) >= rows[-1]["iteration"] - 2
    return inside_save


@pytest.mark.parametrize("times", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_run_equals_uninterrupted_run(times, data, tmp_path):
    """In every row of metrics of every life of the run, and in the state at the end."""
    inside_save = kill_repeatedly(data, tmp_path, times)
    assert times < 30 or inside_save >= 3, "too few kills inside a save to test them"
    last = newest(tmp_path / "checkpoints")
    reference = tmp_path / "reference"
    reference.mkdir()
    argv = flags(data, reference, "--exit-interval", str(last))
    processes = killable.start(argv, 2, free_port(), str(reference / "log"))
    for process in processes:
        process.join()
    log = (reference / "log").read_text()[-3000:]
    assert [process.exitcode for process in processes] == [0, 0], log
    expected = {row["iteration"]: row for row in training_rows(reference)}
    compared = [row for row in training_rows(tmp_path) if row["iteration"] <= last]
    for row in compared:
        for key in ("loss", "aux_loss", "lr", "grad_norm", "consumed_samples"):
            assert row[key] == expected[row["iteration"]][key], (row["iteration"], key)
    assert {row["iteration"] for row in compared} == set(range(1, last + 1))
    state = engines.full_tensors(tmp_path / "checkpoints")
    expected_state = engines.full_tensors(reference / "checkpoints")
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)
