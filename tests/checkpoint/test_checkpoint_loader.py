"""Loading into an engine: damaged checkpoints, another step, fine-tuning, and refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import engines
from megatron import log
from megatron.checkpoint import directory, loader
from megatron.checkpoint.manifest import manifest_checksum, read_manifest
from megatron.checkpoint.shards import CheckpointReader
from megatron.config.checkpoint import CheckpointConfig
from megatron.io.sha256 import file_sha256
from megatron.parallel.groups import Groups


def config_of(folder: Path | str, ep_size: int = 1, **options):
    return engines.config_of("topk", ep_size, 1, save=str(folder), **options)


def with_checkpoint(config, **changes):
    """Return the config with other flags of the checkpoint section."""
    return replace(config, checkpoint=replace(config.checkpoint, **changes))


def with_train(config, **changes):
    """Return the config with other flags of the train section."""
    return replace(config, train=replace(config.train, **changes))


def _saves(config, number: int) -> None:
    """Run on a rank: save after each step."""
    run = engines.Run(config)
    try:
        for _ in range(number):
            run.steps(1)
            run.save()
    finally:
        run.close()


@pytest.fixture(scope="module")
def three(ranks2, tmp_path_factory):
    """Directory of checkpoints after 1, 2 and 3 steps."""
    folder = tmp_path_factory.mktemp("three")
    ranks2.run(_saves, config_of(folder, ep_size=2), 3)
    return folder


def _load(config):
    """Run on a rank: name and progress of the checkpoint that is loaded."""
    run = engines.Run(config)
    run.close()
    return run.source.path.name, run.progress.iteration


def _start(config):
    """Run on a rank: whether it starts from scratch, its iteration, optimizer steps, weights."""
    run = engines.Run(config)
    run.close()
    zero_shards = run.engine.zero_shards()
    weights = {s.name: s.weight.clone() for s in zero_shards.shards}
    return run.source is None, run.progress.iteration, zero_shards.steps, weights


# Damage


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
def test_damaged_checkpoint_is_named_and_passed_over(
    kind, name, three, ranks2, tmp_path, capsys
):
    folder = shutil.copytree(three, tmp_path / "c")
    damage(folder / "iter_0000003" / name, kind)
    config = engines.loading(config_of("", ep_size=2), folder)
    assert ranks2.run(_load, config) == [("iter_0000002", 2)] * 2
    log.setup()
    assert loader.find_checkpoint(config.checkpoint, Groups()).path.name == "iter_0000002"
    assert re.search(f"WARNING .*iter_0000003/{name} .*not used", capsys.readouterr().out)
    with pytest.raises(
        RuntimeError, match=f"of iteration 3, which --load-step .*iter_0000003/{name}"
    ):
        ranks2.run(_load, with_checkpoint(config, load_step=3))
    for iteration in (1, 2):
        damage(
            folder / directory.checkpoint_name(iteration) / "rank_00001.safetensors", "flipped"
        )
    with pytest.raises(
        RuntimeError,
        match="has no valid checkpoint: .*rank_00001.safetensors is corrupt.*Restore",
    ):
        ranks2.run(_load, config)


def test_bug_in_verification_is_no_damage(three, monkeypatch):
    """It would make every checkpoint corrupt, and the message would send the user to copies."""
    monkeypatch.setattr(loader, "check_files", lambda *args: {}["x"])
    with pytest.raises(KeyError, match="x"):
        loader.find_checkpoint(CheckpointConfig(load=str(three)), Groups())


def test_corrupt_checkpoints_are_remembered(three, tmp_path):
    """They do not count for --keep-last."""
    folder = shutil.copytree(three, tmp_path / "c")
    damage(folder / "iter_0000003/index.json", "flipped")
    loaded = loader.find_checkpoint(CheckpointConfig(load=str(folder)), Groups())
    assert loaded.corrupt == [folder / "iter_0000003"]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("state.json", lambda c: c.pop("optimizer"), "'optimizer' is missing"),
        ("state.json", lambda c: c.pop("topology"), "'topology' is missing"),
        ("index.json", lambda c: c.pop("kinds"), "'kinds' is missing"),
        ("index.json", lambda c: c.update(tensors=[]), "'tensors' is .*a valid dictionary"),
        (
            "index.json",
            lambda c: c["tensors"].pop("norm.weight"),
            r"does not fit the model: 'norm.weight' is missing in the checkpoint, but has shape ",
        ),
        (
            "index.json",
            lambda c: c["tensors"].update(other=c["tensors"]["norm.weight"]),
            "'other' has shape .* in the checkpoint, but does not exist in the model. If ",
        ),
        (
            "index.json",
            lambda c: c["tensors"]["norm.weight"].update(shape=[4, 4]),
            r"the model: 'norm.weight' has shape \(4, 4\) in the checkpoint, but has shape \(16",
        ),
        (
            "index.json",
            lambda c: c["tensors"]["norm.weight"]["pieces"].pop(),
            "no file has element .* of 'norm.weight'",
        ),
    ],
)
def test_malformed_files_are_refused(name, change, message, three, ranks1, tmp_path):
    """The manifest fits them: no accident, but another program or version."""
    path = shutil.copytree(three, tmp_path / "c") / "iter_0000003"
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))
    manifest = read_manifest(path)
    manifest["files"][name] = [(path / name).stat().st_size, file_sha256(path / name)]
    manifest["checksum"] = manifest_checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RuntimeError, match=f"(CorruptCheckpointError|ValueError): .*{message}"):
        ranks1.run(_load, engines.loading(config_of(""), path.parent))


# Which checkpoint


def test_branch_from_earlier_step_is_newest(three, ranks2, tmp_path):
    folder = shutil.copytree(three, tmp_path / "c")
    config = engines.loading(config_of("", ep_size=2), folder, folder)
    earlier = with_checkpoint(config, load_step=1)
    assert ranks2.run(_load, earlier) == [("iter_0000001", 1)] * 2
    ranks2.run(_saves, earlier, 1)
    assert ranks2.run(_load, config) == [("iter_0000002", 2)] * 2, (
        "not 3, which the new branch has not reached"
    )


def test_missing_checkpoint_needs_load_or_init(ranks2, tmp_path):
    config = engines.loading(config_of(""), tmp_path)
    with pytest.raises(RuntimeError, match="has no valid checkpoint. .* add --load-or-init"):
        ranks2.run(_start, config)
    answers = ranks2.run(_start, with_checkpoint(config, load_or_init=True))
    assert [a[:3] for a in answers] == [(True, 0, 0)] * 2


def test_load_or_init_refuses_corrupt_checkpoints(tmp_path):
    """Starting from scratch where a checkpoint was lost would silently waste a run."""
    broken = tmp_path / "iter_0000009"
    broken.mkdir()
    for load_or_init in (False, True):
        options = CheckpointConfig(load=str(tmp_path), load_or_init=load_or_init)
        with pytest.raises(
            FileNotFoundError,
            match="no valid checkpoint: .*0009/manifest.json is missing. Restore",
        ):
            loader.find_checkpoint(options, Groups())
    with pytest.raises(
        FileNotFoundError, match="missing. Restore its files from a copy, or point"
    ):
        loader.find_checkpoint(options, Groups(), required=True)
    shutil.rmtree(broken)
    options = CheckpointConfig(load=str(tmp_path), load_or_init=True)
    assert loader.find_checkpoint(options, Groups()) is None
    with pytest.raises(FileNotFoundError, match="no valid checkpoint of iteration 3"):
        loader.find_checkpoint(replace(options, load_step=3), Groups())


@pytest.mark.parametrize("load_or_init", [False, True])
def test_load_of_a_hugging_face_folder_names_init_from_hf(load_or_init, tmp_path):
    """--load-or-init must not start from scratch where the user gave weights."""
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    options = CheckpointConfig(load=str(tmp_path), load_or_init=load_or_init)
    with pytest.raises(FileNotFoundError, match="no valid checkpoint. .* as --init-from-hf"):
        loader.find_checkpoint(options, Groups())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_finetuning_loads_only_the_weights(precision, three, ranks1):
    """All bits of the fp32 weights are loaded, and nothing of the optimizer."""
    config = engines.loading(config_of("", precision=precision), three)
    optimizer = replace(config.optimizer, lr=0.5, lr_decay_style="linear")
    finetune = with_checkpoint(replace(config, optimizer=optimizer), finetune=True)
    ((from_scratch, iteration, steps, weights),) = ranks1.run(_start, finetune)
    assert (from_scratch, iteration, steps) == (False, 0, 0)
    saved = CheckpointReader(three / engines.latest(three))
    assert all(torch.equal(w, saved.read("weight", name)) for name, w in weights.items())
    other = replace(finetune, model=replace(finetune.model, hidden_size=32))
    with pytest.raises(
        RuntimeError, match="--hidden-size is 32 but checkpoint .* was made with 16"
    ):
        ranks1.run(_start, other)


def test_new_run_refuses_directory_of_another(three, ranks1, tmp_path):
    folder = shutil.copytree(three, tmp_path / "c")
    message = "--save is .*, which has iter_0000003; allowed: a directory without checkpoints"
    for config in (config_of(folder), engines.loading(config_of(""), three, folder)):
        with pytest.raises(RuntimeError, match=message):
            ranks1.run(_start, config)
    config = engines.loading(config_of(""), folder, folder)
    with pytest.raises(RuntimeError, match=message):
        ranks1.run(_start, with_checkpoint(config, finetune=True))
    assert ranks1.run(_start, config)[0][:2] == (False, 3)


def _count(config):
    """Run on a rank: counters of the engine after five more skipped steps, and a save."""
    run = engines.Run(config)
    run.engine.deepspeed.skipped_steps += 5
    if config.checkpoint.save:
        run.save()
    run.close()
    return run.engine.counters()


def test_counters_are_restored(ranks1, tmp_path):
    ranks1.run(_count, config_of(tmp_path))
    (counters,) = ranks1.run(_count, engines.loading(config_of(""), tmp_path))
    assert counters["skipped_steps"] == 10


def _step_after(config):
    """Run on a rank: iteration and counters after loading, and moments after one more step."""
    run = engines.Run(config)
    iteration = run.progress.iteration
    counters = run.engine.counters()
    run.steps(1)
    run.close()
    zero_shards = run.engine.zero_shards()
    moments = [
        (
            zero_shards.get(shard, "exp_avg").clone(),
            zero_shards.get(shard, "exp_avg_sq").clone(),
        )
        for shard in zero_shards.shards
    ]
    return iteration, counters, zero_shards.steps, moments


@pytest.mark.parametrize("stage", [1, 3])
def test_optimizer_may_start_from_scratch(stage, three, ranks1):
    """After one step from zero, the second moment is the square of the first but for factors."""
    config = engines.loading(config_of(""), three)
    config = replace(config, deepspeed=replace(config.deepspeed, zero_stage=stage))
    beta1 = config.optimizer.adam_beta1
    beta2 = config.optimizer.adam_beta2
    for load_optim in (True, False):
        options = with_checkpoint(config, load_optim=load_optim)
        ((iteration, counters, steps, moments),) = ranks1.run(_step_after, options)
        assert iteration == counters["global_steps"] == 3
        assert steps == (4 if load_optim else 1)
        from_zero = [
            torch.allclose((first / (1 - beta1)).square(), second / (1 - beta2), rtol=1e-3)
            for first, second in moments
        ]
        assert all(from_zero) == (not load_optim)


def _random_states(config):
    """Run on a rank: its random state after loading as a program does, and after seeding."""
    from megatron.initialize import restore_training_state
    from megatron.parallel import rng

    run = engines.Run(config)
    run.close()
    started = SimpleNamespace(config=config, groups=run.groups, checkpoint=run.source)
    restore_training_state(started, run.engine)
    rank_state = torch.get_rng_state()
    rng.seed_rank(config.train.seed, 0)
    return rank_state, torch.get_rng_state()


def test_random_states_may_start_from_seed(ranks1, tmp_path):
    ranks1.run(_saves, config_of(tmp_path), 1)
    saved = CheckpointReader(tmp_path / "iter_0000001").rng(0)["cpu"]
    config = engines.loading(config_of(""), tmp_path)
    ((state, seeded),) = ranks1.run(_random_states, config)
    assert torch.equal(state, saved) and not torch.equal(state, seeded)
    ((state, seeded),) = ranks1.run(_random_states, with_checkpoint(config, load_rng=False))
    assert torch.equal(state, seeded)


# Global batch and schedule


def _global_batch(config):
    """Run on a rank: the global batch that the run continues with."""
    from megatron.engine import distributed as parallel

    groups = parallel.init_distributed(1)
    loaded = loader.find_checkpoint(config.checkpoint, groups)
    return loaded.keep_global_batch(config, groups).train.global_batch_size


@pytest.mark.parametrize(
    "options, size",
    [
        ({}, engines.GLOBAL_BATCH),
        ({"global_batch_size": 8}, 8),
        ({"finetune": True}, 0),
        ({"micro_batch_size": 4}, 0),
    ],
)
def test_global_batch_is_kept_unless_set(options, size, three, ranks1):
    """0 means a micro-batch of each rank: 1 or 4 samples here; the checkpoint has 4."""
    config = engines.loading(config_of(""), three)
    options = {"global_batch_size": 0, **options}
    config = with_checkpoint(config, finetune=options.pop("finetune", False))
    config = with_train(config, **options)
    assert ranks1.run(_global_batch, config) == [size]


def ramping(config, consumed):
    """Return the checkpoint as if its run had a ramp-up from 2 samples to 4."""
    loaded = loader.find_checkpoint(config.checkpoint, Groups())
    saved = with_train(loaded.metadata.config, rampup_batch_size=(2, 2, 10))
    loaded.metadata = replace(loaded.metadata, config=saved)
    loaded.progress.consumed_samples = consumed
    return loaded


@pytest.mark.parametrize(
    "options, consumed, rampup",
    [
        ({}, 10, (2, 2, 10)),
        ({}, 11, ()),
        ({"micro_batch_size": 2}, 10, (2, 2, 10)),
        ({"micro_batch_size": 4}, 11, ()),
        ({"rampup_batch_size": (1, 1, 6)}, 10, (1, 1, 6)),
        ({"global_batch_size": 4}, 10, (2, 2, 10)),
        ({"global_batch_size": 4}, 11, ()),
        ({"global_batch_size": 4, "rampup_batch_size": (1, 1, 6)}, 10, (1, 1, 6)),
        ({"global_batch_size": 8}, 10, ()),
        ({"finetune": True}, 10, ()),
    ],
)
def test_rampup_is_kept_until_its_end(options, consumed, rampup, three):
    """The checkpoint has a global batch of 4 samples; a micro-batch is one sample or more."""
    config = engines.loading(config_of(""), three)
    config = with_checkpoint(config, finetune=options.pop("finetune", False))
    config = with_train(config, **{"global_batch_size": 0, **options})
    loaded = ramping(config, consumed)
    assert loaded.keep_global_batch(config, Groups()).train.rampup_batch_size == rampup


def test_dropped_rampup_is_logged(three, capsys):
    log.setup()
    config = with_train(engines.loading(config_of(""), three), global_batch_size=8)
    ramping(config, 11).keep_global_batch(config, Groups())
    assert "ramp-up" not in capsys.readouterr().out
    ramping(config, 10).keep_global_batch(config, Groups())
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(
        "the checkpoint's ramp-up, --rampup-batch-size 2 2 10, is dropped: "
        "--global-batch-size 8 replaces the checkpoint's 4"
    )


@pytest.mark.parametrize("global_batch_size", [0, 4])
def test_misfit_of_saved_rampup_is_refused(global_batch_size, three):
    """The message does not blame a flag that was not given."""
    config = engines.loading(config_of(""), three)
    config = with_train(config, global_batch_size=global_batch_size)
    loaded = ramping(config, 10)
    with pytest.raises(
        ValueError,
        match=r"^the unfinished ramp-up of the checkpoint is \[2, 2, 10\]; allowed: .* multiples "
        "of --micro-batch-size 1 x 4 ranks. Start another number of ranks, or set "
        "--rampup-batch-size, or a --global-batch-size other than 4, which drops the ramp-up",
    ):
        loaded.keep_global_batch(config, Groups(world_size=4))


def test_indivisible_global_batch_is_refused(three, ranks1):
    config = engines.loading(config_of(""), three)
    config = with_train(config, global_batch_size=0, micro_batch_size=3)
    with pytest.raises(
        RuntimeError,
        match="the global batch of the checkpoint is 4; allowed: a multiple of "
        "--micro-batch-size 3 x 1 ranks. Start another number of ranks, or set",
    ):
        ranks1.run(_global_batch, config)


def test_changed_schedule_needs_override(three, ranks1):
    config = engines.loading(config_of(""), three)
    other = replace(config, optimizer=replace(config.optimizer, lr=0.01))
    with pytest.raises(
        RuntimeError, match="--lr is 0.01 .* made with 0.02; .*--override-lr-schedule"
    ):
        ranks1.run(_load, other)
    ((_, iteration),) = ranks1.run(_load, with_checkpoint(other, override_lr_schedule=True))
    assert iteration == 3
