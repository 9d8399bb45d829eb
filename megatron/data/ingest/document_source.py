"""The interface of document sources, which `formats.py` implements for each format."""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import ModuleType

from megatron.data.ingest.records import DEFAULT_CHUNK_BYTES, TOOL_FLAGS, Chunk, FlagNames


class DocumentSource(ABC):
    """A file or stream of documents, which it cuts into chunks.

    Cutting is cheap and is done by one process; `Chunk.parse`, which reads and parses the
    documents, is not, and may run in any process. Damaged or truncated data is an error.

    Attributes:
        number: index in the list that `open_sources` returns.
        path: path as shown in messages.
        flags: flags that error messages refer to.
        size: bytes on disk; 0: unknown.
        unit: "line" or "row".
        resumable: whether a later run can read the source again.
    """

    unit = "line"
    resumable = True
    size = 0

    def __init__(self, number: int, path: str, flags: FlagNames = TOOL_FLAGS):
        self.number = number
        self.path = path
        self.flags = flags

    @abstractmethod
    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = DEFAULT_CHUNK_BYTES
    ) -> Iterator[Chunk]:
        """Cut the records into chunks, from `start` (0 or the `end` of a chunk) on.

        A chunk ends with the record that makes its text `chunk_bytes` long or longer,
        wherever the chunk starts. So it is at most one record longer than that.

        Raises:
            OSError: the source cannot be read.
            ValueError: the data is damaged, lacks a column for a key, or has a line that
                is too long.
        """

    def identity(self) -> list:
        """Return JSON values that change when the content does.

        They start with the absolute path, the size in bytes and the modification time in ns.
        """
        return [self.path, 0, 0]

    def _chunk(
        self, start: int, end: int, disk_bytes: int, data: bytes | dict[str, list] | None
    ) -> Chunk:
        return Chunk(
            self.number, self.path, self.unit, start, end, disk_bytes, data, self.flags
        )

    def _import_optional(self, module: str) -> ModuleType:
        """Import a module of an optional package; raise ValueError if it is not installed."""
        try:
            return importlib.import_module(module)
        except ImportError:
            package = module.split(".")[0]
            raise ValueError(
                f"{self.flags.input} {self.path} needs the package {package}, which is not "
                f"installed. Install it: pip install 'moe-megatron[data]'"
            ) from None


class FileSource(DocumentSource):
    """A regular file."""

    def __init__(self, number: int, path: str, flags: FlagNames = TOOL_FLAGS):
        super().__init__(number, path, flags)
        stat = os.stat(path)
        self.size = stat.st_size
        self._modified_ns = stat.st_mtime_ns

    def identity(self) -> list:
        """Return [absolute path, size in bytes, modification time in ns]."""
        return [os.path.abspath(self.path), self.size, self._modified_ns]
