"""Read files of unknown origin: regular files only, JSON of bounded size and depth.

A FIFO or a device in place of a file would block its reader or never end.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_DEPTH = 64
"""Deepest nesting of lists and objects; files of this program have less than ten levels"""
_MAX_JSON_BYTES = 1 << 30


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        OSError: It cannot be opened, or it is a FIFO, a device, a socket or a directory.
    """
    _require_regular(os.stat(path).st_mode, path)
    # A FIFO may have taken its place since: without O_NONBLOCK, opening one waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        file.close()
        raise
    return file


def _require_regular(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "It is not a regular file", str(path))


def read_text_file(path: str | Path, max_bytes: int) -> str:
    """Read a small text file in UTF-8.

    Raises:
        OSError: It cannot be read, or is not a regular file.
        ValueError: It is longer than `max_bytes`, or is not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it is longer than {max_bytes} bytes")
    return content.decode()


def read_json_file(path: str | Path) -> Any:
    """Read a JSON file. Raises like `read_text_file` and `parse_json`."""
    return parse_json(read_text_file(path, _MAX_JSON_BYTES))


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is not JSON, or is nested deeper than MAX_JSON_DEPTH.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels") from None
    containers = [content]
    for _ in range(MAX_JSON_DEPTH):
        containers = _contained(containers)
        if not containers:
            return content
    raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")


def _contained(containers: list[Any]) -> list[Any]:
    """Return the lists and dicts that are elements of lists and dicts."""
    found = []
    for container in containers:
        elements = container
        if isinstance(container, dict):
            elements = container.values()
        elif not isinstance(container, list):
            continue
        found += [element for element in elements if isinstance(element, (dict, list))]
    return found
