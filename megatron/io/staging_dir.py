"""Staging directory `<prefix>.partial/`: files in progress, and a lock against other writers."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from megatron.io.atomic_write import commit_files, errors_with_path, fsync_directory
from megatron.log import get_logger

_LOCK = "lock"


class StagingDirLocked(ValueError):
    """Another process holds the staging directory."""


class StagingDir:
    """Context manager that holds `<prefix>.partial/` for one process until it is released.

    The lock is a lock of the kernel: it ends with its process, however that ends. Files of a
    killed process stay in the directory for the next holder.

    Args:
        prefix: Path prefix of the output. Missing directories are created.

    Raises:
        StagingDirLocked: Another process holds the directory; the message names the process.
        ValueError: The directory has files that do not belong to a staging directory.
        OSError: The directory cannot be written.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = os.fspath(prefix)
        self.path = Path(f"{self.prefix}.partial")
        self._lock = self._acquire()
        # Forked processes, such as data loader workers, would otherwise keep the lock after
        # the death of this process.
        os.register_at_fork(after_in_child=self._lock.close)

    def __enter__(self) -> StagingDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def file(self, name: str) -> str:
        """Return the path of a file in the directory."""
        return str(self.path / name)

    def clear(self) -> None:
        """Remove all files but the lock. Does nothing after `release`."""
        if self._lock.closed:
            return
        for path in self.path.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def release(self) -> None:
        """Unlock the directory, and remove it if it is empty. Does nothing the second time."""
        if self._lock.closed:
            return
        with suppress(FileNotFoundError):  # the directory was deleted by someone else
            if all(path.name == _LOCK for path in self.path.iterdir()):
                os.remove(self.file(_LOCK))
                with suppress(OSError):  # another process has taken the directory already
                    self.path.rmdir()
        with suppress(OSError):  # of writing the buffered name of the holder to a full disk
            self._lock.close()

    def _acquire(self) -> TextIO:
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.path.mkdir()
            self._require_staging_dir()
            with suppress(FileNotFoundError):  # the last holder removed the directory just now
                lock = open(self.file(_LOCK), "a+", encoding="utf-8")  # noqa: SIM115
                if self._try_lock(lock):
                    return lock
                lock.close()

    def _require_staging_dir(self) -> None:
        if self.path.is_symlink() and not self.path.exists():
            raise ValueError(
                f"{self.path} is a link to nothing; allowed: a directory for work in progress. "
                "Remove it"
            )
        with suppress(FileNotFoundError):
            names = os.listdir(self.path)
            if names and _LOCK not in names:
                raise ValueError(
                    f"{self.path} has files of another program ({names[0]}, ...); allowed: a "
                    "directory for work in progress. Move it away, or choose another output prefix"
                )

    def _try_lock(self, lock: TextIO) -> bool:
        """Lock the file. Returns False when it was replaced before it could be locked."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            holder = lock_holder(self.prefix) or "another process"
            raise StagingDirLocked(
                f"{self.prefix} is being written by {holder}. Wait for it, or choose another "
                "output prefix"
            ) from None
        except OSError as error:
            get_logger().warning(
                "%s has no file locks (%s): make sure that only one program writes %s",
                self.path.parent,
                error.strerror,
                self.prefix,
            )
        if not same_file(lock.fileno(), self.file(_LOCK)):
            return False
        try:
            with errors_with_path(self.file(_LOCK)):
                lock.truncate(0)
                lock.write(
                    f"process {os.getpid()} on {socket.gethostname()}, which started "
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')}"
                )
                lock.flush()
        except OSError:
            self._lock = lock
            self.release()
            raise
        return True


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `output` when the context ends without an error.

    Its files must be synced to the disk. After an error nothing is left.

    Args:
        output: A path that does not exist, or an empty directory.

    Raises:
        StagingDirLocked: Another process writes the same output.
        OSError: The folder cannot be made or renamed.
    """
    with StagingDir(output) as staging_dir:
        partial = staging_dir.path / "folder"
        shutil.rmtree(partial, ignore_errors=True)  # of a killed program
        partial.mkdir()
        try:
            yield partial
            fsync_directory(partial)
            commit_files([(partial, output)])
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def lock_holder(prefix: str) -> str:
    """Return the process that holds the staging directory of a prefix, or held it last.

    The result is empty when there is no such directory.
    """
    with suppress(OSError):
        return Path(f"{prefix}.partial", _LOCK).read_text(encoding="utf-8").strip()
    return ""


def same_file(descriptor: int, path: str | Path) -> bool:
    """Return whether an open file is still the file that a path names."""
    ours = os.fstat(descriptor)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
