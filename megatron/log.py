"""The logger "megatron": rank 0 speaks, the other ranks only warn.

Modules log through `get_logger()` or `logging.getLogger(__name__)`, which is its child; only a program calls `setup`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO


class RankHandler(logging.StreamHandler):
    """Writes to stdout, flushed line by line, in the form of this process's rank."""

    def __init__(self, rank: int):
        logging.Handler.__init__(self)  # not StreamHandler's, which would keep the stream
        self.setFormatter(RankFormatter(rank))

    @property
    def stream(self) -> TextIO:
        """The stdout of this moment: programs and tests redirect it."""
        return sys.stdout


class RankFormatter(logging.Formatter):
    """`12:34:56 message`; a level other than INFO is named, and so is a rank other than 0."""

    def __init__(self, rank: int):
        super().__init__(datefmt="%H:%M:%S")
        self.prefix = _prefix(rank)

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return f"{self.prefix}{self.formatTime(record, self.datefmt)} {level}{record.message}"


def get_logger() -> logging.Logger:
    """The logger "megatron"."""
    return logging.getLogger("megatron")


def setup(level: int | str = logging.INFO) -> logging.Logger:
    """Send the logger to stdout: from `level` up on rank 0 (environment variable RANK), warnings and up elsewhere.

    May be called again; the last call counts. Records then no longer reach the root logger, whose handlers (a library
    may have made some) would print them a second time.
    """
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


def quiet_deepspeed() -> None:
    """Hold DeepSpeed's own logger to warnings. Call it after deepspeed is imported, which sets the level itself."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def report_error(error: BaseException, *, at_once: bool = False) -> None:
    """Print a user's mistake as one line on stderr.

    Ranks other than 0 wait first, unless told not to: most mistakes are made by all ranks, rank 0 says so, and the
    launcher ends the others before they repeat it. What only one rank sees is still said.
    """
    rank = _rank()
    if rank and not at_once:
        time.sleep(3)  # DeepSpeed's launcher looks at its processes once a second
    sys.stderr.write(
        f"{_prefix(rank)}error: {error}\n"
    )  # in one piece: other ranks write to the same terminal
    sys.stderr.flush()


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _prefix(rank: int) -> str:
    return f"[rank {rank}] " if rank else ""


def run_tool(prog: str, body: Callable[[], object]) -> int:
    """Run a command-line tool to its exit code: what `body` returns (None: 0), 2 after one line on stderr for a
    ValueError or OSError, 130 after Ctrl-C, 141 when nobody reads its output any more (as the shell has them)."""
    try:
        code = body()
        if sys.stdout:  # closed by the shell: >&-
            sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter fails to flush at its end
        return 141
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
