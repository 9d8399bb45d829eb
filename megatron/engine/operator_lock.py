"""The lock under which DeepSpeed's operators are compiled at first use.

torch marks a running compilation by a file. When the process is killed, the file stays, and
every later start waits for its removal forever and in silence. The lock here is one of the
kernel (flock), which ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

from torch.utils.file_baton import FileBaton

_POLL_SECONDS = 0.1


def lock_operator_builds(timeout_minutes: float) -> None:
    """Let torch take the kernel's lock before it compiles or loads an operator.

    The later processes then find a finished operator and only load it.

    Args:
        timeout_minutes: how long a process waits for another one.
    """

    def try_acquire(baton: FileBaton) -> bool:
        baton.fd = _acquire(Path(baton.lock_file_path), timeout_minutes)
        return True

    FileBaton.try_acquire = try_acquire
    FileBaton.release = _release


def _acquire(torch_lock: Path, timeout_minutes: float) -> int:
    """Return the descriptor of the lock file, once this process holds the lock.

    Args:
        torch_lock: the file that torch would create; its folder is that of the operator.

    Raises:
        TimeoutError: another process held the lock for too long.
    """
    folder = torch_lock.parent
    fd = os.open(folder / "process_lock", os.O_CREAT | os.O_RDWR, 0o666)
    deadline = time.monotonic() + 60 * timeout_minutes
    is_waiting = False
    while not _try_lock(fd, folder):
        if not is_waiting:
            _report(f"waiting for another process that compiles {folder.name}")
        is_waiting = True
        if time.monotonic() > deadline:
            os.close(fd)
            raise TimeoutError(
                f"another process has been compiling DeepSpeed's operator {folder.name} for "
                f"longer than --timeout-minutes {timeout_minutes:g}; find it by "
                f"`fuser {folder / 'process_lock'}` and end it, or raise --timeout-minutes"
            )
        time.sleep(_POLL_SECONDS)
    torch_lock.unlink(missing_ok=True)  # left by a killed process that did not have our lock
    if not any(folder.glob("*.so")):
        _report(f"compiling DeepSpeed's operator {folder.name} (once, about a minute)")
    return fd


def _try_lock(fd: int, folder: Path) -> bool:
    """Lock the file. A file system without locks is reported, and counts as locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _report(
            f"{folder} has no file locks ({error.strerror}): make sure that only one process "
            "compiles there, or set TORCH_EXTENSIONS_DIR to a folder on a local disk"
        )
    return True


def _release(baton: FileBaton) -> None:
    """Release the lock. Its file stays: removing it would let two processes hold it."""
    os.close(baton.fd)


def _report(line: str) -> None:
    # Not to stdout, which is redirected while DeepSpeed starts.
    print(line, file=sys.stderr, flush=True)
