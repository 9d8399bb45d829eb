"""Directory of checkpoints: commit, finding, damage and retention, with files of a few bytes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from helpers import checkpoint_fuzzer, engines
from megatron import log
from megatron.checkpoint import directory, latest
from megatron.checkpoint.directory import (
    CheckpointEntry,
    find_newest_valid,
    list_checkpoints,
    read_entry,
    select_checkpoints,
)
from megatron.checkpoint.manifest import (
    CorruptCheckpointError,
    check_files,
    find_problems,
    manifest_checksum,
    read_manifest,
)
from megatron.io.sha256 import FileDigest, digest_bytes

CONTENT = {
    "run.json": b"{}",
    "rank_00000.safetensors": bytes(range(256)) * 40,
    "index.json": b"[1]",
    "state.json": b"{2}",
}


def make(folder: Path, iteration: int) -> Path:
    """Commit a checkpoint of an iteration."""
    partial = folder / "checkpoint.partial" / directory.checkpoint_name(iteration)
    partial.mkdir(parents=True)
    files = {}
    for name, content in CONTENT.items():
        (partial / name).write_bytes(content)
        files[name] = digest_bytes(content)
    return directory.commit_checkpoint(partial, folder, iteration, files)


def check(path: Path) -> None:
    """Verify all files of a checkpoint."""
    manifest = read_entry(path).manifest
    check_files(path, manifest["files"], manifest)


def names(folder: Path) -> list[str]:
    """Return the names in a directory of checkpoints but those that it always has."""
    always = ("checkpoint.partial", "latest", "latest.json")
    return sorted(path.name for path in folder.iterdir() if path.name not in always)


def listed(folder: Path) -> list[int]:
    """Return the iterations of the checkpoints with a valid manifest, newest first."""
    return [entry.manifest["iteration"] for entry in list_checkpoints(folder)[0]]


def selected(path: Path, step: int = 0) -> list[int]:
    """Return the iterations of the candidates, in the order of preference."""
    candidates = select_checkpoints(path, step).candidates
    return [entry.manifest["iteration"] for entry in candidates]


def verify(entry: CheckpointEntry) -> list[str]:
    return find_problems(entry.path, entry.manifest)


def found(path: Path, step: int = 0) -> directory.ValidCheckpoint:
    return find_newest_valid(select_checkpoints(path, step), verify)


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# Commit


def test_committed_checkpoint_is_valid_and_latest(tmp_path):
    path = make(tmp_path, 300)
    assert path == tmp_path / "iter_0000300" and check(path) is None
    assert engines.latest(tmp_path) == "iter_0000300" == (tmp_path / "latest").read_text()
    assert names(tmp_path) == ["iter_0000300"]
    record = json.loads((tmp_path / "latest.json").read_text())
    assert record == {"checkpoint": "iter_0000300", "serial": 1}
    assert sorted(read_manifest(path)["files"]) == sorted(CONTENT)


def test_large_iterations_have_longer_names(tmp_path):
    make(tmp_path, 12_345_678)
    assert engines.latest(tmp_path) == "iter_12345678"


def test_newest_is_the_last_completed(tmp_path):
    """After a return to an earlier iteration the abandoned checkpoints have higher numbers."""
    for iteration in (100, 200, 300, 150):
        make(tmp_path, iteration)
    assert listed(tmp_path) == [150, 300, 200, 100]
    assert engines.latest(tmp_path) == "iter_0000150"


def test_checkpoint_of_same_iteration_is_replaced(tmp_path):
    make(tmp_path, 100)
    old = os.stat(tmp_path / "iter_0000100").st_ino
    make(tmp_path, 100)
    assert os.stat(tmp_path / "iter_0000100").st_ino != old
    assert names(tmp_path) == ["iter_0000100"]
    assert read_manifest(tmp_path / "iter_0000100")["serial"] == 2


@pytest.mark.parametrize("fails_at", range(1, 18))
def test_commit_killed_anywhere_leaves_valid_checkpoint(fails_at, tmp_path, monkeypatch):
    """A commit that replaces checkpoint 100 is killed at its n-th system call.

    Checkpoint 100 is found, old or new, and the next save works.
    """
    make(tmp_path, 50)
    make(tmp_path, 100)
    killed_commit(tmp_path, 100, fails_at, monkeypatch)
    path, manifest, _ = list_checkpoints(tmp_path)[0][0]
    assert manifest["iteration"] == 100 and check(path) is None
    assert selected(tmp_path)[0] == 100
    shutil.rmtree(tmp_path / "checkpoint.partial/iter_0000100", ignore_errors=True)
    directory.remove_stale(tmp_path)
    make(tmp_path, 100)
    assert names(tmp_path) == ["iter_0000050", "iter_0000100"]


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("fails_at", range(1, 14))
def test_killed_commit_is_no_edit(fails_at, edited, tmp_path, monkeypatch):
    """A name in `latest` that the kill left behind is not taken for a user's choice.

    An edit that was made before stays valid until the run that followed it has saved.
    """
    for iteration in (50, 100):
        make(tmp_path, iteration)
    if edited:
        (tmp_path / "latest").write_text("iter_0000050\n")
    killed_commit(tmp_path, 75, fails_at, monkeypatch, least=8)
    is_committed = 75 in listed(tmp_path)
    expected = [100, 50]
    if is_committed:
        expected = [75, 100, 50]
    elif edited:
        expected = [50]
    assert selected(tmp_path) == expected


def killed_commit(
    folder: Path, iteration: int, fails_at: int, monkeypatch, least: int = 11
) -> None:
    """Commit a checkpoint in a process that is killed at its n-th system call.

    Args:
        least: Number of system calls that a commit has at least.
    """
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
            (shutil, "rmtree"),
        ):
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            make(folder, iteration)
            died = False
        except KeyboardInterrupt:
            died = True
    assert died == (calls >= fails_at) and calls >= min(fails_at, least), (
        "every call that can be interrupted was interrupted"
    )


@pytest.mark.parametrize("failing", ["latest", "latest.json"])
def test_checkpoint_is_complete_without_latest(failing, tmp_path, monkeypatch, capsys):
    """The checkpoint is found by its manifest, so a failure to name it is only a warning."""
    make(tmp_path, 50)

    write_text = latest.atomic_write.write_text

    def write_unless_latest(path, text):
        if path.name == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_text(path, text)

    monkeypatch.setattr(latest.atomic_write, "write_text", write_unless_latest)
    log.setup()
    make(tmp_path, 100)
    assert listed(tmp_path) == [100, 50]
    for file in ("latest", "latest.json"):
        assert not (tmp_path / file).exists(), "an old name would stand for a lost checkpoint"
    shutil.rmtree(tmp_path / "iter_0000050")
    assert not select_checkpoints(tmp_path).problems
    assert re.search(
        r"WARNING \S+iter_0000100 is complete, but the file latest could not be updated: .*No "
        rf"space left on device: '\S+/{failing}'",
        capsys.readouterr().out,
    )


def test_truncated_file_is_not_committed(tmp_path):
    partial = tmp_path / "checkpoint.partial/iter_0000007"
    partial.mkdir(parents=True)
    (partial / "run.json").write_bytes(b"{")
    with pytest.raises(
        OSError, match="run.json has 1 bytes, 2 were written: the file system lost data"
    ):
        directory.commit_checkpoint(partial, tmp_path, 7, {"run.json": FileDigest(2, "?")})
    assert not (tmp_path / "iter_0000007").exists()


# Damage


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda p: flip(p, len(p.read_bytes()) // 2),
            "{} is corrupt: its SHA-256 is not the one in manifest.json",
        ),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "{} has .* bytes, .* were written"),
        (lambda p: p.unlink(), "{} is missing"),
    ],
)
def test_damage_names_the_file(name, damage, message, tmp_path):
    path = make(tmp_path, 7)
    damage(path / name)
    with pytest.raises(CorruptCheckpointError, match=message.format(name)):
        check(path)


def test_unreadable_file_is_named(tmp_path):
    path = make(tmp_path, 7)
    (path / "index.json").unlink()
    (path / "index.json").mkdir()
    manifest = read_manifest(path)
    size = os.stat(path / "index.json").st_size
    manifest["files"]["index.json"][0] = size
    with pytest.raises(
        CorruptCheckpointError, match="index.json cannot be read: Is a directory"
    ):
        check_files(path, ["index.json"], manifest)


def test_every_byte_of_manifest_is_checked(tmp_path):
    path = make(tmp_path, 7) / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flip(path, position)
        try:
            manifest = read_entry(path.parent).manifest
        except CorruptCheckpointError:
            continue
        finally:
            path.write_bytes(content)
        assert manifest == json.loads(content), f"byte {position} changed the manifest"


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
def test_invalid_manifest_is_refused(content, message, tmp_path):
    path = tmp_path / "iter_0000001"
    path.mkdir()
    if content is not None:
        (path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CorruptCheckpointError, match=message):
        read_manifest(path)
    entries, problems = list_checkpoints(tmp_path)
    assert not entries and len(problems) == 1 and "iter_0000001" in problems[0]


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
        {"files": {"": [1, "a"]}},
        {"files": {"..": [1, "a"]}},
        {"files": {"a\0b": [1, "a"]}},
        {"files": {"run.json": [-1, "a"]}},
        {"iteration": -1},
        {"serial": 2**63},
        {"format": "moe-megatron checkpoint 3"},
    ],
)
def test_malformed_manifest_is_refused(change, tmp_path):
    """Its checksum is right, so that no accident explains it."""
    path = make(tmp_path, 7) / "manifest.json"
    manifest = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({**manifest, "checksum": manifest_checksum(manifest)}))
    with pytest.raises(CorruptCheckpointError, match="manifest.json is malformed"):
        read_manifest(path.parent)


@pytest.mark.parametrize("missing", ["run.json", "state.json", "index.json"])
def test_manifest_names_all_json_files(missing, tmp_path):
    """An emptied manifest has a right checksum, too, and every file would pass unverified."""
    path = make(tmp_path, 7) / "manifest.json"
    manifest = json.loads(path.read_text())
    for names in ({missing}, set(manifest["files"])):
        files = {name: entry for name, entry in manifest["files"].items() if name not in names}
        checkpoint_fuzzer.sign_manifest(path, {**manifest, "files": files})
        with pytest.raises(CorruptCheckpointError, match=f"does not name .*{missing}"):
            read_manifest(path.parent)
    entries, problems = list_checkpoints(tmp_path)
    assert not entries and len(problems) == 1


@pytest.mark.parametrize("depth", [100, 100_000])
def test_nested_manifest_does_not_hide_others(depth, tmp_path):
    """The parser of Python raises RecursionError, or passes what later code cannot walk."""
    make(tmp_path, 1)
    (make(tmp_path, 2) / "manifest.json").write_text("[" * depth + "]" * depth)
    entries, problems = list_checkpoints(tmp_path)
    assert [entry.path.name for entry in entries] == ["iter_0000001"]
    assert "manifest.json cannot be read: it is nested deeper than 64 levels" in problems[0]


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors", "latest"])
@pytest.mark.parametrize(
    "make_special", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)]
)
def test_special_files_are_refused(name, make_special, tmp_path):
    """Reading a FIFO would wait forever, and reading a device would not end."""
    make(tmp_path, 1)
    path = make(tmp_path, 2)
    file = (tmp_path if name == "latest" else path) / name
    nbytes = file.stat().st_size
    file.unlink()
    make_special(file)
    assert os.stat(file).st_size != nbytes
    checkpoint = found(tmp_path)
    (problem,) = checkpoint.problems
    assert name in problem
    if name != "latest":
        assert checkpoint.path.name == "iter_0000001"
        return
    assert problem == f"{file} cannot be read: It is not a regular file"


def test_renamed_and_deepspeed_checkpoints_are_refused(tmp_path):
    make(tmp_path, 1).rename(tmp_path / "iter_0000002")
    with pytest.raises(
        CorruptCheckpointError,
        match="iter_0000002 is the checkpoint of iteration 1 under another name",
    ):
        read_entry(tmp_path / "iter_0000002")
    other = tmp_path / "iter_0000003"
    other.mkdir()
    (other / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(
        CorruptCheckpointError,
        match="has files of a DeepSpeed checkpoint and no manifest.json: it was written by an "
        "earlier",
    ):
        read_entry(other)


def test_unreadable_directory_does_not_hide_others(tmp_path, monkeypatch):
    make(tmp_path, 1)
    make(tmp_path, 2)
    read = directory.read_manifest

    def forbidden(path):
        if path.name == "iter_0000002":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(directory, "read_manifest", forbidden)
    entries, problems = list_checkpoints(tmp_path)
    assert [entry.path.name for entry in entries] == ["iter_0000001"]
    assert "Permission denied" in problems[0]


# Retention


def test_undeletable_checkpoint_is_logged_and_left(tmp_path, monkeypatch, capsys):
    log.setup()
    for iteration in (1, 2):
        make(tmp_path, iteration)
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil,
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
    (tmp_path / ".latest.0123abcd.tmp").touch()
    directory.remove_stale(tmp_path)
    assert names(tmp_path) == ["iter_0000002"]


def test_corrupt_checkpoints_do_not_count(tmp_path):
    for iteration in (1, 2, 3, 4):
        make(tmp_path, iteration)
    assert directory.apply_retention(tmp_path, 2, 0, {"iter_0000004"}) == ["iter_0000001"]
    assert names(tmp_path) == ["iter_0000002", "iter_0000003", "iter_0000004"]


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
def test_retention_keeps_newest_and_every_nth(last, every, kept, tmp_path):
    for iteration in (10, 20, 30, 40, 50):
        make(tmp_path, iteration)
    broken = tmp_path / "iter_0000005"
    broken.mkdir()
    deleted = directory.apply_retention(tmp_path, last, every)
    assert sorted(listed(tmp_path)) == kept
    assert sorted(deleted) == sorted(
        directory.checkpoint_name(i) for i in (10, 20, 30, 40, 50) if i not in kept
    )
    assert broken.exists(), "a broken checkpoint is left for examination"


# Finding


def test_dangling_latest_is_reported(tmp_path):
    """The newest checkpoint was lost: using an older one, or starting from scratch, is reported."""
    for iteration in (1, 2):
        make(tmp_path, iteration)
    shutil.rmtree(tmp_path / "iter_0000002")
    assert selected(tmp_path) == [1]
    problem = f"{tmp_path}/latest names iter_0000002, which does not exist"
    assert select_checkpoints(tmp_path).problems == [problem] == found(tmp_path).problems
    shutil.rmtree(tmp_path / "iter_0000001")
    assert not select_checkpoints(tmp_path).is_empty, (
        "--load-or-init must not start from scratch"
    )
    with pytest.raises(FileNotFoundError, match=f"has no valid checkpoint: {problem}"):
        found(tmp_path)


def test_copy_may_have_another_name(tmp_path):
    path = make(tmp_path, 7).rename(tmp_path / "best")
    assert selected(path) == [7]


def test_selection_prefers_newest_or_given_step(tmp_path):
    folder = tmp_path / "c"
    assert select_checkpoints(folder).is_empty
    broken = folder / "iter_0000009"
    broken.mkdir(parents=True)
    assert not select_checkpoints(folder).is_empty
    for iteration in (10, 20):
        make(folder, iteration)
    selection = select_checkpoints(folder)
    assert [entry.manifest["iteration"] for entry in selection.candidates] == [20, 10]
    assert selection.problems == [f"{broken}/manifest.json is missing"]
    assert selected(folder, 10) == [10]
    assert selected(folder, 15) == selected(folder, 9) == []


def test_single_checkpoint_is_selected_by_path(tmp_path):
    make(tmp_path, 10)
    path = make(tmp_path, 20).with_name("iter_0000010")
    selection = select_checkpoints(path)
    assert [entry.path for entry in selection.candidates] == [path] and selection.is_single
    with pytest.raises(
        ValueError, match="--load-step is 10; allowed: only with the directory of a run's"
    ):
        select_checkpoints(path, 10)
    flip(path / "rank_00000.safetensors", 5)
    with pytest.raises(CorruptCheckpointError, match="rank_00000.* is corrupt.*Use another"):
        found(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpointError, match="iter_0000010/manifest.json is missing"):
        select_checkpoints(path)


def test_finder_passes_over_corrupt_checkpoints(tmp_path):
    paths = {iteration: make(tmp_path, iteration) for iteration in (10, 20, 30)}
    flip(paths[30] / "index.json", 1)
    (tmp_path / "iter_0000009").mkdir()
    checkpoint = found(tmp_path)
    assert checkpoint.path == paths[20] and checkpoint.manifest["iteration"] == 20
    assert checkpoint.corrupt == [paths[30]]
    assert checkpoint.problems == [
        f"{tmp_path}/iter_0000009/manifest.json is missing",
        f"{paths[30]}/index.json is corrupt: its SHA-256 is not the one in manifest.json",
    ]


def test_finder_errors_name_problems_and_advice(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nowhere is not a directory of checkpoints. Give"
    ):
        found(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no valid checkpoint. Give the directory"):
        found(tmp_path)
    make(tmp_path, 20)
    make(tmp_path, 10)
    (tmp_path / "iter_0000009").mkdir()
    with pytest.raises(
        FileNotFoundError,
        match="has no valid checkpoint of iteration 15, which --load-step requests; there are "
        "checkpoints of iterations 10, 20. Give",
    ):
        found(tmp_path, 15)
    with pytest.raises(
        FileNotFoundError,
        match="of iteration 9, .*: .*iter_0000009/manifest.json is missing. Give",
    ):
        found(tmp_path, 9)
    for iteration in (10, 20):
        (tmp_path / directory.checkpoint_name(iteration) / "run.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"has no valid checkpoint: .*09/man.*; .*10/run.*; .*20/run.*\. Ask",
    ):
        find_newest_valid(select_checkpoints(tmp_path), verify, "Ask")
