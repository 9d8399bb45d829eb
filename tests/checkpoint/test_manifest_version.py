"""Checkpoints whose manifest has a version that this program cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import checkpoint_fuzzer, handmade
from megatron.checkpoint import directory
from megatron.checkpoint.content import read_shard_index, read_state
from megatron.checkpoint.directory import (
    find_newest_valid,
    list_checkpoints,
    read_entry,
    select_checkpoints,
)
from megatron.checkpoint.inspect import summarize_directory
from megatron.checkpoint.manifest import CorruptCheckpointError, find_problems
from megatron.config.format_version import FORMAT_VERSION, NewerVersionError

NEWER = FORMAT_VERSION + 1


def make(folder: Path, iteration: int) -> Path:
    """Commit a checkpoint of an iteration."""
    return handmade.checkpoint(folder, handmade.weights(a=(6,)), 1, iteration=iteration)


def change_manifest(path: Path, **values) -> None:
    """Change values of a checkpoint's manifest, whose checksum stays right."""
    file = path / "manifest.json"
    checkpoint_fuzzer.sign_manifest(file, {**json.loads(file.read_text()), **values})


def found(path: Path, step: int = 0) -> directory.ValidCheckpoint:
    return find_newest_valid(
        select_checkpoints(path, step),
        lambda entry: find_problems(entry.path, entry.manifest),
    )


def test_newer_version_is_not_passed_over(tmp_path):
    """Resuming from an older checkpoint would abandon the steps of the newer program."""
    make(tmp_path, 1)
    change_manifest(make(tmp_path, 2), version=NEWER, files="of another form")
    message = f"iter_0000002/manifest.json has format version {NEWER}; .*Update moe-megatron"
    for path, step in ((tmp_path, 0), (tmp_path, 2), (tmp_path / "iter_0000002", 0)):
        with pytest.raises(NewerVersionError, match=message):
            found(path, step)
    change_manifest(tmp_path / "iter_0000002", serial="of another form")
    with pytest.raises(NewerVersionError, match=message):
        found(tmp_path)


def test_newer_version_matters_if_chosen(tmp_path):
    """An older one, one that `latest` goes back from, or another step's stops nothing."""
    make(tmp_path, 1)
    change_manifest(make(tmp_path, 2), version=NEWER)
    assert found(tmp_path, 1).path.name == "iter_0000001"
    entries, (problem,) = list_checkpoints(tmp_path)
    assert [entry.path.name for entry in entries] == ["iter_0000001"]
    assert f"iter_0000002/manifest.json has format version {NEWER}" in problem
    (tmp_path / "latest").write_text("iter_0000001")
    assert found(tmp_path).path.name == "iter_0000001"
    newest = make(tmp_path, 3)
    assert read_entry(newest).manifest["serial"] == 3
    assert found(tmp_path).path == newest
    (newest / "state.json").write_text("[]")
    with pytest.raises(NewerVersionError, match="iter_0000002"):
        found(tmp_path)
    assert directory.apply_retention(tmp_path, 1, 0) == ["iter_0000001"]
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [
        "iter_0000002",
        "iter_0000003",
    ]


@pytest.mark.parametrize("version", ["x", -1, True, [1], None, 1.0])
def test_malformed_version_is_passed_over(version, tmp_path):
    """The directory stays usable: for the search, the next commit and the retention."""
    make(tmp_path, 1)
    change_manifest(make(tmp_path, 2), version=version)
    checkpoint = found(tmp_path)
    assert checkpoint.path.name == "iter_0000001"
    (problem,) = checkpoint.problems
    assert "iter_0000002/manifest.json: version is " in problem
    assert directory.next_serial(tmp_path) == 2
    assert directory.apply_retention(tmp_path, 1, 0) == []
    with pytest.raises(CorruptCheckpointError, match="allowed: an integer up to"):
        found(tmp_path / "iter_0000002")


def test_inspection_lists_newer_versions(tmp_path):
    """It names no newest checkpoint when that is of a newer version."""
    make(tmp_path, 1)
    change_manifest(make(tmp_path, 2), version=NEWER)
    older, newer = summarize_directory(tmp_path)
    assert (older["iteration"], older["newest"], older["faults"]) == (1, False, [])
    assert f"iter_0000002/manifest.json has format version {NEWER}" in newer["faults"][0]


@pytest.mark.parametrize("read", [read_state, read_shard_index])
def test_malformed_version_inside_is_corrupt(read, tmp_path):
    path = make(tmp_path, 1)
    for name in ("state.json", "index.json"):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**content, "version": "x"}))
    with pytest.raises(CorruptCheckpointError, match="json: version is 'x'; allowed: an int"):
        read(path)
