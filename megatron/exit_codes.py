"""Exit codes of the programs: error classification, and exit without the interpreter's teardown."""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron import log


def exit_code(program: Callable[[], None]) -> int:
    """Run a program to its exit code, as `main` describes it; errors that are not the user's keep their traceback."""
    log.setup()
    try:
        program()
    except KeyboardInterrupt:
        log.report_error(
            InterruptedError("interrupted before the training began; nothing is saved")
        )
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        line, code = classify_error(error)
        if line is None:
            raise
        log.report_error(line)
        return code
    from megatron.engine.distributed import destroy

    destroy()
    return 0


def classify_error(error: ValueError | OSError | RuntimeError) -> tuple[Exception | None, int]:
    """(what to tell the user in one line, exit code); None: it is not the user's, and its traceback is needed."""
    from megatron.data.loader import worker_exited_error

    for line, code in (
        (peer_exited_error(error), 1),
        (collective_timeout_error(error), 3),
        (worker_exited_error(error), 2),
    ):
        if line:
            return line, code
    ours = isinstance(error, OSError) or (isinstance(error, ValueError) and _is_ours(error))
    return (error, 2) if ours else (None, 1)


def exit_process(code: int) -> NoReturn:
    """End the process with this exit code: exit handlers run, the interpreter's own teardown does not.

    Gloo's threads take the GIL to let go of the last collective's tensors. One that comes late, while the interpreter
    is being torn down, is ended inside C++ code that does not allow it, and the abort (seen once in a hundred runs of
    two ranks on busy cores) would make a finished run a failed one. They live as long as DeepSpeed refers to its
    groups, so they cannot be joined first.
    """
    threading._shutdown()  # waits for threads that are no daemons, as the interpreter does before its exit handlers
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def peer_exited_error(error: BaseException) -> RuntimeError | None:
    """One line for the long error of a collective whose other side is gone; None for any other error."""
    ended = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
    )
    if not isinstance(error, OSError) and any(word in str(error) for word in ended):
        return RuntimeError(
            "another rank ended, and its message says why, or it was killed (out of memory?); this one "
            "stops with it"
        )
    return None


def collective_timeout_error(error: BaseException) -> TimeoutError | None:
    """One line for a collective that gloo gave up; None for any other error."""
    if isinstance(error, OSError) or not (
        found := re.search(r"Timed out waiting (\d+)ms", str(error))
    ):
        return None
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if Path(__file__).parent in Path(f.filename).parents
    ]
    where = (
        f" ({frames[-1].name}, {Path(frames[-1].filename).name}:{frames[-1].lineno})"
        if frames
        else ""
    )
    return TimeoutError(
        f"a collective{where} took longer than --timeout-minutes {int(found[1]) / 60000:g}: another "
        "rank hangs or is far behind, and may say why, or its host is down. If it only is slow, raise "
        "--timeout-minutes"
    )


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error itself: then the message is written for the user, without a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(__file__).parent in Path(frames[-1].filename).parents
