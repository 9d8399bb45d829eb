"""Progress bar of a long run on a terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys

from megatron.log import get_logger


class ProgressBar:
    """A bar over the run's length on rank 0's stderr, if that is a terminal.

    While it is shown, the lines of our logger and of DeepSpeed's are written above it.
    Their handlers must exist already, so create it after `log.setup`.

    Args:
        total: length of the run.
        initial: progress at the start.
        unit: what both are counted in, such as "samples".
    """

    def __init__(self, total: int, initial: int = 0, unit: str = "iterations"):
        self._stack = contextlib.ExitStack()
        self._bar = None
        if not sys.stderr.isatty() or int(os.environ.get("RANK", 0)) != 0:
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._bar = self._stack.enter_context(
            tqdm(total=total, initial=initial, unit=f" {unit}", file=sys.stderr)
        )
        loggers = (get_logger(), logging.getLogger("DeepSpeed"))
        with_handlers = [logger for logger in loggers if logger.handlers]
        self._stack.enter_context(logging_redirect_tqdm(with_handlers))

    def move_to(self, progress: int) -> None:
        """Show this progress, of the total."""
        if self._bar is not None:
            self._bar.update(progress - self._bar.n)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
