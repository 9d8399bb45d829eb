"""Staging directory: one holder at a time, and nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.io.staging_dir import StagingDir

REPO = Path(__file__).resolve().parents[2]


def test_second_holder_is_refused(tmp_path):
    prefix = tmp_path / "new/folder/x"
    with StagingDir(prefix) as first:
        assert first.path == tmp_path / "new/folder/x.partial"
        with pytest.raises(
            ValueError,
            match=rf"new/folder/x is being written by process {os.getpid()} on .*Wait",
        ):
            StagingDir(prefix)
    assert os.listdir(tmp_path / "new/folder") == []
    with StagingDir(prefix):
        pass


def test_files_of_killed_holder_stay(tmp_path):
    program = (
        "import os, sys, time; from megatron.io.staging_dir import StagingDir; "
        "f = StagingDir(sys.argv[1]); "
        "open(f.file('half'), 'w').close(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "x")], stdout=subprocess.PIPE, cwd=REPO
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} on"):
        StagingDir(tmp_path / "x")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with StagingDir(tmp_path / "x") as folder:
        assert os.path.exists(folder.file("half"))
    with StagingDir(tmp_path / "x") as folder:  # a directory that is not empty stays
        folder.clear()
        assert os.listdir(folder.path) == ["lock"]
    folder.release()
    folder.clear()
    assert os.listdir(tmp_path) == []


def test_holders_never_overlap(tmp_path):
    """Four processes hold the directory 150 times each, while it appears and disappears."""
    program = """
import os, sys
from megatron.io.staging_dir import StagingDir
done = 0
while done < 150:
    try:
        with StagingDir(sys.argv[1] + "/x") as folder:
            os.close(os.open(sys.argv[1] + "/inside", os.O_CREAT | os.O_EXCL))
            os.remove(sys.argv[1] + "/inside")
            done += 1
    except ValueError:
        pass
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=REPO)
        for _ in range(4)
    ]
    assert [p.wait(60) for p in processes] == [0] * 4
    assert os.listdir(tmp_path) == []


def test_missing_file_locks_are_logged(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with StagingDir(tmp_path / "x"):
        pass
    assert "has no file locks (No locks available)" in caplog.text


def test_other_directories_are_refused(tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial/thesis.txt").touch()
    with pytest.raises(
        ValueError, match=r"x.partial has files of another program \(thesis.txt, ...\)"
    ):
        StagingDir(tmp_path / "x")
    (tmp_path / "y.partial").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="y.partial is a link to nothing"):
        StagingDir(tmp_path / "y")
    (tmp_path / "z.partial").mkdir()
    with StagingDir(tmp_path / "z"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["x.partial", "y.partial"]
    assert os.listdir(tmp_path / "x.partial") == ["thesis.txt"]


def test_forked_process_does_not_keep_lock(tmp_path):
    """Data loader workers live on for seconds after their rank was killed."""
    held = StagingDir(tmp_path / "x")
    reader, writer = os.pipe()
    is_forked, forked = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.write(forked, b"x")
        os.read(reader, 1)  # until the test is over
        os._exit(0)
    os.read(is_forked, 1)
    try:
        held._lock.close()  # as the kernel does for a killed process
        with StagingDir(tmp_path / "x") as ours:
            assert ours._lock is not held._lock
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def test_deleted_directory_can_be_released(tmp_path):
    held = StagingDir(tmp_path / "x")
    shutil.rmtree(tmp_path / "x.partial")
    held.release()
    assert held._lock.closed
