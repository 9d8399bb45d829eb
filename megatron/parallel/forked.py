"""Work in a forked process, whose error its parent receives."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

ErrorClassifier = Callable[[ValueError | OSError | RuntimeError], tuple[Exception | None, int]]
"""`megatron.exit_codes.classify_error`, which is of a higher layer"""

_SECONDS_TO_START = 20
"""How long a forked process may take to run; a busy machine needs a second or two"""
_MAX_FORKS = 5


class ForkedWork:
    """A forked process that runs a function, for its effects on disk.

    A thread would hold the GIL in numpy's shuffles, minutes for 10^9 elements, in which this
    process could not take part in collectives. `multiprocessing` is not used, because daemonic
    processes may not start its processes. The child ends with its parent. It must not use torch
    or CUDA, whose threads do not exist in it.

    Args:
        name: what the process does, for messages, such as "builds the sample indices".
        work: the function to run.
        classify: returns, first, the error to report to the user for an exception of `work`, or
            None if it is a mistake in the program. It runs in the child, because the traceback
            that it depends on does not leave it.

    Raises:
        OSError: no process could be started.
    """

    def __init__(self, name: str, work: Callable[[], object], classify: ErrorClassifier):
        self._name = name
        sys.stdout.flush()
        sys.stderr.flush()
        for _ in range(_MAX_FORKS):
            if self._fork(work, classify):
                return
        raise OSError(
            f"no process that {name} could be started: {_MAX_FORKS} forked processes did not run "
            f"within {_SECONDS_TO_START} s each. Start the program again"
        )

    def _fork(self, work: Callable[[], object], classify: ErrorClassifier) -> bool:
        """Fork, and return whether the child runs; one that does not is killed.

        In CPython 3.11 and earlier, a child waits forever in `os.fork` if another thread of its
        parent, such as one of gloo, was adding itself to the interpreter's threads at that moment:
        the lock of their list is held by a thread that the child does not have.
        """
        error_reader, error_writer = os.pipe()
        lifeline_reader, lifeline = os.pipe()
        started_reader, started_writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(error_reader)
            os.close(lifeline)
            os.close(started_reader)
            _run_in_child(work, classify, started_writer, error_writer, lifeline_reader)
        for descriptor in (error_writer, lifeline_reader, started_writer):
            os.close(descriptor)
        poll = select.poll()
        poll.register(started_reader, select.POLLIN)
        # The end of the child is an event, too, which `wait` reports.
        runs = poll.poll(_SECONDS_TO_START * 1000)
        self.pid = pid
        self._lifeline = lifeline
        self._error_reader = error_reader
        if not runs:
            os.kill(pid, signal.SIGKILL)
            self.wait()
        os.close(started_reader)
        return bool(runs)

    def wait(self) -> Exception | None:
        """Wait for the end of the process. To be called once.

        Returns:
            None if the work was done, else the error that `classify` made of what it raised, or
            OSError if the child was killed. RuntimeError for a mistake in the program, whose
            traceback the child has printed.
        """
        with open(self._error_reader, "rb") as pipe:
            pickled = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        os.close(self._lifeline)
        code = os.waitstatus_to_exitcode(status)
        if pickled:
            return pickle.loads(pickled)
        if code < 0:
            return OSError(
                f"process {self.pid}, which {self._name}, was ended by signal "
                f"{signal.strsignal(-code)}. If memory was short, give the node more, or start "
                f"again: what is finished is kept"
            )
        if code > 0:
            return RuntimeError(f"process {self.pid}, which {self._name}, failed; see above")
        return None


def _run_in_child(
    work: Callable[[], object],
    classify: ErrorClassifier,
    started: int,
    error_descriptor: int,
    lifeline: int,
) -> NoReturn:
    """Run the work in the child and exit without any cleanup, which is the parent's."""
    code = 1
    try:
        os.write(started, b"1")
        os.close(started)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent acts on it, and ends this
        threading.Thread(target=_exit_with_parent, args=(lifeline,), daemon=True).start()
        try:
            work()
            code = 0
        except (ValueError, OSError, RuntimeError) as error:
            reported, _ = classify(error)
            if reported is None:
                raise
            pickled = pickle.dumps(reported)
            with open(error_descriptor, "wb") as pipe:
                pipe.write(pickled)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def _exit_with_parent(lifeline: int) -> None:
    """Wait until the other end of the pipe is closed, which the parent holds."""
    os.read(lifeline, 1)
    os._exit(1)
