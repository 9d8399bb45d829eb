"""Files of unknown origin: special files, long files and deeply nested JSON."""

from __future__ import annotations

import os
import socket

import pytest

from megatron.io.untrusted import (
    MAX_JSON_DEPTH,
    open_regular,
    parse_json,
    read_json_file,
    read_text_file,
)


def test_regular_files_and_links_are_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "b"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"12"
        assert read_json_file(tmp_path / name) == 12


def test_special_files_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("fifo", "zero", "socket"):
            with pytest.raises(OSError, match=f"not a regular file: '.*/{name}'"):
                open_regular(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


def test_fifo_that_replaces_a_file_is_refused(tmp_path, monkeypatch):
    """The file is replaced between the check of its path and its opening."""
    (tmp_path / "a").touch()
    os.mkfifo(tmp_path / "fifo")
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened(tmp_path / "fifo", flags))
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "a")


def test_text_has_a_longest_size(tmp_path):
    (tmp_path / "a").write_text("12345")
    assert read_text_file(tmp_path / "a", 5) == "12345"
    with pytest.raises(ValueError, match="it is longer than 4 bytes"):
        read_text_file(tmp_path / "a", 4)
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        read_text_file(tmp_path / "a", 4)


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ('[1,{"a":', "}]")])
def test_nesting_is_limited(opening, closing):
    levels = opening.count("[") + opening.count("{")
    allowed = MAX_JSON_DEPTH // levels
    text = opening * allowed + "0" + closing * allowed
    assert parse_json(text) is not None
    for times in (allowed + 1, 10 * allowed, 100_000):
        with pytest.raises(ValueError, match="nested deeper than 64 levels"):
            parse_json(opening * times + "0" + closing * times)
