"""Data of a run: how they are described, and what changed data mean for a run that resumes."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from helpers.spawn import groups_for
from megatron import log
from megatron.checkpoint import metadata as metadata_module
from megatron.checkpoint.compatibility import warn_of_changes
from megatron.checkpoint.metadata import RunMetadata, describe_data
from megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from megatron.parallel.groups import Groups

IDENTITY = {"tokenizer_name": "a", "tokenizer_vocab_size": 10, "tokenizer_fingerprint": "f"}


def test_changed_order_of_samples_is_logged(capsys):
    log.setup()
    saved = RunMetadata(
        RunConfig(), IDENTITY, global_batch_size=8, data={"a": {"bin_bytes": 1}}
    )
    warn_of_changes(saved, replace(saved, config=RunConfig(optimizer=OptimizerConfig(lr=1.0))))
    assert capsys.readouterr().out == ""
    warn_of_changes(
        saved, replace(saved, config=RunConfig(train=TrainConfig(train_iters=7, seed=2)))
    )
    assert "--seed differ(s) from the checkpoint's" in capsys.readouterr().out
    warn_of_changes(saved, replace(saved, data={"a": {"bin_bytes": 2}, "b": {}}))
    assert " the files of a differ(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "data, follows",
    [
        ({}, True),
        ({"dataloader_type": "cyclic"}, False),
        ({"streaming_data_path": ("text.jsonl",)}, False),
        ({"mock_data": True}, False),
    ],
)
def test_order_follows_number_of_samples(data, follows, capsys):
    """It follows neither the batch nor the number of iterations."""
    log.setup()
    model = ModelConfig(vocab_size=100)  # which mock data need
    config = RunConfig(data=DataConfig(**data), model=model)
    old = RunMetadata(config, IDENTITY, global_batch_size=8, iterations=100)
    warn_of_changes(old, replace(old, global_batch_size=4, iterations=200, samples=800))
    out = capsys.readouterr().out
    assert "a global batch of 4 samples; the checkpoint was made with 8" in out
    assert "differ(s)" not in out
    warn_of_changes(old, replace(old, samples=801))
    expected = "the number of samples of the run (801 instead of 800) differ(s)"
    assert (expected in capsys.readouterr().out) == follows


def saving(config: RunConfig) -> RunConfig:
    """Return the configuration with --save, without which data are not described."""
    return replace(config, checkpoint=CheckpointConfig(save="checkpoints"))


def data_run(folder: Path, name: str, words: tuple[str, ...]) -> RunMetadata:
    """Return the metadata of a run whose flag `name` has files in a folder."""
    words = tuple(str(folder / word) if word in ("a", "b") else word for word in words)
    config = RunConfig(data=DataConfig(**{name: words}))
    return RunMetadata(config, IDENTITY, data=describe_data(saving(config), Groups()))


@pytest.fixture
def two_folders(tmp_path) -> tuple[Path, Path]:
    """Return two folders with equal files: a.bin, a.idx, a, b.bin, b.idx and b."""
    folders = tmp_path / "old", tmp_path / "new"
    for folder in folders:
        folder.mkdir()
        for name in ("a", "b"):
            for suffix in (".bin", ".idx", ""):
                (folder / f"{name}{suffix}").write_text(f"{name}{suffix}")
    return folders


@pytest.mark.parametrize("name", ["data_path", "train_data_path", "streaming_data_path"])
@pytest.mark.parametrize("words", [("a",), ("0.25", "a", "0.75", "b")])
def test_moved_data_have_same_order(name, words, two_folders, capsys):
    """The content is compared: a warning about each moved folder would hide the true ones."""
    log.setup()
    old, new = two_folders
    saved = data_run(old, name, words)
    warn_of_changes(saved, data_run(new, name, words))
    assert capsys.readouterr().out == ""
    flag = "--" + name.replace("_", "-")
    for suffix in (".bin", ".idx", ""):
        content = (new / f"a{suffix}").read_text()
        (new / f"a{suffix}").write_text(content.upper())
        warn_of_changes(saved, data_run(new, name, words))
        is_part = (suffix == "") == (name == "streaming_data_path")
        assert (f"{flag} differ(s)" in capsys.readouterr().out) == is_part
        (new / f"a{suffix}").write_text(content)


EVAL_FLAGS = {
    "--valid-data-path": "valid_data_path",
    "--test-data-path": "test_data_path",
    "--valid-sets x=": "valid_sets",
}


def evaluating_run(folder: Path, field: str, prefix: str) -> RunMetadata:
    """Return the metadata of a run that trains on b, and evaluates another dataset."""
    word = str(folder / prefix)
    if field == "valid_sets":
        word = f"x={word}"
    data = DataConfig(train_data_path=(str(folder / "b"),), **{field: (word,)})
    config = RunConfig(data=data)
    return RunMetadata(config, IDENTITY, data=describe_data(saving(config), Groups()))


@pytest.mark.parametrize("flag, field", EVAL_FLAGS.items())
def test_changed_evaluation_data_keep_the_order(flag, field, two_folders, capsys):
    """Moved files change nothing; others change the figures, but not what is trained on."""
    log.setup()
    old, new = two_folders
    saved = evaluating_run(old, field, "a")
    warn_of_changes(saved, saved)
    warn_of_changes(saved, evaluating_run(new, field, "a"))
    assert capsys.readouterr().out == ""
    (old / "a.bin").write_text("A.BIN")
    warn_of_changes(saved, evaluating_run(old, field, "a"))
    out = capsys.readouterr().out
    assert f"the files of {old}/a differ(s) from the checkpoint's: evaluation figures" in out
    assert "order of samples" not in out
    warn_of_changes(saved, evaluating_run(old, field, "b"))
    out = capsys.readouterr().out
    assert f"{flag} differ(s) from the checkpoint's: evaluation figures" in out
    assert "order of samples" not in out


def test_evaluated_training_data_matter_for_order(two_folders, capsys):
    log.setup()
    old, _ = two_folders
    saved = evaluating_run(old, "valid_data_path", "b")
    (old / "b.bin").write_text("B.BIN")
    warn_of_changes(saved, evaluating_run(old, "valid_data_path", "b"))
    out = capsys.readouterr().out
    assert f"the files of {old}/b differ(s)" in out and "the order of samples changes" in out


def test_data_are_not_read_without_checkpoints(two_folders, monkeypatch):
    monkeypatch.setattr(metadata_module, "content_id", lambda paths: pytest.fail("read"))
    config = RunConfig(data=DataConfig(data_path=(str(two_folders[0] / "a"),)))
    assert describe_data(config, Groups()) == {}


def _describe(folder: str, fault: str) -> tuple[str | dict, int]:
    """On a rank: describe data slowly; return the result or error, and the files read here."""
    read = []

    def slow(paths) -> str:
        read.append(paths)
        threading.Event().wait(3.0)
        if fault:
            raise PermissionError(fault)
        return "id"

    original = metadata_module.content_id
    metadata_module.content_id = slow
    config = RunConfig(data=DataConfig(data_path=(f"{folder}/a",)))
    default = timedelta(seconds=60)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    try:
        return describe_data(saving(config), groups_for(1)), len(read)
    except OSError as error:
        return str(error), len(read)
    finally:
        metadata_module.content_id = original
        dist.distributed_c10d._set_pg_timeout(default, dist.group.WORLD)


@pytest.mark.parametrize("fault", ["", "no access"])
def test_rank0_alone_describes_data(ranks2, two_folders, fault):
    """It takes longer than a collective may; an error of rank 0 is raised on all ranks."""
    folder = str(two_folders[0])
    answers = ranks2.run(_describe, folder, fault)
    expected = fault or {f"{folder}/a": {"bin_bytes": 5, "idx_bytes": 5, "content_id": "id"}}
    assert answers == [(expected, 1), (expected, 0)]


def test_order_of_moved_data_matters(two_folders, capsys):
    log.setup()
    old, new = two_folders
    saved = data_run(old, "data_path", ("0.25", "a", "0.75", "b"))
    for words in (("0.5", "a", "0.5", "b"), ("0.75", "b", "0.25", "a"), ("a", "b")):
        warn_of_changes(saved, data_run(new, "data_path", words))
        assert "--data-path differ(s)" in capsys.readouterr().out


def test_changed_content_of_same_size_is_logged(two_folders, capsys):
    log.setup()
    old, _ = two_folders
    saved = data_run(old, "data_path", ("a",))
    (old / "a.bin").write_text("A.BIN")
    warn_of_changes(saved, data_run(old, "data_path", ("a",)))
    assert f" the files of {old}/a differ(s)" in capsys.readouterr().out


def test_growing_stream_keeps_its_order(two_folders, capsys):
    log.setup()
    old, _ = two_folders
    saved = data_run(old, "streaming_data_path", ("a",))
    (old / "a").write_text("a and more")
    warn_of_changes(saved, data_run(old, "streaming_data_path", ("a",)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content_id", [{}, {"content_id": ""}, {"content_id": "0" * 32}])
def test_unknown_content_is_compared_by_path(content_id, two_folders, capsys):
    """Format version 1 stored sizes only; another method of identities is like none."""
    log.setup()
    old, new = two_folders
    current = data_run(old, "data_path", ("a",))
    saved = replace(current, data={f"{old}/a": {"bin_bytes": 5, "idx_bytes": 5, **content_id}})
    warn_of_changes(saved, current)
    assert capsys.readouterr().out == ""
    warn_of_changes(saved, data_run(new, "data_path", ("a",)))
    assert "--data-path differ(s)" in capsys.readouterr().out
