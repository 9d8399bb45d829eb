"""Atomic writes: the final name appears complete or not at all; digests and disk space."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from types import SimpleNamespace

import pytest

from megatron.io import atomic_write
from megatron.io.atomic_write import (
    atomic_open,
    atomic_path,
    commit_files,
    errors_with_path,
    temporary_path,
    temporary_pattern,
    write_bytes,
    write_text,
)
from megatron.io.disk_space import require_disk_space
from megatron.io.sha256 import digest_bytes, file_sha256


def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_file_is_replaced(tmp_path):
    path = tmp_path / "x.json"
    write_bytes(path, b"old")
    write_text(path, "new \u00e9")
    assert path.read_bytes() == "new \u00e9".encode()
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_keeps_old_file(call, tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_bytes(path, b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_interrupted_block_writes_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_open(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_open_file_appears_at_the_end(tmp_path):
    with atomic_open(tmp_path / "x") as file:
        file.write(b"one ")
        assert not (tmp_path / "x").exists()
        file.write(b"two")
    assert (tmp_path / "x").read_bytes() == b"one two"


def test_temporary_path_keeps_a_suffix(tmp_path):
    with atomic_path(tmp_path / "trace.json.gz", suffix=".tmp.gz") as temporary:
        assert temporary.parent == tmp_path and temporary.name.endswith(".tmp.gz")
        temporary.write_bytes(b"trace")
    assert (tmp_path / "trace.json.gz").read_bytes() == b"trace"
    assert os.listdir(tmp_path) == ["trace.json.gz"]


def test_temporary_names_are_unique_and_match_pattern(tmp_path):
    paths = {temporary_path(tmp_path / "latest") for _ in range(5)}
    assert len(paths) == 5
    for path in paths:
        path.touch()
    assert set(tmp_path.glob(temporary_pattern("latest"))) == paths
    assert not list(tmp_path.glob(temporary_pattern("other")))


def test_file_is_synced_before_rename(tmp_path, monkeypatch):
    steps = []
    fsync = os.fsync
    replace = os.replace

    def recording_fsync(descriptor):
        steps.append("fsync")
        fsync(descriptor)

    def recording_replace(source, target):
        steps.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    write_bytes(tmp_path / "x", b"1")
    assert steps == ["fsync", "x"]
    steps.clear()
    for name in ("a.tmp", "b.tmp"):
        (tmp_path / name).touch()
    commit_files([(tmp_path / "a.tmp", tmp_path / "a"), (tmp_path / "b.tmp", tmp_path / "b")])
    assert steps == ["a", "b", "fsync"], "the directory is synced after all renames"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "x"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit"),
        (errno.EIO, "elsewhere"),
    ],
)
def test_write_errors_name_the_file(code, advice):
    match = rf"^a/b cannot be written: .*{advice}.*run the program again"
    with pytest.raises(OSError, match=match), errors_with_path("a/b"):
        raise OSError(code, os.strerror(code))
    with (
        pytest.raises(FileNotFoundError, match="No such file or directory: '/nowhere/x'"),
        errors_with_path("a/b"),
    ):
        os.open("/nowhere/x", os.O_RDONLY)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_unsupported_directory_sync_is_no_error(code, tmp_path, monkeypatch):
    """Some network file systems cannot sync directories; files must be synced everywhere."""

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        atomic_write.fsync_path(tmp_path)
    if code != errno.EIO:
        atomic_write.fsync_directory(tmp_path)
        return
    with pytest.raises(OSError, match="Input/output error"):
        atomic_write.fsync_directory(tmp_path)


def test_flush_and_fsync_writes_buffers(tmp_path):
    with open(tmp_path / "x", "wb", buffering=1 << 20) as file:
        file.write(b"buffered")
        assert (tmp_path / "x").read_bytes() == b""
        atomic_write.flush_and_fsync(file)
        assert (tmp_path / "x").read_bytes() == b"buffered"


def test_digests_agree_with_hashlib(tmp_path):
    content = os.urandom(3 << 20) + b"end"
    (tmp_path / "x").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert file_sha256(tmp_path / "x") == expected
    assert digest_bytes(content) == (len(content), expected)


def test_disk_space_is_that_of_existing_parent(tmp_path, monkeypatch):
    checked = []

    def disk_usage(path):
        checked.append(path)
        return SimpleNamespace(free=2_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    require_disk_space(tmp_path / "new/folder/out", 2_000_000)
    assert checked == [tmp_path]
    with pytest.raises(
        OSError,
        match=rf"^new/out needs 2.0 MB, but the disk of {tmp_path} has 2.0 MB free. Ask$",
    ):
        monkeypatch.chdir(tmp_path)
        require_disk_space("new/out", 2_000_001, "Ask")
