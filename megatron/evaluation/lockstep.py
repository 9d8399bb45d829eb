"""A program on rank 0 that calls functions which all ranks run in lockstep.

lm-evaluation-harness reads data sets, builds prompts and computes metrics, which one rank does
for all; only the model runs on every rank. The program runs in a thread of rank 0. The main
threads of all ranks meet in short collectives until it calls a function or ends: reading a
data set takes longer than a collective may.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron.parallel.groups import Groups, broadcast_from_rank0

_POLL_SECONDS = 1.0
"""How long rank 0 waits for its program before it tells the others that it still runs."""


class _Command(NamedTuple):
    """What the main threads of all ranks do next."""

    function: str = ""
    """name of the function to call; empty: none"""
    arguments: tuple = ()
    has_ended: bool = False
    error: BaseException | None = None
    """the exception that ended the program"""


class LockstepRanks:
    """Runs programs on rank 0, and the functions that they call on all ranks.

    Args:
        groups: the ranks.
        functions: called in the main thread of every rank with the same arguments; each returns
            its result on rank 0.

    Attributes:
        function_error: the exception that a function raised in the program of a single rank;
            with several ranks the program does not see it.
    """

    def __init__(self, groups: Groups, functions: Mapping[str, Callable[..., Any]]):
        self.groups = groups
        self._functions = functions
        self.function_error: BaseException | None = None
        self._commands: queue.Queue[_Command] = queue.Queue()
        self._answers: queue.Queue[Any] = queue.Queue()

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function on all ranks and return rank 0's result. Only the program calls this."""
        if self.groups.world_size == 1:
            try:
                return self._functions[function](*arguments)
            except BaseException as error:
                self.function_error = error
                raise
        self._commands.put(_Command(function, arguments))
        return self._answers.get()

    def run(self, program: Callable[[], Any]) -> Any:
        """Run a program on rank 0. A collective: all ranks must call it.

        Returns:
            What the program returned, on rank 0; None on the other ranks.

        Raises:
            ValueError, OSError: the program raised it; then all ranks raise it.
            RuntimeError: on other ranks than 0, the program raised another exception, which
                rank 0 raises.
            BaseException: a function raised it on this rank.
        """
        if self.groups.world_size == 1:
            return program()
        result: list[Any] = [None]
        if self.groups.is_rank0:
            arguments = (program, result)
            threading.Thread(target=self._run, args=arguments, daemon=True).start()
        while True:
            own = self._next_command()
            command = broadcast_from_rank0(lambda: _portable(own), self.groups)  # noqa: B023
            if command.has_ended:
                _raise(own.error or command.error)
                return result[0]
            if command.function:
                answer = self._functions[command.function](*command.arguments)
                if self.groups.is_rank0:
                    self._answers.put(answer)

    def _run(self, program: Callable[[], Any], result: list[Any]) -> None:
        error = None
        try:
            result[0] = program()
        except BaseException as raised:
            error = raised
        self._commands.put(_Command(has_ended=True, error=error))

    def _next_command(self) -> _Command:
        """Return the command of rank 0's program, or none after a while."""
        if not self.groups.is_rank0:
            return _Command()
        try:
            return self._commands.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return _Command()


def _portable(command: _Command) -> _Command:
    """Return a command that can be sent: exceptions of other packages may not be unpickled."""
    error = command.error
    if error is None:
        return command
    sent: Exception = RuntimeError(
        f"{type(error).__name__} on rank 0, which shows the traceback"
    )
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            sent = kind(str(error))
    return command._replace(error=sent)


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error
