"""Saving from an engine: beside the training, on a full disk, in a folder that another run has, damaged afterwards."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import engines
from megatron import log
from megatron.checkpoint import directory, loader
from megatron.checkpoint.reader import CheckpointReader
from megatron.io import sha256
from megatron.parallel.groups import Groups


def config_of(folder: Path, **options):
    return engines.config_of(
        "topk", options.pop("ep_size", 1), options.pop("stage", 1), save=str(folder), **options
    )


def iterations(folder: Path) -> list[int]:
    return sorted(m["iteration"] for _, m in directory.list_checkpoints(folder)[0])


def _saves(config, number: int) -> list[str]:
    """In a rank: a save after each step; what the run says of its last good checkpoint then."""
    run = engines.Run(config)
    said = [run.checkpoints.last_saved_message()]
    try:
        for _ in range(number):
            run.steps(1)
            run.checkpoints.save(run.progress)
            said.append(run.checkpoints.last_saved_message())
        run.checkpoints.finish()
        return [*said, run.checkpoints.last_saved_message()]
    finally:
        run.close()


@pytest.mark.parametrize("async_save", [False, True])
def test_saves_and_retention(async_save, ranks2, tmp_path):
    config = config_of(tmp_path, keep_last=2, keep_every=2, async_save=async_save, ep_size=2)
    said = ranks2.run(_saves, config, 5)[1]
    assert iterations(tmp_path) == [2, 4, 5]
    assert said[0] == "no checkpoint was saved"
    assert said[-1] == f"the last good checkpoint is {tmp_path}/iter_0000005"
    assert not list(tmp_path.glob("*.partial")), "the work folder is gone"


def _slow_save(config):
    """In a rank: weights when the save began, weights now, and whether anything was published meanwhile; the writing
    waits until three more steps are done."""
    import threading

    from megatron.checkpoint import saver

    gate, original = threading.Event(), saver.write_tensors
    saver.write_tensors = lambda *args: gate.wait(60) and original(*args)
    run = engines.Run(config)
    try:
        run.steps(2)
        parts = run.engine.partitions()
        before = {p.name: p.weight.clone() for p in parts.pieces}
        moments = {p.name: parts.moment(p, "exp_avg").clone() for p in parts.pieces}
        run.checkpoints.save(run.progress)
        run.steps(3)
        there = os.listdir(config.checkpoint.save)
        gate.set()
        run.checkpoints.finish()
        return before, moments, {p.name: p.weight.clone() for p in parts.pieces}, there
    finally:
        saver.write_tensors = original
        gate.set()
        run.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_what_is_written_beside_the_training_is_the_state_at_the_save(stage, ranks1, tmp_path):
    """Under ZeRO 3 in fp32 the optimizer's weights are the model's own, which the next steps change."""
    ((before, moments, after, there),) = ranks1.run(
        _slow_save, config_of(tmp_path, async_save=True, stage=stage)
    )
    assert there == ["checkpoint.partial"], "nothing may be published before all is written"
    shards = CheckpointReader(tmp_path / "iter_0000002")
    for name, weight in before.items():
        assert not torch.equal(weight, after[name])
        assert torch.equal(shards.read("weight", name), weight), name
        assert torch.equal(shards.read("exp_avg", name), moments[name]), name


def _polls(config):
    """In a rank: steps until the checkpoint that was begun after the first is published. Rank 1 writes slowly."""
    from megatron.checkpoint import saver

    run, write = engines.Run(config), saver.write_tensors
    saver.write_tensors = lambda *args: time.sleep(0.5 * run.groups.rank) or write(*args)
    try:
        run.steps(1)
        run.checkpoints.save(run.progress)
        while run.checkpoints.writing:
            run.steps(1)
        return engines.latest(config.checkpoint.save)
    finally:
        saver.write_tensors = write
        run.close()


def test_a_finished_write_is_published_between_steps(ranks2, tmp_path):
    assert ranks2.run(_polls, config_of(tmp_path, async_save=True)) == ["iter_0000001"] * 2


def _fails_once(config, rank, when):
    """In a rank: three saves, of which the second fails on one rank."""
    from megatron.checkpoint import saver

    original, run = saver.write_tensors, engines.Run(config)

    def full(path, *args):
        if "iter_0000002" in str(path) and run.groups.rank == rank:
            original(path, *args)
            raise (
                OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                if when == "disk"
                else KeyError("x")
            )
        return original(path, *args)

    saver.write_tensors = full
    try:
        for _ in range(3):
            run.steps(1)
            run.save()
            if run.groups.is_rank0:
                assert not list(
                    Path(config.checkpoint.save, "checkpoint.partial").glob("iter_*")
                ), "half of one is left"
        return run.checkpoints.failures, run.checkpoints.last_saved_message()
    finally:
        saver.write_tensors = original
        run.close()


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_on_one_rank(rank, async_save, ranks2, tmp_path):
    """Every rank hears of it; the old checkpoint stays; with `continue` the next save works."""
    config = config_of(tmp_path, async_save=async_save, on_save_error="continue", ep_size=2)
    answers = ranks2.run(_fails_once, config, rank, "disk")
    assert answers == [(1, f"the last good checkpoint is {tmp_path}/iter_0000003")] * 2
    assert iterations(tmp_path) == [1, 3]
    stop = config_of(tmp_path / "stop", async_save=async_save, ep_size=2)
    with pytest.raises(
        RuntimeError,
        match="No space left on device.*; the last good checkpoint is .*iter_0000001",
    ):
        ranks2.run(_fails_once, stop, rank, "disk")
    assert iterations(tmp_path / "stop") == [1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_writing_thread_is_not_swallowed(ranks1, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"writing .*rank_00000.safetensors failed: KeyError\('x'\)"
    ):
        ranks1.run(_fails_once, config_of(tmp_path, async_save=True), 0, "bug")


def _unshared(config):
    """In a rank: a save into a folder that rank 1 has elsewhere."""
    from megatron.checkpoint import saver

    original = saver.from_first
    saver.from_first = lambda ask, groups: str(original(ask, groups)) + groups.rank * "x"
    try:
        _saves(config, 1)
    finally:
        saver.from_first = original


def test_a_folder_that_only_one_node_sees(ranks2, tmp_path):
    with pytest.raises(
        RuntimeError,
        match="which rank 0 made, is not there on .*; allowed for --save: a folder",
    ):
        ranks2.run(_unshared, config_of(tmp_path))
    assert not list(tmp_path.glob("iter_*"))


def _with_little_room(config, free):
    usage, shutil.disk_usage = (
        shutil.disk_usage,
        lambda path: shutil._ntuple_diskusage(10**9, 0, free),
    )
    try:
        return _saves(config, 1)
    finally:
        shutil.disk_usage = usage


def test_room_is_looked_for_before_anything_is_written(ranks2, tmp_path):
    with pytest.raises(
        RuntimeError,
        match=r"checkpoint of iteration 1 takes 0\.1 MB, but .* has 0\.0 MB free. Free "
        "some space, lower --keep-last, or save elsewhere; no checkpoint was saved",
    ):
        ranks2.run(_with_little_room, config_of(tmp_path), 10_000)
    assert not list(tmp_path.glob("iter_*"))
    ranks2.run(_with_little_room, config_of(tmp_path), 10_000_000)
    assert iterations(tmp_path) == [1]


def _second_run(config):
    run = engines.Run(config)
    try:
        engines.Run(config)
    finally:
        run.close()


def test_two_runs_in_one_folder(ranks1, tmp_path):
    with pytest.raises(
        RuntimeError, match="--save is .*, to which another run writes, process .*; wait"
    ):
        ranks1.run(_second_run, config_of(tmp_path))
    assert ranks1.run(_saves, config_of(tmp_path), 1), "it was released"


def test_what_a_killed_run_left_is_removed(ranks1, tmp_path):
    half, doomed = (
        tmp_path / "checkpoint.partial/iter_0000003",
        tmp_path / ".iter_0000001.deleted",
    )
    for folder in (half, doomed):
        folder.mkdir(parents=True)
        (folder / "rank_00000.safetensors").write_bytes(b"half")
    (half.parent / "lock").write_text("process 1 on nowhere")
    ranks1.run(_saves, config_of(tmp_path), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", "latest"]


@pytest.fixture(scope="module")
def three(ranks2, tmp_path_factory):
    """Folder of checkpoints after 1, 2 and 3 steps."""
    folder = tmp_path_factory.mktemp("three")
    ranks2.run(_saves, config_of(folder, ep_size=2), 3)
    return folder


def _load(config):
    run = engines.Run(config)
    run.close()
    return run.source.path.name, run.progress.iteration


def damage(path: Path, kind: str) -> None:
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        os.truncate(path, path.stat().st_size - 100)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize(
    "name",
    [
        "rank_00000.safetensors",
        "rank_00001.safetensors",
        "state.json",
        "manifest.json",
        "index.json",
        "run.json",
    ],
)
def test_damage_is_named_and_the_one_before_is_used(
    kind, name, three, ranks2, tmp_path, capsys
):
    folder = shutil.copytree(three, tmp_path / "c")
    damage(folder / "iter_0000003" / name, kind)
    config = engines.loading(config_of("", ep_size=2), folder)
    assert ranks2.run(_load, config) == [("iter_0000002", 2)] * 2
    log.setup()
    assert loader.find_checkpoint(config.checkpoint, Groups()).path.name == "iter_0000002"
    assert re.search(
        f"WARNING .*iter_0000003/{name} .*(falling back|not used)", capsys.readouterr().out
    )
    with pytest.raises(RuntimeError, match=f"--load-step is 3.*iter_0000003/{name}"):
        ranks2.run(_load, replace(config, checkpoint=replace(config.checkpoint, load_step=3)))
    for iteration in (1, 2):
        damage(
            folder / directory.checkpoint_name(iteration) / "rank_00001.safetensors", "flipped"
        )
    with pytest.raises(
        RuntimeError,
        match="no checkpoint is whole: .*rank_00001.safetensors is damaged.*Restore",
    ):
        ranks2.run(_load, config)


def test_an_earlier_step_can_be_chosen_and_the_branch_after_it_is_the_newest(
    three, ranks2, tmp_path
):
    folder = shutil.copytree(three, tmp_path / "c")
    config = engines.loading(config_of("", ep_size=2), folder, folder)
    earlier = replace(config, checkpoint=replace(config.checkpoint, load_step=1))
    assert ranks2.run(_load, earlier) == [("iter_0000001", 1)] * 2
    ranks2.run(_saves, earlier, 1)
    assert ranks2.run(_load, config) == [("iter_0000002", 2)] * 2, (
        "not 3, which the new branch has not reached"
    )


def _start(config):
    run = engines.Run(config)
    run.close()
    weights = {p.name: p.weight.clone() for p in run.engine.partitions().pieces}
    return run.source is None, run.progress.iteration, run.engine.partitions().steps, weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_finetuning_takes_the_weights_only(precision, three, ranks1):
    """And all of their bits: the fp32 copies, too."""
    config = engines.loading(config_of("", precision=precision), three)
    finetune = replace(
        config,
        checkpoint=replace(config.checkpoint, finetune=True),
        optimizer=replace(config.optimizer, lr=0.5, lr_decay_style="linear"),
    )
    ((none, iteration, steps, weights),) = ranks1.run(_start, finetune)
    assert (none, iteration, steps) == (False, 0, 0)
    saved = CheckpointReader(three / engines.latest(three))
    assert all(torch.equal(w, saved.read("weight", name)) for name, w in weights.items())
    other = replace(finetune, model=replace(finetune.model, hidden_size=32))
    with pytest.raises(
        RuntimeError, match="--hidden-size is 32 but checkpoint .* was made with 16"
    ):
        ranks1.run(_start, other)


def test_a_run_that_begins_does_not_write_among_anothers_checkpoints(three, ranks1, tmp_path):
    folder = shutil.copytree(three, tmp_path / "c")
    message = "--save is .*, which has iter_0000003; allowed: a folder without checkpoints, or the one"
    for config in (config_of(folder), engines.loading(config_of(""), three, folder)):
        with pytest.raises(RuntimeError, match=message):
            ranks1.run(_start, config)
    config = engines.loading(config_of(""), folder, folder)
    with pytest.raises(RuntimeError, match=message):
        ranks1.run(
            _start, replace(config, checkpoint=replace(config.checkpoint, finetune=True))
        )
    assert ranks1.run(_start, config)[0][:2] == (False, 3)


def _count(config):
    run = engines.Run(config)
    run.engine.deepspeed.skipped_steps += 5
    if config.checkpoint.save:
        run.save()
    run.close()
    return run.engine.counters()


def test_counters_go_on(ranks1, tmp_path):
    ranks1.run(_count, config_of(tmp_path))
    assert (
        ranks1.run(_count, engines.loading(config_of(""), tmp_path))[0]["skipped_steps"] == 10
    )


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("state.json", lambda c: c.pop("optimizer"), "KeyError"),
        ("state.json", lambda c: c.pop("topology"), "KeyError"),
        ("index.json", lambda c: c.pop("kinds"), "KeyError"),
        ("index.json", lambda c: c.update(tensors=[]), "'list' object"),
        (
            "index.json",
            lambda c: c["tensors"].pop("norm.weight"),
            "does not fit the model: .*norm.weight",
        ),
        (
            "index.json",
            lambda c: c["tensors"]["norm.weight"].update(shape=[4, 4]),
            "does not fit the model: .*norm.weight",
        ),
        (
            "index.json",
            lambda c: c["tensors"]["norm.weight"]["pieces"].pop(),
            "no file has element .* of norm.weight",
        ),
    ],
)
def test_files_that_somebody_made_up(name, change, message, three, ranks1, tmp_path):
    """The manifest fits them: no accident, but another program or version."""
    path = shutil.copytree(three, tmp_path / "c") / "iter_0000003"
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))
    manifest = directory.read_manifest(path)
    manifest["files"][name] = [(path / name).stat().st_size, sha256.file_sha256(path / name)]
    (path / "manifest.json").write_text(
        json.dumps({**manifest, "checksum": directory._checksum(manifest)})
    )
    with pytest.raises(RuntimeError, match=f"(Broken|ValueError): .*{message}"):
        ranks1.run(_load, engines.loading(config_of(""), path.parent))


def test_nothing_there_with_load_or_init(ranks2, tmp_path):
    config = engines.loading(config_of(""), tmp_path)
    with pytest.raises(RuntimeError, match="holds no checkpoint"):
        ranks2.run(_start, config)
    answers = ranks2.run(
        _start, replace(config, checkpoint=replace(config.checkpoint, load_or_init=True))
    )
    assert [a[:3] for a in answers] == [(True, 0, 0)] * 2


def _adopted(config):
    from megatron.engine import distributed as parallel

    groups = parallel.init_distributed(1)
    return (
        loader.find_checkpoint(config.checkpoint, groups)
        .adopt(config, groups)
        .train.global_batch_size
    )


@pytest.mark.parametrize(
    "options, size",
    [
        ({}, engines.GLOBAL_BATCH),
        ({"global_batch_size": 8}, 8),
        ({"finetune": True}, 0),
        ({"micro_batch_size": 4}, 0),
    ],
)
def test_the_global_batch_is_kept_unless_it_is_set(options, size, three, ranks1):
    """0 is a micro-batch of each rank: of one rank 1 or 4, where four samples were trained on at once."""
    config = engines.loading(config_of(""), three)
    options = {"global_batch_size": 0, **options}
    finetune = options.pop("finetune", False)
    config = replace(
        config,
        train=replace(config.train, **options),
        checkpoint=replace(config.checkpoint, finetune=finetune),
    )
    assert ranks1.run(_adopted, config) == [size]


def test_a_global_batch_that_does_not_divide(three, ranks1):
    config = engines.loading(config_of(""), three)
    config = replace(
        config, train=replace(config.train, global_batch_size=0, micro_batch_size=3)
    )
    with pytest.raises(
        RuntimeError,
        match="the global batch of the checkpoint is 4; allowed: a multiple of "
        "--micro-batch-size 3 x 1 ranks. Start another number of ranks, or set",
    ):
        ranks1.run(_adopted, config)


def test_another_schedule_needs_a_word(three, ranks1):
    config = engines.loading(config_of(""), three)
    other = replace(config, optimizer=replace(config.optimizer, lr=0.01))
    with pytest.raises(
        RuntimeError, match="--lr is 0.01 .* made with 0.02; .*--override-lr-schedule"
    ):
        ranks1.run(_load, other)
    assert (
        ranks1.run(
            _load,
            replace(other, checkpoint=replace(other.checkpoint, override_lr_schedule=True)),
        )[0][1]
        == 3
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_0_is_written_once_and_goes_on_exactly(precision, ranks2, tmp_path):
    """Dense models only. Every rank has everything; rank 0 writes it."""
    config = engines.config_of("", 1, 0, precision, save=str(tmp_path))
    went_on = ranks2.run(engines.train, config, 3, 3)
    index = CheckpointReader(tmp_path / "iter_0000003")._pieces
    assert {piece[0] for pieces in index.values() for piece in pieces} == {0}
    resumed = ranks2.run(engines.train, engines.loading(config, tmp_path), 0, 3, 8)
    for a, b in zip(went_on, resumed, strict=True):
        assert a[1] == b[1] and all(torch.equal(a[2][name], b[2][name]) for name in a[2])
    elsewhere = ranks2.run(
        engines.train,
        engines.loading(engines.config_of("", 1, 3, precision), tmp_path),
        0,
        3,
        8,
    )
    assert elsewhere[0][1] == pytest.approx(
        went_on[0][1], abs=1e-5 if precision == "fp32" else 0.05
    )
