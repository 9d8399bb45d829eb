"""Tests of memory maps that hold no file descriptor."""

from __future__ import annotations

import errno
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from megatron.io import open_files
from megatron.io.mapped_file import advise_random_access, map_file


def mappings(path: Path) -> list[str]:
    """Return what the kernel lists for the maps of a file, one entry each."""
    entries = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE
    )
    return [entry for entry in entries if str(path) in entry]


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def test_map_holds_content_but_no_descriptor(tmp_path):
    path = tmp_path / "file"
    content = bytes(range(256)) * 40
    path.write_bytes(content)
    before = descriptors()
    maps = [map_file(path) for _ in range(50)]
    assert descriptors() == before
    assert all(array.tobytes() == content and array.dtype == np.uint8 for array in maps)
    with pytest.raises(ValueError, match="read-only"):
        maps[0][0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
        maps[0].flags.writeable = True


def test_last_view_removes_the_map(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    array = map_file(path)
    view = array[16:48].view("<i8")
    del array
    assert len(mappings(path)) == 1 and view.tolist() == [0] * 4
    del view
    assert mappings(path) == []


def test_forked_process_reads_the_map(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\x07" * 5000)
    array = map_file(path)
    path.unlink()
    pid = os.fork()
    if pid == 0:
        os._exit(int(array[4999]))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert array[0] == 7


def test_empty_file_maps_to_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    array = map_file(path)
    assert len(array) == 0 and not array.flags.writeable
    advise_random_access(array)  # has no effect


def test_random_access_is_advised(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    array = map_file(path)
    advise_random_access(np.zeros(5))  # has no effect
    assert " rr " not in mappings(path)[0]
    advise_random_access(array[8:].view("<i4"))
    assert " rr " in mappings(path)[0]


def test_unmappable_files_are_refused(tmp_path):
    before = descriptors()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        map_file(tmp_path / "nowhere")
    with pytest.raises(OSError, match="No such device") as caught:
        map_file(tmp_path)
    assert caught.value.filename == str(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open(path, "r+b") as file:
        file.truncate(1 << 40)  # sparse
    try:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 39, hard))
        with pytest.raises(OSError, match="raise sysctl vm.max_map_count or ulimit -v") as full:
            map_file(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert full.value.errno == errno.ENOMEM and full.value.filename == str(path)
    assert len(map_file(path)) == 1 << 40
    assert descriptors() == before


@pytest.mark.parametrize(
    ("limits", "raised"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, resource.RLIM_INFINITY), (65536, resource.RLIM_INFINITY)),
        ((1024, 1 << 20), (65536, 1 << 20)),
        ((4096, 4096), None),
        ((70_000, 1 << 20), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_open_files_limit_is_raised(monkeypatch, limits, raised):
    calls = []
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(open_files.resource, "setrlimit", lambda *args: calls.append(args))
    open_files.raise_open_files_limit()
    expected = [] if raised is None else [(resource.RLIMIT_NOFILE, raised)]
    assert calls == expected


def test_soft_limit_of_this_process_is_raised():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        open_files.raise_open_files_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(before[1], 65536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
