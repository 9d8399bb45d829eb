"""Identity of the content of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.io import content_id as module
from megatron.io.content_id import comparable, content_id


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_identity_is_that_of_the_content(tmp_path):
    a = written(tmp_path / "a", b"1234")
    b = written(tmp_path / "b", b"1234")
    assert content_id([a]) == content_id([b]) and len(content_id([a])) == 36
    assert content_id([a, b]) == content_id([b, a]) != content_id([a])
    c = written(tmp_path / "c", b"12345")
    assert content_id([a, c]) != content_id([c, a])


def test_border_between_files_matters(tmp_path):
    parts = [b"12", b"34", b"1", b"234"]
    a, b, c, d = (written(tmp_path / str(i), part) for i, part in enumerate(parts))
    assert content_id([a, b]) != content_id([c, d])


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_bytes_of_small_files_all_count(size, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4)
    monkeypatch.setattr(module, "_BLOCKS", 16)
    content = bytes(i % 251 for i in range(size))
    identities = {content_id([written(tmp_path / "a", content)])}
    noticed = 0
    for i in range(size):
        changed = content[:i] + b"\xff" + content[i + 1 :]
        identities.add(content_id([written(tmp_path / "a", changed)]))
        noticed += len(identities) == noticed + 2
    assert noticed == min(size, 64), "the number of bytes that are read"
    if size > 64:
        for i in (0, size - 1):
            changed = content[:i] + b"\xff" + content[i + 1 :]
            assert content_id([written(tmp_path / "a", changed)]) != content_id(
                [written(tmp_path / "b", content)]
            )


def test_large_files_are_sampled(tmp_path):
    """A file of a terabyte that takes no space on the disk: reading it all would take minutes."""
    path = written(tmp_path / "a", b"")
    os.truncate(path, 1 << 40)
    first = content_id([path])
    os.truncate(path, (1 << 40) - 1)
    assert content_id([path]) != first


def test_methods_are_not_compared(tmp_path):
    current = content_id([written(tmp_path / "a", b"1")])
    assert comparable(current, content_id([written(tmp_path / "b", b"2")]))
    assert comparable("0" * 32, "1" * 32)
    for other in ("", "0" * 32, "s2:" + "0" * 32):
        assert not comparable(current, other) and not comparable(other, current)


def test_little_is_read_of_large_files(tmp_path, monkeypatch):
    """A start of a run with thousands of datasets reads this much of each file."""
    path = written(tmp_path / "a", bytes(1 << 20))
    read = []
    sampled_blocks = module._sampled_blocks

    def counted(file, size):
        for block in sampled_blocks(file, size):
            read.append(len(block))
            yield block

    monkeypatch.setattr(module, "_sampled_blocks", counted)
    content_id([path])
    assert sum(read) == 1 << 16


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        content_id([tmp_path / "none"])
