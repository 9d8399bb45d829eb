"""A folder of checkpoints: publishing, finding, damage, deletion. No engine: the files are a few bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers import engines
from megatron import log
from megatron.checkpoint import directory
from megatron.config.checkpoint import CheckpointConfig
from megatron.io import sha256

CONTENT = {
    "run.json": b"{}",
    "rank_00000.safetensors": bytes(range(256)) * 40,
    "index.json": b"[1]",
}


def make(folder: Path, iteration: int) -> Path:
    partial = folder / "checkpoint.partial" / directory.checkpoint_name(iteration)
    partial.mkdir(parents=True)
    files = {}
    for name, content in CONTENT.items():
        (partial / name).write_bytes(content)
        files[name] = (len(content), sha256.file_sha256(partial / name))
    return directory.commit_checkpoint(partial, folder, iteration, files)


def check(path: Path) -> None:
    manifest = directory.read_manifest(path)
    directory.check_files(path, manifest["files"], manifest)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "checkpoint.partial")


def test_a_published_checkpoint_is_whole_and_the_latest(tmp_path):
    path = make(tmp_path, 300)
    assert path == tmp_path / "iter_0000300" and check(path) is None
    assert engines.latest(tmp_path) == "iter_0000300" == (tmp_path / "latest").read_text()
    assert names(tmp_path) == ["iter_0000300", "latest"]
    assert sorted(directory.read_manifest(path)["files"]) == sorted(CONTENT)


def test_large_iterations_have_longer_names(tmp_path):
    make(tmp_path, 12_345_678)
    assert engines.latest(tmp_path) == "iter_12345678"


def test_the_newest_is_the_one_completed_last(tmp_path):
    """After a return to an earlier iteration the abandoned ones have higher numbers."""
    for iteration in (100, 200, 300, 150):
        make(tmp_path, iteration)
    assert [m["iteration"] for _, m in directory.list_checkpoints(tmp_path)[0]] == [
        150,
        300,
        200,
        100,
    ]
    assert engines.latest(tmp_path) == "iter_0000150"


def test_a_checkpoint_of_the_same_iteration_is_replaced(tmp_path):
    make(tmp_path, 100)
    old = os.stat(tmp_path / "iter_0000100").st_ino
    make(tmp_path, 100)
    assert os.stat(tmp_path / "iter_0000100").st_ino != old
    assert names(tmp_path) == ["iter_0000100", "latest"]
    assert directory.read_manifest(tmp_path / "iter_0000100")["serial"] == 2


@pytest.mark.parametrize("fails_at", range(1, 15))
def test_killed_at_any_rename_a_whole_checkpoint_is_found(fails_at, tmp_path, monkeypatch):
    """Replacing 100 beside 50: whatever was done when the process died, 100 is found, old or new, and the next save
    works."""
    make(tmp_path, 50)
    make(tmp_path, 100)
    calls = 0

    def dying(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in (
            (os, "rename"),
            (os, "replace"),
            (os, "fsync"),
            (directory.shutil, "rmtree"),
        ):
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            make(tmp_path, 100)
            died = False
        except KeyboardInterrupt:
            died = True
    assert died == (calls >= fails_at) and calls >= min(fails_at, 11), (
        "everything that can be interrupted is"
    )
    path, manifest = directory.list_checkpoints(tmp_path)[0][0]
    assert manifest["iteration"] == 100 and check(path) is None
    directory.shutil.rmtree(tmp_path / "checkpoint.partial/iter_0000100", ignore_errors=True)
    directory.remove_stale(tmp_path)
    make(tmp_path, 100)
    assert names(tmp_path) == ["iter_0000050", "iter_0000100", "latest"]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda p: flip(p, len(p.read_bytes()) // 2),
            "{} is damaged: its SHA-256 is not the one in manifest.json",
        ),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "{} has .* bytes, .* were written"),
        (lambda p: p.unlink(), "{} is missing"),
    ],
)
def test_damage_names_the_file(name, damage, message, tmp_path):
    path = make(tmp_path, 7)
    damage(path / name)
    with pytest.raises(directory.CorruptCheckpointError, match=message.format(name)):
        check(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = make(tmp_path, 7)
    (path / "index.json").unlink()
    (path / "index.json").mkdir()
    manifest = directory.read_manifest(path)
    size = os.stat(path / "index.json").st_size
    manifest["files"]["index.json"][0] = size
    with pytest.raises(
        directory.CorruptCheckpointError, match="index.json cannot be read: Is a directory"
    ):
        directory.check_files(path, ["index.json"], manifest)


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = make(tmp_path, 7) / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flip(path, position)
        try:
            manifest = directory.read_manifest(path.parent)
        except directory.CorruptCheckpointError:
            continue
        finally:
            path.write_bytes(content)
        assert manifest == json.loads(content), (
            f"byte {position} changed what the manifest says"
        )


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "manifest.json is missing"),
        ("{", "cannot be read"),
        ("[]", "is not the manifest of a 'moe-megatron"),
        ('{"format": "other"}', "is not the manifest"),
        ("\udcff", "cannot be read"),
    ],
)
def test_broken_manifests(content, message, tmp_path):
    path = tmp_path / "iter_0000001"
    path.mkdir()
    if content is not None:
        (path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(directory.CorruptCheckpointError, match=message):
        directory.read_manifest(path)
    good, bad = directory.list_checkpoints(tmp_path)
    assert not good and len(bad) == 1 and "iter_0000001" in bad[0]


def test_a_renamed_checkpoint_and_one_of_deepspeed_are_named(tmp_path):
    make(tmp_path, 1).rename(tmp_path / "iter_0000002")
    with pytest.raises(
        directory.CorruptCheckpointError,
        match="iter_0000002 is the checkpoint of iteration 1 under another name",
    ):
        directory.read_manifest(tmp_path / "iter_0000002")
    other = tmp_path / "iter_0000003"
    other.mkdir()
    (other / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(
        directory.CorruptCheckpointError,
        match="has DeepSpeed's own files and no manifest.json: it is of an earlier",
    ):
        directory.read_manifest(other)


def test_a_file_that_lost_its_end_is_not_published(tmp_path):
    partial = tmp_path / "checkpoint.partial/iter_0000007"
    partial.mkdir(parents=True)
    (partial / "run.json").write_bytes(b"{")
    with pytest.raises(
        OSError, match="run.json has 1 bytes, 2 were written: the disk lost what it took"
    ):
        directory.commit_checkpoint(partial, tmp_path, 7, {"run.json": (2, "?")})
    assert not (tmp_path / "iter_0000007").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"iteration": "7"},
        {"iteration": True},
        {"serial": None},
        {"files": ["run.json"]},
        {"files": {"run.json": 2}},
        {"files": {"../../x": [1, "a"]}},
        {"files": {"/etc/passwd": [1, "a"]}},
        {"files": {"run.json": [1.5, "a"]}},
    ],
)
def test_a_manifest_that_somebody_made_up(change, tmp_path):
    path = make(tmp_path, 7) / "manifest.json"
    manifest = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({**manifest, "checksum": directory._checksum(manifest)}))
    with pytest.raises(
        directory.CorruptCheckpointError, match="manifest.json says what no manifest says"
    ):
        directory.read_manifest(path.parent)


def test_one_unreadable_folder_does_not_hide_the_others(tmp_path, monkeypatch):
    make(tmp_path, 1)
    make(tmp_path, 2)
    read = directory.read_manifest

    def forbidden(path):
        if path.name == "iter_0000002":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(directory, "read_manifest", forbidden)
    good, bad = directory.list_checkpoints(tmp_path)
    assert [path.name for path, _ in good] == ["iter_0000001"] and "Permission denied" in bad[0]


def test_what_cannot_be_deleted_is_said_and_left(tmp_path, monkeypatch, capsys):
    log.setup()
    for iteration in (1, 2):
        make(tmp_path, iteration)
    with monkeypatch.context() as patch:
        patch.setattr(
            directory.shutil,
            "rmtree",
            lambda path: (_ for _ in ()).throw(OSError(39, "Directory not empty")),
        )
        assert directory.apply_retention(tmp_path, 1, 0) == []
        directory.remove_stale(tmp_path)
    assert (
        "cannot be deleted: [Errno 39] Directory not empty. Delete it by hand"
        in capsys.readouterr().out
    )
    (tmp_path / "latest.12.tmp").touch()
    directory.remove_stale(tmp_path)
    assert names(tmp_path) == ["iter_0000002", "latest"]


def test_damaged_ones_do_not_count(tmp_path):
    for iteration in (1, 2, 3, 4):
        make(tmp_path, iteration)
    assert directory.apply_retention(tmp_path, 2, 0, {"iter_0000004"}) == ["iter_0000001"]
    assert names(tmp_path) == ["iter_0000002", "iter_0000003", "iter_0000004", "latest"]


@pytest.mark.parametrize(
    "last, every, kept",
    [
        (0, 0, [10, 20, 30, 40, 50]),
        (1, 0, [50]),
        (2, 0, [40, 50]),
        (2, 20, [20, 40, 50]),
        (1, 30, [30, 50]),
        (9, 0, [10, 20, 30, 40, 50]),
    ],
)
def test_retention(last, every, kept, tmp_path):
    for iteration in (10, 20, 30, 40, 50):
        make(tmp_path, iteration)
    broken = tmp_path / "iter_0000005"
    broken.mkdir()
    gone = directory.apply_retention(tmp_path, last, every)
    assert [
        m["iteration"] for _, m in reversed(directory.list_checkpoints(tmp_path)[0])
    ] == kept
    assert sorted(gone) == sorted(
        directory.checkpoint_name(i) for i in (10, 20, 30, 40, 50) if i not in kept
    )
    assert broken.exists(), "somebody may want to look at it"


def test_a_latest_that_names_nothing(tmp_path, capsys):
    """Somebody deleted or lost the newest: to take an older one is worth a word, to start anew is a loss."""
    log.setup()
    for iteration in (1, 2):
        make(tmp_path, iteration)
    directory.shutil.rmtree(tmp_path / "iter_0000002")
    options = CheckpointConfig(load=str(tmp_path), load_or_init=True)
    assert [m["iteration"] for _, m in directory.select_checkpoints(options)] == [1]
    assert "latest names iter_0000002, which is not there; not used" in capsys.readouterr().out
    directory.shutil.rmtree(tmp_path / "iter_0000001")
    with pytest.raises(
        FileNotFoundError,
        match="cannot be used: .*latest names iter_0000002, which is not there",
    ):
        directory.select_checkpoints(options)


def test_a_copy_may_have_another_name(tmp_path):
    path = make(tmp_path, 7).rename(tmp_path / "best")
    assert (
        directory.select_checkpoints(CheckpointConfig(load=str(path)))[0][1]["iteration"] == 7
    )


def test_choosing(tmp_path, capsys):
    log.setup()
    options = CheckpointConfig(load=str(tmp_path / "c"))
    with pytest.raises(
        FileNotFoundError, match="holds no checkpoint. Point --load at .* or add --load-or-init"
    ):
        directory.select_checkpoints(options)
    anyway = CheckpointConfig(load=options.load, load_or_init=True)
    assert directory.select_checkpoints(anyway) == []
    broken = tmp_path / "c/iter_0000009"
    broken.mkdir(parents=True)
    for o in (options, anyway):  # something is there: to start anew would be a silent loss
        with pytest.raises(
            FileNotFoundError,
            match="what is there cannot be used: .*0009/manifest.json is missing",
        ):
            directory.select_checkpoints(o)
    for iteration in (10, 20):
        make(tmp_path / "c", iteration)
    capsys.readouterr()
    assert [m["iteration"] for _, m in directory.select_checkpoints(options)] == [20, 10]
    assert "iter_0000009/manifest.json is missing; not used" in capsys.readouterr().out
    step = [directory.select_checkpoints(CheckpointConfig(load=options.load, load_step=10))]
    assert [m["iteration"] for _, m in step[0]] == [10]
    with pytest.raises(ValueError, match="--load-step is 15; whole checkpoints in .*: 10, 20"):
        directory.select_checkpoints(CheckpointConfig(load=options.load, load_step=15))
    with pytest.raises(
        ValueError, match="--load-step is 9; .*iter_0000009/manifest.json is missing"
    ):
        directory.select_checkpoints(CheckpointConfig(load=options.load, load_step=9))


def test_one_checkpoint_can_be_chosen_by_its_own_folder(tmp_path):
    make(tmp_path, 10)
    path = make(tmp_path, 20).with_name("iter_0000010")
    assert [
        found for found, _ in directory.select_checkpoints(CheckpointConfig(load=str(path)))
    ] == [path]
    with pytest.raises(
        ValueError, match="--load-step is 10; allowed: only with the folder of the checkpoints"
    ):
        directory.select_checkpoints(CheckpointConfig(load=str(path), load_step=10))
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="iter_0000010/manifest.json is missing"):
        directory.select_checkpoints(CheckpointConfig(load=str(path)))
