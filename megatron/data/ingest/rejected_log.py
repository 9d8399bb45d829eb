"""Records that cannot be used: logged, counted and written to a JSON-lines file."""

from __future__ import annotations

import json
import os
from contextlib import suppress

from megatron.data.ingest.records import Chunk, RejectedRecord
from megatron.io.atomic_write import errors_with_path
from megatron.log import get_logger

_LOGGED_REJECTIONS = 5


class RejectedLog:
    """Writes rejected records to a file.

    Args:
        path: the file, which is created if missing.
        size: bytes that the file should have; what a previous run wrote after them is cut.
        skipped: records rejected so far.

    Attributes:
        skipped: records rejected so far.
    """

    def __init__(self, path: str, size: int = 0, skipped: int = 0):
        self.skipped = skipped
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def add(self, chunk: Chunk, rejected: RejectedRecord, number: int) -> None:
        """Write one record; `number` is its line or row in the source, from 1."""
        self.skipped += 1
        if self.skipped <= _LOGGED_REJECTIONS:
            get_logger().warning("skipped %s: %s", chunk.location(number), rejected.reason)
        record = {
            "file": chunk.path,
            chunk.unit: number,
            "reason": rejected.reason,
            "record": rejected.raw.decode(errors="backslashreplace"),
        }
        line = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with errors_with_path(self._path):
            self._file.write(line)

    def sync(self) -> None:
        """Make everything written so far durable."""
        with errors_with_path(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def publish_rejected(path: str, published_path: str, skipped: int) -> None:
    """Move a file of rejected records to its final path; without any, remove an old one.

    May be repeated after an interruption.
    """
    if skipped:
        with suppress(FileNotFoundError):  # an interrupted run has moved it already
            os.replace(path, published_path)
    else:
        with suppress(FileNotFoundError):
            os.remove(published_path)
