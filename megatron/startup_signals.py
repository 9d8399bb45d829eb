"""SIGTERM and SIGINT outside of the training loop, where there is nothing to save.

They end the process immediately with the exit code 128 + n. Rank 0 also reports them in one line.
The other ranks are silent: a launcher sends SIGTERM to all of them when one has failed, and
their lines would bury the error of that one.

A thread reads the signals, because the main thread may be in a call of a library that lasts
minutes, such as waiting for the other ranks, and Python's own handlers run between two bytecodes
of the main thread. In the training loop, `training.graceful_stop` takes their place.

This module is imported before torch.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from megatron import log

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_on_stop_signals() -> None:
    """Let SIGTERM and SIGINT end this process from now on, on rank 0 with one line.

    The rank must be set before; see `parallel.ranks`. A signal that is ignored stays ignored: a
    shell starts background jobs with SIGINT ignored.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(
        target=_end_at_signal, args=(reader,), name="startup signals", daemon=True
    )
    thread.start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave_to_thread)
    os.register_at_fork(after_in_child=_reset)


def _end_at_signal(reader: int) -> None:
    """Wait for a stop signal and end the process."""
    while True:
        number = os.read(reader, 1)[0]
        if number in _SIGNALS:
            break
    if log.is_rank0():
        name = signal.Signals(number).name
        error = InterruptedError(
            f"{name} outside of the training loop: this process ends immediately, and there is "
            "nothing to save"
        )
        log.report_error(error, immediately=True)
    os._exit(128 + number)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Replace the default handler, which would end the process without a message."""


def _reset() -> None:
    """Make a forked child independent of this process: its signals are its own."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if signal.getsignal(number) is _leave_to_thread:
            default = signal.SIG_DFL
            if number == signal.SIGINT:
                default = signal.default_int_handler
            signal.signal(number, default)
