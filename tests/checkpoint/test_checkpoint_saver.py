"""Saving from an engine: in the background, on a full disk, in a directory that is in use."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from helpers import engines
from megatron.checkpoint import directory
from megatron.checkpoint.shards import CheckpointReader


def config_of(folder: Path, **options):
    return engines.config_of(
        "topk", options.pop("ep_size", 1), options.pop("stage", 1), save=str(folder), **options
    )


def iterations(folder: Path) -> list[int]:
    return sorted(e.manifest["iteration"] for e in directory.list_checkpoints(folder)[0])


def _saves(config, number: int) -> list[str]:
    """Run on a rank: save after each step; return the message about the last save each time."""
    run = engines.Run(config)
    messages = [run.checkpoints.last_saved_message()]
    try:
        for _ in range(number):
            run.steps(1)
            run.checkpoints.save(run.progress)
            messages.append(run.checkpoints.last_saved_message())
        run.checkpoints.finish()
        return [*messages, run.checkpoints.last_saved_message()]
    finally:
        run.close()


@pytest.mark.parametrize("async_save", [False, True])
def test_saves_are_committed_and_old_ones_deleted(async_save, ranks2, tmp_path):
    config = config_of(tmp_path, keep_last=2, keep_every=2, async_save=async_save, ep_size=2)
    messages = ranks2.run(_saves, config, 5)[1]
    assert iterations(tmp_path) == [2, 4, 5]
    assert messages[0] == "no checkpoint was saved"
    assert messages[-1] == f"the last good checkpoint is {tmp_path}/iter_0000005"
    assert not list(tmp_path.glob("*.partial")), "the staging directory is gone"


def _slow_save(config):
    """Run on a rank: a save whose writing waits until three more steps are done.

    Returns weights and moments when the save began, weights at the end, and the content of the
    directory before the writing.
    """
    from megatron.checkpoint import saver

    may_write = threading.Event()
    original = saver.write_tensors
    saver.write_tensors = lambda *args: may_write.wait(60) and original(*args)
    run = engines.Run(config)
    try:
        run.steps(2)
        zero_shards = run.engine.zero_shards()
        shards = zero_shards.shards
        before = {s.name: s.weight.clone() for s in shards}
        moments = {s.name: zero_shards.get(s, "exp_avg").clone() for s in shards}
        run.checkpoints.save(run.progress)
        run.steps(3)
        names = os.listdir(config.checkpoint.save)
        may_write.set()
        run.checkpoints.finish()
        return before, moments, {s.name: s.weight.clone() for s in shards}, names
    finally:
        saver.write_tensors = original
        may_write.set()
        run.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_background_save_has_state_at_save(stage, ranks1, tmp_path):
    """Under ZeRO 3 in fp32 the optimizer's weights are the model's, which the next steps change."""
    ((before, moments, after, names),) = ranks1.run(
        _slow_save, config_of(tmp_path, async_save=True, stage=stage)
    )
    assert names == ["checkpoint.partial"], "nothing is committed before all is written"
    reader = CheckpointReader(tmp_path / "iter_0000002")
    for name, weight in before.items():
        assert not torch.equal(weight, after[name])
        assert torch.equal(reader.read("weight", name), weight), name
        assert torch.equal(reader.read("exp_avg", name), moments[name]), name


def _polls(config):
    """Run on a rank: steps until a checkpoint that was begun after the first is committed.

    Rank 1 writes slowly.
    """
    from megatron.checkpoint import saver

    run = engines.Run(config)
    write = saver.write_tensors
    saver.write_tensors = lambda *args: time.sleep(0.5 * run.groups.rank) or write(*args)
    try:
        run.steps(1)
        run.checkpoints.save(run.progress)
        while run.checkpoints.is_writing:
            run.steps(1)
        return engines.latest(config.checkpoint.save)
    finally:
        saver.write_tensors = write
        run.close()


def test_background_save_is_committed_between_steps(ranks2, tmp_path):
    assert ranks2.run(_polls, config_of(tmp_path, async_save=True)) == ["iter_0000001"] * 2


def _fails_once(config, failing_rank, error):
    """Run on a rank: three saves, of which the second fails on one rank."""
    from megatron.checkpoint import saver

    original = saver.write_tensors
    run = engines.Run(config)

    def failing(path, *args):
        result = original(path, *args)
        if "iter_0000002" in str(path) and run.groups.rank == failing_rank:
            raise error
        return result

    saver.write_tensors = failing
    try:
        for _ in range(3):
            run.steps(1)
            run.save()
            if run.groups.is_rank0:
                unfinished = Path(config.checkpoint.save, "checkpoint.partial").glob("iter_*")
                assert not list(unfinished), "an unfinished checkpoint is left"
        return run.checkpoints.failures, run.checkpoints.last_saved_message()
    finally:
        saver.write_tensors = original
        run.close()


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rank_file")


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_save_failing_on_one_rank(rank, async_save, ranks2, tmp_path):
    """Every rank has the error; old checkpoints stay; with `continue` the next save works."""
    config = config_of(tmp_path, async_save=async_save, on_save_error="continue", ep_size=2)
    answers = ranks2.run(_fails_once, config, rank, FULL_DISK)
    assert answers == [(1, f"the last good checkpoint is {tmp_path}/iter_0000003")] * 2
    assert iterations(tmp_path) == [1, 3]
    stop = config_of(tmp_path / "stop", async_save=async_save, ep_size=2)
    with pytest.raises(
        RuntimeError,
        match="No space left on device.*; the last good checkpoint is .*iter_0000001",
    ):
        ranks2.run(_fails_once, stop, rank, FULL_DISK)
    assert iterations(tmp_path / "stop") == [1]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
@pytest.mark.parametrize("async_save", [False, True])
def test_bug_in_writing_thread_is_raised(async_save, on_error, ranks1, tmp_path):
    """It is no failed save, after which a run may continue."""
    config = config_of(tmp_path, async_save=async_save, on_save_error=on_error)
    with pytest.raises(RuntimeError, match=r"in failing\n +raise error\nKeyError: 'x'\n$"):
        ranks1.run(_fails_once, config, 0, KeyError("x"))


def test_bug_on_one_rank_ends_the_others(ranks2, tmp_path):
    config = config_of(tmp_path, on_save_error="continue", ep_size=2)
    with pytest.raises(
        RuntimeError,
        match=r"RuntimeError: writing \S+ failed: KeyError\('x'\) on rank 1, which shows the trace",
    ):
        ranks2.run(_fails_once, config, 1, KeyError("x"))


def _save_in_unshared_directory(config):
    """Run on a rank: a save in a directory that rank 1 sees under another path."""
    from megatron.checkpoint import saver

    original = saver.broadcast_from_rank0

    def broadcast(ask, groups):
        return str(original(ask, groups)) + groups.rank * "x"

    saver.broadcast_from_rank0 = broadcast
    try:
        _saves(config, 1)
    finally:
        saver.broadcast_from_rank0 = original


def test_directory_that_one_node_lacks(ranks2, tmp_path):
    with pytest.raises(
        RuntimeError,
        match="which rank 0 made, does not exist on .*; allowed for --save: a directory",
    ):
        ranks2.run(_save_in_unshared_directory, config_of(tmp_path))
    assert not list(tmp_path.glob("iter_*"))


def _save_with_free_bytes(config, free):
    """Run on a rank: a save while the disk reports so many free bytes."""
    original = shutil.disk_usage
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 0, free)
    try:
        return _saves(config, 1)
    finally:
        shutil.disk_usage = original


def test_disk_space_is_checked_before_writing(ranks2, tmp_path):
    with pytest.raises(
        RuntimeError,
        match=r"iter_0000001 needs 0\.1 MB, but the disk of .* has 0\.0 MB free. Free "
        "some space, lower --keep-last, or save elsewhere; no checkpoint was saved",
    ):
        ranks2.run(_save_with_free_bytes, config_of(tmp_path), 10_000)
    assert not list(tmp_path.glob("iter_*"))
    ranks2.run(_save_with_free_bytes, config_of(tmp_path), 10_000_000)
    assert iterations(tmp_path) == [1]


def _second_run(config):
    run = engines.Run(config)
    try:
        engines.Run(config)
    finally:
        run.close()


def test_second_run_in_directory_is_refused(ranks1, tmp_path):
    with pytest.raises(
        RuntimeError, match="--save is .*, to which another run writes, process .*; wait"
    ):
        ranks1.run(_second_run, config_of(tmp_path))
    assert ranks1.run(_saves, config_of(tmp_path), 1), "the lock was released"


def test_leftovers_of_killed_run_are_removed(ranks1, tmp_path):
    unfinished = tmp_path / "checkpoint.partial/iter_0000003"
    deleted = tmp_path / ".iter_0000001.deleted"
    for folder in (unfinished, deleted):
        folder.mkdir(parents=True)
        (folder / "rank_00000.safetensors").write_bytes(b"half")
    (unfinished.parent / "lock").write_text("process 1 on nowhere")
    ranks1.run(_saves, config_of(tmp_path), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iter_0000001",
        "latest",
        "latest.json",
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_0_is_written_once_and_resumes_exactly(precision, ranks2, tmp_path):
    """Dense models only: every rank holds the full state, and rank 0 writes it."""
    config = engines.config_of("", 1, 0, precision, save=str(tmp_path))
    uninterrupted = ranks2.run(engines.train, config, 3, 3)
    shards = CheckpointReader(tmp_path / "iter_0000003")._shards
    assert {rank for ranges in shards.values() for rank, _, _ in ranges} == {0}
    resumed = ranks2.run(engines.train, engines.loading(config, tmp_path), 0, 3, 8)
    for a, b in zip(uninterrupted, resumed, strict=True):
        assert a[1] == b[1] and all(torch.equal(a[2][name], b[2][name]) for name in a[2])
    at_stage_3 = engines.loading(engines.config_of("", 1, 3, precision), tmp_path)
    elsewhere = ranks2.run(engines.train, at_stage_3, 0, 3, 8)
    tolerance = 1e-5 if precision == "fp32" else 0.05
    assert elsewhere[0][1] == pytest.approx(uninterrupted[0][1], abs=tolerance)


def _save_without_start(config, start):
    """Run on a rank: load a checkpoint, delete it, and save."""
    run = engines.Run(config)
    try:
        shutil.rmtree(start)
        run.steps(1)
        run.checkpoints.save(run.progress)
        return run.checkpoints.failures
    finally:
        run.close()


@pytest.mark.parametrize("has_origin", [False, True])
def test_deleted_start_does_not_end_run(has_origin, ranks1, tmp_path):
    """Only a start with the folder hf/ is needed again; without it the save has failed."""
    ranks1.run(_saves, config_of(tmp_path / "first"), 1)
    start = tmp_path / "first/iter_0000001"
    if has_origin:
        (start / "hf").mkdir()
    options = {"load": str(start), "finetune": True, "on_save_error": "continue"}
    config = config_of(tmp_path / "second", **options)
    assert ranks1.run(_save_without_start, config, start)[0] == int(has_origin)
    assert iterations(tmp_path / "second") == ([] if has_origin else [1])
