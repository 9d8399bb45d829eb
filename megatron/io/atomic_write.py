"""Write files atomically: temporary name, fsync, rename.

Every file that a reader may find under its final name is written this way, so that a crash or
a full disk never leaves a partial file there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_text(path: str | Path, text: str) -> None:
    """Write a small file atomically, in UTF-8. Raises like `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a small file atomically.

    Raises:
        OSError: The file cannot be written. The message names it, and no temporary file remains.
    """
    path = Path(path)
    try:
        with atomic_open(path) as file:
            file.write(content)
    except OSError as error:
        if error.errno is None:
            raise
        # The system's own error names no file after a full disk, and two after a rename.
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_open(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that appears under `path` when the block ends.

    The file is synced and renamed when the block ends normally, and removed when it raises.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


@contextmanager
def atomic_path(path: str | Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield a temporary path for code that opens files itself; commit it when the block ends.

    Args:
        path: The final path.
        suffix: End of the temporary name, for writers that choose a format by it.
    """
    path = Path(path)
    temporary = temporary_path(path, suffix)
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def temporary_path(path: str | Path, suffix: str = ".tmp") -> Path:
    """Return a hidden, unused name in the directory of `path`.

    The name is random: process ids repeat on other nodes that see the same directory.
    `temporary_pattern` matches it.
    """
    path = Path(path)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{suffix}")


def temporary_pattern(name: str) -> str:
    """Return a glob pattern of the temporary names of a file, which a killed process leaves."""
    return f".{name}.*.tmp"


def commit_files(renames: Iterable[tuple[str | Path, str | Path]]) -> None:
    """Rename finished files to their final names, in this order, and make the renames durable.

    The files must have been synced. Put the file last whose presence means that all are there.

    Args:
        renames: (temporary path, final path) of every file.
    """
    directories = set()
    for temporary, final in renames:
        os.replace(temporary, final)
        directories.add(Path(final).parent)
    for directory in sorted(directories):
        fsync_directory(directory)


def flush_and_fsync(file: IO) -> None:
    """Write the buffers of an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def fsync_path(path: str | Path) -> None:
    """Sync the content of a file or the entries of a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(directory: str | Path) -> None:
    """Make renames in a directory survive a crash of the machine.

    Some network file systems cannot sync a directory and say so; their servers decide when
    renames are durable.
    """
    try:
        fsync_path(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


@contextmanager
def errors_with_path(path: str | Path) -> Iterator[None]:
    """Make errors of writing name their file and suggest a remedy.

    The system's own errors name a file only when it is opened.
    """
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
