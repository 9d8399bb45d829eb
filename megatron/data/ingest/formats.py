"""Document sources: their interface, and a class for each format that documents come in.

To add a file format, write a `FileSource` here and enter its suffix in FILE_FORMATS.
"""

from __future__ import annotations

import os
import re
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from megatron.data.ingest.chunking import cut_lines, cut_rows, find_line_end, skip_bytes
from megatron.data.ingest.content import HEAD_BYTES, require_json_lines
from megatron.data.ingest.records import (
    DEFAULT_CHUNK_BYTES,
    TOOL_FLAGS,
    Chunk,
    FlagNames,
    format_names,
)
from megatron.optional_packages import import_optional
from megatron.tokenizer.base import one_line

_PIPE_READ_BYTES = 1 << 20
_COMPRESSED_READ_BYTES = 1 << 14
"""compressed bytes per step: few, because Zstandard can expand them 32,000-fold"""
_ZSTD_MAX_WINDOW = 1 << 31
"""large corpora are compressed with `zstd --long=31`"""
_PARQUET_BATCH_ROWS = 1024
"""limit for the rows decoded at a time: rows can be much longer than their average"""
_PARQUET_BUFFER_BYTES = 1 << 20
"""without a buffer size, a column of a complete row group is read at a time"""
_HF_FORM = "hf:NAME[@CONFIG][:SPLIT]"
_HF_PATTERN = re.compile(r"hf:([^@:]+)(?:@([^@:]+))?(?::(.+))?")


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
        return import_optional(module, "data", f"{self.flags.input} {self.path}")


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


class JsonLines(FileSource):
    """Plain JSON lines. Only chunk boundaries are searched for here; the worker reads.

    Raises:
        ValueError: the file begins like another format.
    """

    def __init__(self, number: int, path: str, flags: FlagNames = TOOL_FLAGS):
        super().__init__(number, path, flags)
        with open(path, "rb", buffering=0) as file:
            require_json_lines(file.read(HEAD_BYTES), path)

    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = DEFAULT_CHUNK_BYTES
    ) -> Iterator[Chunk]:
        """Cut the file; see `DocumentSource.chunks`."""
        with open(self.path, "rb", buffering=0) as file:
            while start < self.size:
                end = find_line_end(file, start, chunk_bytes, self.size, self.path)
                yield self._chunk(start, end, end - start, None)
                start = end


class CompressedLines(FileSource):
    """JSON lines in a compressed file of one or more members (frames)."""

    padding = b""
    """bytes allowed between members"""

    @abstractmethod
    def _codec(self) -> tuple[Callable[[], Any], type[Exception]]:
        """Return a constructor of decompressors, and the error they raise on bad data."""

    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = DEFAULT_CHUNK_BYTES
    ) -> Iterator[Chunk]:
        """Decompress and cut the text; see `DocumentSource.chunks`."""
        with open(self.path, "rb", buffering=0) as file:
            pieces = skip_bytes(self._decompress(file), start)
            counted = file.tell()  # compressed bytes that chunks account for
            last = None
            for data in cut_lines(pieces, chunk_bytes, self.path, start):
                if last:
                    yield last
                position = file.tell()
                end = start + len(data)
                last = self._chunk(start, end, position - counted, data)
                counted = position
                start = end
            if last:  # held back: it also accounts for what follows the text in the file
                yield replace(last, disk_bytes=last.disk_bytes + self.size - counted)

    def _decompress(self, file: BinaryIO) -> Iterator[bytes]:
        """Yield the text in small pieces.

        The libraries' file objects are not used: that of zstandard takes a truncated frame
        for the end of the file.
        """
        new_decompressor, data_error = self._codec()
        text_bytes = 0
        raw = b""
        member = None
        is_first = True
        try:
            while True:
                raw = raw or file.read(_COMPRESSED_READ_BYTES)
                if not raw:
                    break
                if member is None:
                    if not is_first:
                        raw = raw.lstrip(self.padding)
                    if not raw:
                        continue
                    member = new_decompressor()
                    is_first = False
                text = member.decompress(raw)
                raw = member.unused_data
                if member.eof:
                    member = None
                text_bytes += len(text)
                if text:
                    yield text
            if is_first:
                raise EOFError("the file is empty")
            if member is not None:
                raise EOFError("the file ends too early")
        except (EOFError, data_error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk failed; bz2 raises OSError without a number
            raise ValueError(
                f"{self.path}: the compressed data is damaged or cut off after {text_bytes} "
                f"bytes of text ({one_line(error)}). Fetch the file again"
            ) from None


class GzipLines(CompressedLines):
    """JSON lines compressed with gzip."""

    padding = b"\0"
    """tape archives are padded with zeros"""

    def _codec(self) -> tuple[Callable[[], Any], type[Exception]]:
        return lambda: zlib.decompressobj(wbits=31), zlib.error


class Bzip2Lines(CompressedLines):
    """JSON lines compressed with bzip2."""

    def _codec(self) -> tuple[Callable[[], Any], type[Exception]]:
        import bz2  # not in every build of Python

        return bz2.BZ2Decompressor, OSError


class XzLines(CompressedLines):
    """JSON lines compressed with xz."""

    padding = b"\0"

    def _codec(self) -> tuple[Callable[[], Any], type[Exception]]:
        import lzma  # not in every build of Python

        return partial(lzma.LZMADecompressor, lzma.FORMAT_XZ), lzma.LZMAError


class ZstandardLines(CompressedLines):
    """JSON lines compressed with Zstandard."""

    def __init__(self, number: int, path: str, flags: FlagNames = TOOL_FLAGS):
        super().__init__(number, path, flags)
        self._import_optional("zstandard")

    def _codec(self) -> tuple[Callable[[], Any], type[Exception]]:
        zstandard = self._import_optional("zstandard")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
        return decompressor.decompressobj, zstandard.ZstdError


class PipeSource(DocumentSource):
    """JSON lines on standard input ("-") or in a named pipe, such as the shell's <(...)."""

    resumable = False

    def __init__(self, number: int, path: str, flags: FlagNames = TOOL_FLAGS):
        self._is_stdin = path == "-"
        super().__init__(number, "standard input" if self._is_stdin else path, flags)

    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = DEFAULT_CHUNK_BYTES
    ) -> Iterator[Chunk]:
        """Cut the text as it arrives; see `DocumentSource.chunks`."""
        if self._is_stdin:
            opened = nullcontext(sys.stdin.buffer)
        else:
            opened = open(self.path, "rb")  # noqa: SIM115 - closed by the with below
        with opened as file:
            pieces = iter(lambda: file.read1(_PIPE_READ_BYTES), b"")
            for data in cut_lines(skip_bytes(pieces, start), chunk_bytes, self.path, start):
                yield self._chunk(start, start + len(data), 0, data)
                start += len(data)


class Parquet(FileSource):
    """The columns of a Parquet file that are named like the keys."""

    unit = "row"

    def __init__(self, number: int, path: str, flags: FlagNames = TOOL_FLAGS):
        super().__init__(number, path, flags)
        self._import_optional("pyarrow.parquet")

    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = DEFAULT_CHUNK_BYTES
    ) -> Iterator[Chunk]:
        """Cut the rows; see `DocumentSource.chunks`."""
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        problem = f"{self.path} is damaged, or no parquet file"
        with (
            _as_value_error(problem, ArrowException, OSError),
            ParquetFile(
                self.path,
                pre_buffer=False,
                buffer_size=_PARQUET_BUFFER_BYTES,
                page_checksum_verification=True,
            ) as file,
        ):
            total = file.metadata.num_rows
            _check_columns(self.path, file.schema_arrow.names, keys, self.flags)
            rows = self._rows(file, keys, start, chunk_bytes)
            for first, last, columns in cut_rows(rows, keys, start, chunk_bytes):
                disk_bytes = self.size * last // total - self.size * first // total
                yield self._chunk(first, last, disk_bytes, columns)

    def _rows(
        self, file: Any, keys: Sequence[str], start: int, chunk_bytes: int
    ) -> Iterator[tuple]:
        """Yield the rows from `start` on, one value per key, without reading earlier groups."""
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if start >= group.num_rows:
                start -= group.num_rows
                continue
            rows_per_chunk = group.num_rows * chunk_bytes // max(1, group.total_byte_size)
            batch_rows = max(1, min(_PARQUET_BATCH_ROWS, rows_per_chunk))
            for batch in file.iter_batches(batch_rows, row_groups=[number], columns=list(keys)):
                yield from zip(*(_to_values(batch.column(key)[start:]) for key in keys))
                start = max(0, start - len(batch))


class HuggingFace(DocumentSource):
    """A streamed dataset of the Hugging Face Hub or a local folder: `hf:NAME[@CONFIG][:SPLIT]`.

    Its identity consists of its name and, for a local folder, the state of the files: a new
    revision of a dataset on the Hub goes unnoticed.
    """

    unit = "row"

    def __init__(self, number: int, path: str, flags: FlagNames = TOOL_FLAGS):
        super().__init__(number, path, flags)
        form = _HF_PATTERN.fullmatch(path)
        if not form:
            raise ValueError(
                f"{flags.input} is {path!r}; allowed for a Hugging Face dataset: {_HF_FORM}"
            )
        self._name = form[1]
        self._config = form[2]
        self._split = form[3] or "train"
        self._import_optional("datasets")
        self._files: list[list] = []
        if os.path.isdir(self._name):
            paths = [path for path in Path(self._name).rglob("*") if path.is_file()]
            for file in sorted(str(path.resolve()) for path in paths):
                stat = os.stat(file)
                self._files.append([file, stat.st_size, stat.st_mtime_ns])

    def identity(self) -> list:
        """Return [path, 0, 0, [path, bytes and modification time of each local file]]."""
        return [self.path, 0, 0, self._files]

    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = DEFAULT_CHUNK_BYTES
    ) -> Iterator[Chunk]:
        """Cut the rows; see `DocumentSource.chunks`."""
        rows = self._rows(keys, start)
        for first, last, columns in cut_rows(rows, keys, start, chunk_bytes):
            yield self._chunk(first, last, 0, columns)

    def _rows(self, keys: Sequence[str], start: int) -> Iterator[tuple]:
        from datasets import load_dataset

        problem = f"{self.flags.input} {self.path} cannot be read"
        with _as_value_error(problem, Exception):  # the library raises errors of many types
            dataset = load_dataset(self._name, self._config, split=self._split, streaming=True)
            names = dataset.column_names or list(next(iter(dataset), ()))
        _check_columns(self.path, names, keys, self.flags)
        with _as_value_error(problem, Exception):
            for row in dataset.select_columns(list(keys)).skip(start):
                yield tuple(row.get(key) for key in keys)


FILE_FORMATS: dict[str, type[FileSource]] = {
    ".jsonl": JsonLines,
    ".json": JsonLines,
    ".gz": GzipLines,
    ".bz2": Bzip2Lines,
    ".xz": XzLines,
    ".zst": ZstandardLines,
    ".zstd": ZstandardLines,
    ".parquet": Parquet,
}
"""the reader for each suffix, in lower case"""


def _to_values(column: Any) -> list:
    """Convert an Arrow array; strings that are not UTF-8, which Parquet allows, become bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decode_if_utf8(value) for value in column.cast("binary").to_pylist()]


def _decode_if_utf8(value: bytes | None) -> str | bytes | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _check_columns(
    path: str, names: Sequence[str], keys: Sequence[str], flags: FlagNames
) -> None:
    """Raise ValueError unless exactly one column is named like each key."""
    for key in keys:
        number = list(names).count(key)
        if number == 0:
            raise ValueError(
                f"{path}: no column {key!r}; there are: {format_names(names)}. Set {flags.keys}"
            )
        if number > 1:
            raise ValueError(
                f"{path}: {number} columns are named {key!r}; allowed: one. Rename the "
                f"others, or set {flags.keys} to another column"
            )


@contextmanager
def _as_value_error(problem: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors of a library into a ValueError of one line: `problem (its message)`."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{problem} ({one_line(error)})") from None
