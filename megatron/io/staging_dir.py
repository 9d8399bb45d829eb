"""The folder `<prefix>.partial/`: what a program writes before it publishes, and the lock that keeps others out."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from megatron.io.atomic_write import errors_with_path

LOGGER = logging.getLogger("megatron")


class StagingDirLocked(ValueError):
    """Another process holds the work folder."""


class StagingDir:
    """Holds `<prefix>.partial/` for one process, until it is released. A context manager.

    The lock is the kernel's: it ends with its process, however that ends, and what the process left is found again.

    Args:
        prefix: of the output; folders are created.

    Raises:
        Busy: another process holds it; the message names that process.
        OSError: the folder cannot be written.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = os.fspath(prefix)
        self.path = Path(f"{self.prefix}.partial")
        self._lock = self._acquire()
        # Forked processes (which read data ahead, say) would keep the lock after the death of this one.
        os.register_at_fork(after_in_child=self._lock.close)

    def __enter__(self) -> StagingDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def file(self, name: str) -> str:
        """Path of a file in the folder."""
        return str(self.path / name)

    def clear(self) -> None:
        """Remove everything that was written here. Does nothing after `release`."""
        if self._lock.closed:
            return
        for path in self.path.iterdir():
            if path.name != "lock":
                path.unlink()

    def release(self) -> None:
        """Let others in; an empty folder disappears. Does nothing the second time."""
        if self._lock.closed:
            return
        with suppress(FileNotFoundError):  # somebody has deleted the folder
            if all(path.name == "lock" for path in self.path.iterdir()):
                os.remove(self.file("lock"))
                with suppress(OSError):  # somebody has already come in again
                    self.path.rmdir()
        with suppress(OSError):  # of writing the owner, on a full disk
            self._lock.close()

    def _acquire(self):
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.path.mkdir()
            self._require_ours()
            with suppress(FileNotFoundError):  # removed by its last owner at this moment
                lock = open(self.file("lock"), "a+", encoding="utf-8")  # noqa: SIM115 - closed by release
                if self._locked(lock):
                    return lock
                lock.close()

    def _require_ours(self) -> None:
        if self.path.is_symlink() and not self.path.exists():
            raise ValueError(
                f"{self.path} is a link to nothing; allowed: a folder for work in progress. Remove it"
            )
        with suppress(FileNotFoundError):
            names = os.listdir(self.path)
            if names and "lock" not in names:
                raise ValueError(
                    f"{self.path} has files of somebody else ({names[0]}, ...); allowed: a folder for "
                    f"work in progress. Move it away, or choose another output prefix"
                )

    def _locked(self, lock) -> bool:
        """Whether the lock is ours now; False when the file was replaced before we had it."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise StagingDirLocked(
                f"{self.prefix} is being written by {lock_holder(self.prefix) or 'another process'}. Wait for it, or "
                f"choose another output prefix"
            ) from None
        except OSError as error:
            LOGGER.warning(
                "%s has no file locks (%s): see that no two programs write %s at once",
                self.path.parent,
                error.strerror,
                self.prefix,
            )
        if not same_file(lock.fileno(), self.file("lock")):
            return False
        try:
            with errors_with_path(self.file("lock")):
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


def lock_holder(prefix: str) -> str:
    """The process that holds the work folder of a prefix, or held it last; empty: nobody."""
    with suppress(OSError):
        return Path(f"{prefix}.partial", "lock").read_text(encoding="utf-8").strip()
    return ""


def same_file(descriptor: int, path: str) -> bool:
    """Whether an open file is (still) what the path names."""
    ours = os.fstat(descriptor)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
