"""Runs that are killed at random moments, also inside a save, lose nothing but the steps since the last checkpoint."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch

from helpers import engines, killable, runs
from helpers.spawn import free_port
from megatron.checkpoint import directory


def lines(out: Path) -> list[dict]:
    """The training lines that are whole: a killed run may leave half of one."""
    found = []
    if (out / "metrics.jsonl").exists():
        for line in (out / "metrics.jsonl").read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found.append(record)
    return [record for record in found if record["kind"] == "train"]


def flags(data: str, out: Path, *more: str) -> list[str]:
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
    """Kill all ranks so many seconds after their first step; returns whether a checkpoint was being written then."""
    seen = len(lines(out))
    processes = killable.start(argv, 2, free_port(), str(out / "log"))
    try:
        while len(lines(out)) == seen:
            assert all(p.is_alive() for p in processes), (out / "log").read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(delay)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    return bool(list((out / "checkpoints/checkpoint.partial").glob("iter_*")))


def newest(folder: Path) -> int:
    """Iteration of the newest checkpoint; every one that has its name must be whole."""
    good, bad = directory.list_checkpoints(folder)
    assert not bad
    for path, manifest in good:
        directory.check_files(path, manifest["files"], manifest)
    return good[0][1]["iteration"] if good else 0


def kill_again_and_again(data: str, out: Path, times: int) -> int:
    """Check every resume; returns how many kills came inside a save."""
    choose, inside = random.Random(times), 0
    folder = out / "checkpoints"
    load = ["--load", str(folder), "--load-or-init"]
    for i in range(times):
        before, seen = newest(folder), len(lines(out))
        more = ["--async-save"] if i % 2 else []
        inside += start_and_kill(flags(data, out, *load, *more), out, choose.uniform(0, 0.5))
        new = lines(out)[seen:]
        assert new[0]["iteration"] == before + 1, "it goes on right after the newest checkpoint"
        assert newest(folder) >= new[-1]["iteration"] - 2, (
            "no more is lost than what was being saved and trained"
        )
    return inside


@pytest.mark.parametrize("times", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_again_and_again(times, data, tmp_path):
    """Every line of every life is that of a run that was never killed, and so is the state at the end."""
    inside = kill_again_and_again(data, tmp_path, times)
    assert times < 30 or inside >= 3, "too few kills inside a save to say something about them"
    last = newest(tmp_path / "checkpoints")
    whole = tmp_path / "whole"
    whole.mkdir()
    processes = killable.start(
        flags(data, whole, "--exit-interval", str(last)), 2, free_port(), str(whole / "log")
    )
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0], (whole / "log").read_text()[-3000:]
    expected = {record["iteration"]: record for record in lines(whole)}
    compared = [record for record in lines(tmp_path) if record["iteration"] <= last]
    for record in compared:
        for key in ("loss", "aux_loss", "lr", "grad_norm", "consumed_samples"):
            assert record[key] == expected[record["iteration"]][key], (record["iteration"], key)
    assert {record["iteration"] for record in compared} == set(range(1, last + 1))
    a, b = engines.full_tensors(tmp_path / "checkpoints"), engines.full_tensors(whole / "checkpoints")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
