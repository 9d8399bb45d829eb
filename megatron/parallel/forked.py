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
_STARTED = b"1"


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
        report_reader, report_writer = os.pipe()
        lifeline_reader, lifeline = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(report_reader)
            os.close(lifeline)
            _run_in_child(work, classify, report_writer, lifeline_reader)
        os.close(report_writer)
        os.close(lifeline_reader)
        poll = select.poll()
        poll.register(report_reader, select.POLLIN)
        if not poll.poll(_SECONDS_TO_START * 1000):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(report_reader)
            os.close(lifeline)
            return False
        os.read(
            report_reader, len(_STARTED)
        )  # empty if the child has ended, which `wait` reports
        self.pid = pid
        self._report_reader = report_reader
        self._lifeline = lifeline
        return True

    def wait(self) -> Exception | None:
        """Wait for the end of the process. To be called once.

        Returns:
            None if the work was done, else the error that `classify` made of what it raised, or
            OSError if the child was killed. RuntimeError for a mistake in the program, whose
            traceback the child has printed.
        """
        with open(self._report_reader, "rb") as pipe:
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
    report: int,
    lifeline: int,
) -> NoReturn:
    """Run the work in the child and exit without any cleanup, which is the parent's.

    Args:
        report: pipe for `_STARTED`, and then for the pickled error if there is one.
        lifeline: pipe whose other end closes with the parent.
    """
    code = 1
    try:
        os.write(report, _STARTED)
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
            with open(report, "wb") as pipe:
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
