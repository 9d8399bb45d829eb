"""Exit codes, classification of errors, and exit without interpreter teardown.

0          the run or tool completed, or a signal stopped the run after a checkpoint
1          another rank ended first, or an error of the program, with its traceback
2          a mistake in what was set, or a fault of the machine such as a full disk
3          a rank waited for longer than --timeout-minutes (also `training.watchdog` and
           `engine.operator_lock`)
128 + n    signal n was repeated: the rank ended without a checkpoint (`graceful_stop`); or it
           came outside of the training loop (143: SIGTERM, 130: Ctrl-C; `startup_signals`)
141        the reader of a tool's output has ended (`log.run_tool`)
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import resource
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from megatron import log
from megatron.parallel.ranks import set_rank

_PACKAGE = Path(__file__).parent
_PEER_EXITED = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
)
"""What the errors of a collective say when the process on the other side has ended."""


def exit_code(program: Callable[[], None]) -> int:
    """Run a program and return its exit code, as listed at the top of this module.

    An error that the user can act on is reported as one line; any other is raised.
    """
    try:
        set_rank()  # before the logger is set up, which depends on the rank
        log.setup()
        program()
    except KeyboardInterrupt:
        log.report_error(InterruptedError("interrupted"))
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        message, code = classify_error(error)
        if message is None:
            raise
        # A rank whose collective timed out first closes its connections: the others end, too, and
        # the launcher would end this one before it says why.
        log.report_error(message, immediately=code == 3)
        return code
    from megatron.engine.distributed import destroy

    destroy()
    return 0


def classify_error(error: ValueError | OSError | RuntimeError) -> tuple[Exception | None, int]:
    """Decide whether an error is reported to the user as one line.

    Returns:
        (one-line error, exit code), or (None, 1) for an error whose traceback is
        needed.
    """
    from megatron.data.loader import worker_exited_error

    for message, code in (
        (open_files_error(error), 2),
        (peer_exited_error(error), 1),
        (collective_timeout_error(error), 3),
        (worker_exited_error(error), 2),
    ):
        if message:
            return message, code
    # The system's own, such as of a network file system, have a number.
    if isinstance(error, TimeoutError) and error.errno is None:
        return error, 3
    if isinstance(error, OSError):
        return error, 2
    if isinstance(error, ValueError) and _raised_by_this_package(error):
        return error, 2
    return None, 1


def exit_process(code: int) -> NoReturn:
    """End the process: exit handlers run, but the interpreter is not torn down.

    Gloo's threads take the GIL to release the tensors of the last collective. A thread
    that does so during teardown is ended inside C++ code that does not allow it, and
    the process aborts (seen once in a hundred runs of two ranks on busy cores): a
    finished run would count as failed. These threads live as long as DeepSpeed refers
    to its process groups, so they cannot be joined first.
    """
    # Wait for threads that are not daemons, as the interpreter does before exit
    # handlers.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def peer_exited_error(error: BaseException) -> RuntimeError | None:
    """Condense the error of a collective whose other side has ended to one line.

    Returns:
        None for any other error.
    """
    if isinstance(error, OSError):
        return None
    if not any(words in str(error) for words in _PEER_EXITED):
        return None
    return RuntimeError(
        "another rank ended, and its message says why, or it was killed (out of memory?); "
        "this one stops with it"
    )


def open_files_error(error: BaseException) -> OSError | None:
    """Condense an error of the limit of open files, which may come from gloo, to one line.

    Returns:
        None for any other error.
    """
    is_number = isinstance(error, OSError) and error.errno == errno.EMFILE
    if not is_number and os.strerror(errno.EMFILE) not in str(error):
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    what = str(error).splitlines()[0][:200]
    return OSError(
        f"this process has as many files and sockets open as it may, {soft} (ulimit -n; the hard "
        f"limit is {hard}): {what}. Raise the limit, or use fewer --num-workers or datasets"
    )


def collective_timeout_error(error: BaseException) -> TimeoutError | None:
    """Condense the error of a collective that timed out in gloo to one line.

    Returns:
        None for any other error.
    """
    if isinstance(error, OSError):
        return None
    found = re.search(r"Timed out waiting (\d+)ms", str(error))
    if not found:
        return None
    minutes = int(found[1]) / 60000
    where = _innermost_frame(error.__traceback__)
    return TimeoutError(
        f"a collective{where} took longer than --timeout-minutes {minutes:g}: another rank "
        "hangs or is far behind, and may say why, or its host is down. If it is only slow, "
        "raise --timeout-minutes"
    )


def _innermost_frame(tb: TracebackType | None) -> str:
    """Format the innermost frame of this package as ` (function, file:line)`, or ''."""
    frames = [f for f in traceback.extract_tb(tb) if _in_this_package(f.filename)]
    if not frames:
        return ""
    frame = frames[-1]
    return f" ({frame.name}, {Path(frame.filename).name}:{frame.lineno})"


def _raised_by_this_package(error: BaseException) -> bool:
    """Whether our code raised the error: then its message is for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return _in_this_package(frames[-1].filename)


def _in_this_package(filename: str) -> bool:
    return _PACKAGE in Path(filename).parents
