"""Write small files atomically: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_text(path: str | Path, text: str) -> None:
    """Write a small file in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a small file under a temporary name, synced and then renamed, so that no half file is ever seen.

    Raises:
        OSError: it cannot be written; the message names it, and nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno, error.strerror, str(path)
        ) from error  # a full disk names none, a rename two
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


@contextmanager
def atomic_open(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that appears under `path` when the block ends.

    The file is synced and renamed when the block ends normally, and removed when it raises.
    """
    path = Path(path)
    # The name is random: process ids repeat on other nodes that see the same directory.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def temporary_pattern(name: str) -> str:
    """Return a glob pattern of the temporary names of a file, which a killed process leaves."""
    return f".{name}.*.tmp"


@contextmanager
def errors_with_path(path: str) -> Iterator[None]:
    """Errors of writing name the file (the system's own do so only at opening) and say what to do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        advice = {
            errno.ENOSPC: "Free some space, or write elsewhere",
            errno.EDQUOT: "Free some of your quota",
            errno.EFBIG: "Raise the limit of file sizes (ulimit -f)",
        }.get(error.errno, "Write elsewhere")
        raise OSError(
            f"{path} cannot be written: {error.strerror}. {advice}, and run the program again"
        ) from error


def fsync_directory(folder: Path) -> None:
    """Make renames in a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
