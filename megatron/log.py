"""The logger "megatron": rank 0 logs everything, the other ranks log warnings only.

Modules log through `get_logger()` or its child `logging.getLogger(__name__)`; only a
program calls `setup`.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

_PEER_DELAY_SECONDS = 3
"""How long other ranks wait before they report an error. DeepSpeed's launcher polls its
processes once a second and ends them when one has failed."""

_LONGEST_LINE = 10_000
"""Characters of an error message; more are cut in its middle"""


class RankHandler(logging.StreamHandler):
    """Writes to stdout, flushed line by line, in the format of this process's rank."""

    def __init__(self, rank: int):
        logging.Handler.__init__(self)  # StreamHandler's would store the current stdout
        self.setFormatter(RankFormatter(rank))

    @property
    def stream(self) -> TextIO:
        """The current stdout: programs and tests redirect it."""
        return sys.stdout


class RankFormatter(logging.Formatter):
    """Formats `12:34:56 message`, plus the level unless INFO and the rank unless 0."""

    def __init__(self, rank: int):
        super().__init__(datefmt="%H:%M:%S")
        self.prefix = _prefix(rank)

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return f"{self.prefix}{self.formatTime(record, self.datefmt)} {level}{record.message}"


def get_logger() -> logging.Logger:
    """Return the logger "megatron"."""
    return logging.getLogger("megatron")


def setup(level: int | str = logging.INFO) -> logging.Logger:
    """Send the logger to stdout: from `level` up on rank 0, warnings on other ranks.

    The rank is read from the environment variable RANK. A later call replaces the
    setup. Records no longer reach the root logger, because a handler that some library
    added there would print them a second time.
    """
    escape_unencodable()
    rank = _rank()
    logger = get_logger()
    for handler in [h for h in logger.handlers if isinstance(h, RankHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(RankHandler(rank))
    logger.setLevel(level)
    if rank:
        logger.setLevel(max(logger.level, logging.WARNING))
    logger.propagate = False
    return logger


def escape_unencodable() -> None:
    """Let stdout write characters that its encoding lacks as escapes, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def warn_on_rank0(message: str, *args: object) -> None:
    """Log a warning on rank 0 only: for what every rank notices."""
    if is_rank0():
        get_logger().warning(message, *args)


def is_rank0() -> bool:
    """Whether this process reports what all ranks know."""
    return _rank() == 0


def quiet_deepspeed() -> None:
    """Restrict DeepSpeed's logger to warnings.

    Call it after deepspeed is imported, because the import sets the level.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def report_error(error: BaseException, *, immediately: bool = False) -> None:
    """Print an error as one line on stderr.

    Ranks other than 0 wait first: most mistakes are made on all ranks, rank 0 reports
    them, and the launcher ends the other ranks before they repeat the message. An error
    of one rank alone is still printed.

    Args:
        immediately: do not wait, because this rank may be the only one that knows of the error.
    """
    rank = _rank()
    if rank and not immediately:
        time.sleep(_PEER_DELAY_SECONDS)
    # One write: other ranks write to the same terminal.
    sys.stderr.write(f"{_prefix(rank)}error: {printable(str(error))}\n")
    sys.stderr.flush()


def run_tool(prog: str, body: Callable[[], object]) -> int:
    """Run a command-line tool and return its exit code.

    The code is what `body` returns (None counts as 0), 2 after one line on stderr for a
    ValueError or OSError, 130 after Ctrl-C, and 141 when the reader of its output is
    gone (the shell's codes for SIGINT and SIGPIPE).

    Args:
        prog: the tool's name, which begins its error messages.
    """
    escape_unencodable()
    try:
        code = body()
        if sys.stdout:  # None if the shell closed it: >&-
            sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        # The interpreter flushes stdout when it exits, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def printable(text: str) -> str:
    """Escape newlines and control characters, which names in files may have, and cut long text."""
    if len(text) > _LONGEST_LINE:
        text = f"{text[: _LONGEST_LINE // 2]} ... {text[-_LONGEST_LINE // 2 :]}"
    if text.isprintable():
        return text
    escaped = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    return "".join(escaped)


def _rank() -> int:
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0  # `parallel.ranks` refuses what is no number


def _prefix(rank: int) -> str:
    return f"[rank {rank}] " if rank else ""
