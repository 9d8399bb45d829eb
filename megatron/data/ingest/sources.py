"""Documents out of files and streams: the one place that reads them.

A `DocumentSource` cuts its file into chunks, which is cheap and done by one process; `Chunk.parse` reads and parses, which is
not, and can be done by any process. A file that is damaged or cut short is an error, never just shorter.
"""

from __future__ import annotations

import glob
import importlib
import io
import os
import re
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from megatron.data.ingest.records import (
    CHUNK_BYTES,
    LARGEST_RECORD,
    Chunk,
    listed,
)
from megatron.tokenizer.base import one_line

SEEK_BYTES = 1 << 16
"""read at once when looking for the end of a line"""
PIPE_BYTES = 1 << 20
RAW_BYTES = 1 << 14
"""compressed bytes decompressed at once: few, because zstd can make 32,000 times as many of them"""
BATCH_ROWS = 1024
"""rows of a parquet file decoded at once, at most: rows can be much longer than their average"""


class DocumentSource(ABC):
    """A file or stream of documents.

    Attributes:
        number: place in the list that `open_sources` gives.
        path: as in messages.
        size: bytes on disk; 0: unknown.
        unit: "line" or "row".
        resumable: whether a later run can read it again.
    """

    unit = "line"
    resumable = True
    size = 0

    def __init__(self, number: int, path: str):
        self.number, self.path = number, path

    @abstractmethod
    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[Chunk]:
        """All records from `start` (0 or the `end` of a chunk) on.

        A chunk ends with the record that makes its text `chunk_bytes` long or longer, wherever the chunk began; so it
        is at most one record longer than that.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, has no column of a key's name, or a line that is longer than LARGEST_RECORD.
        """

    def identity(self) -> list:
        """JSON values that differ when the content does: absolute path, size in bytes, time of change in ns."""
        return [self.path, 0, 0]


class FileSource(DocumentSource):
    """A regular file."""

    def __init__(self, number: int, path: str):
        super().__init__(number, path)
        stat = os.stat(path)
        self.size, self._changed = stat.st_size, stat.st_mtime_ns

    def identity(self) -> list:
        return [os.path.abspath(self.path), self.size, self._changed]


class JsonLines(FileSource):
    """Plain JSON lines: only the cuts are looked for here, the worker reads."""

    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[Chunk]:
        with open(self.path, "rb", buffering=0) as file:
            while start < self.size:
                end = self._line_end(file, start, start + chunk_bytes - 1)
                yield Chunk(self.number, self.path, self.unit, start, end, end - start, None)
                start = end

    def _line_end(self, file: io.FileIO, start: int, at: int) -> int:
        """Just behind the first line feed at or after byte `at`; the file's size as of its opening when there is none
        (it may have grown or shrunk since). A line begins at `start`."""
        file.seek(at)
        limit = at + LARGEST_RECORD
        while at < self.size and (block := file.read(SEEK_BYTES)):
            if (found := block.find(b"\n")) >= 0:
                return min(at + found + 1, self.size)
            at += len(block)
            if at > limit:
                file.seek(start)
                raise _too_long(
                    self.path,
                    start + file.read(limit - LARGEST_RECORD - start).rfind(b"\n") + 1,
                )
        return self.size


class CompressedLines(FileSource):
    """JSON lines in gzip or Zstandard, of any number of members (frames)."""

    def __init__(self, number: int, path: str):
        super().__init__(number, path)
        self._gzip = _suffix(path) == ".gz"
        if not self._gzip:
            _package("zstandard", path)

    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[Chunk]:
        with open(self.path, "rb", buffering=0) as file:
            pieces = _skip(self._decompress(file), start)
            told, last = file.tell(), None
            for data in _cut(pieces, chunk_bytes, self.path, start):
                if last:
                    yield last
                read, told, end = file.tell() - told, file.tell(), start + len(data)
                last = Chunk(self.number, self.path, self.unit, start, end, read, data)
                start = end
            if last:  # held back because it also stands for what follows the text in the file
                yield replace(last, read=last.read + self.size - told)

    def _decompress(self, file: BinaryIO) -> Iterator[bytes]:
        """The text in small pieces. The decompressors' file objects are not used because zstandard's takes a cut off
        frame for the end of the file."""
        if self._gzip:
            damage, padding, new = (
                zlib.error,
                b"\0",
                partial(zlib.decompressobj, wbits=31),
            )  # tapes pad with zeros
        else:
            zstd = _package(
                "zstandard", self.path
            )  # with big windows: large corpora come in `zstd --long=31`
            damage, padding, new = (
                zstd.ZstdError,
                b"",
                zstd.ZstdDecompressor(max_window_size=1 << 31).decompressobj,
            )
        done, raw, member, first = 0, b"", None, True
        try:
            while raw := raw or file.read(RAW_BYTES):
                if not member:
                    raw = raw if first else raw.lstrip(padding)
                    if not raw:
                        continue
                    member, first = new(), False
                text = member.decompress(raw)
                raw = member.unused_data
                member = None if member.eof else member
                done += len(text)
                if text:
                    yield text
            if first or member:
                raise EOFError("the file is empty" if first else "the file ends too early")
        except (EOFError, damage) as error:
            raise ValueError(
                f"{self.path}: the compressed data is damaged or cut off after {done} bytes of text "
                f"({one_line(error)}). Fetch the file again"
            ) from None


class PipeSource(DocumentSource):
    """JSON lines on standard input (path "-") or in a named pipe, such as the shell's <(...)."""

    resumable = False

    def __init__(self, number: int, path: str):
        super().__init__(number, "standard input" if path == "-" else path)
        self._is_stdin = path == "-"

    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[Chunk]:
        with nullcontext(sys.stdin.buffer) if self._is_stdin else open(self.path, "rb") as file:
            pieces = iter(lambda: file.read1(PIPE_BYTES), b"")
            for data in _cut(_skip(pieces, start), chunk_bytes, self.path, start):
                yield Chunk(
                    self.number, self.path, self.unit, start, start + len(data), 0, data
                )
                start += len(data)


class Parquet(FileSource):
    """The columns of a parquet file whose names are the keys."""

    unit = "row"

    def __init__(self, number: int, path: str):
        super().__init__(number, path)
        _package("pyarrow.parquet", path)

    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[Chunk]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        with (
            _one_error(self.path, "is damaged, or no parquet file", ArrowException, OSError),
            ParquetFile(
                self.path,
                pre_buffer=False,
                buffer_size=1 << 20,  # else a row group's whole column is read at once
                page_checksum_verification=True,
            ) as file,
        ):
            total = file.metadata.num_rows
            _check_columns(self.path, file.schema_arrow.names, keys)
            for first, last, columns in _cut_rows(
                self._rows(file, keys, start, chunk_bytes), keys, start, chunk_bytes
            ):
                read = self.size * last // total - self.size * first // total
                yield Chunk(self.number, self.path, self.unit, first, last, read, columns)

    def _rows(
        self, file: Any, keys: Sequence[str], start: int, chunk_bytes: int
    ) -> Iterator[tuple]:
        """The values of each row from row `start` on; earlier row groups are not read."""
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if start >= group.num_rows:
                start -= group.num_rows
                continue
            rows = max(
                1,
                min(BATCH_ROWS, group.num_rows * chunk_bytes // max(1, group.total_byte_size)),
            )
            for batch in file.iter_batches(rows, row_groups=[number], columns=list(keys)):
                yield from zip(*(_values(batch.column(key)[start:]) for key in keys))
                start = max(0, start - len(batch))


class HuggingFace(DocumentSource):
    """A dataset of the Hugging Face Hub, or in a local folder, streamed: `hf:NAME[@CONFIG][:SPLIT]`.

    Its identity is its name, and the state of the files if that is a local folder: a new revision of a dataset of the
    Hub is not noticed.
    """

    unit = "row"

    def __init__(self, number: int, path: str):
        super().__init__(number, path)
        form = re.fullmatch(r"hf:([^@:]+)(?:@([^@:]+))?(?::(.+))?", path)
        if not form:
            raise ValueError(
                f"--input is {path!r}; allowed for a Hugging Face dataset: hf:NAME[@CONFIG][:SPLIT]"
            )
        self._name, self._config, self._split = form[1], form[2], form[3] or "train"
        _package("datasets", path)
        self._files = (
            [
                [file, stat.st_size, stat.st_mtime_ns]
                for file in sorted(
                    str(file.resolve())
                    for file in Path(self._name).rglob("*")
                    if file.is_file()
                )
                for stat in [os.stat(file)]
            ]
            if os.path.isdir(self._name)
            else []
        )

    def identity(self) -> list:
        return [self.path, 0, 0, self._files]

    def chunks(
        self, keys: Sequence[str], start: int = 0, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[Chunk]:
        for first, last, columns in _cut_rows(
            self._rows(keys, start), keys, start, chunk_bytes
        ):
            yield Chunk(self.number, self.path, self.unit, first, last, 0, columns)

    def _rows(self, keys: Sequence[str], start: int) -> Iterator[tuple]:
        from datasets import load_dataset

        with _one_error(
            f"--input {self.path}", "cannot be read", Exception
        ):  # the library raises all sorts
            dataset = load_dataset(self._name, self._config, split=self._split, streaming=True)
            names = dataset.column_names or list(next(iter(dataset), ()))
        _check_columns(self.path, names, keys)
        with _one_error(f"--input {self.path}", "cannot be read", Exception):
            for row in dataset.select_columns(list(keys)).skip(start):
                yield tuple(row.get(key) for key in keys)


def open_sources(inputs: Sequence[str]) -> list[DocumentSource]:
    """The sources that `--input` names, in that order.

    Args:
        inputs: files, glob patterns (`**` too; any file that matches), folders (searched for files of a known suffix,
            in the order of their names; hidden ones are left out), `-` for standard input, `hf:NAME[@CONFIG][:SPLIT]`.
            The suffix says what a file is; one that is not known stands for JSON lines.

    Raises:
        FileNotFoundError: an input does not exist, or a pattern matches no file.
        ValueError: a folder has no such files, an input is named twice, or an optional package is missing.
        OSError: a folder or file cannot be looked at.
    """
    paths = [path for entry in inputs for path in _expand(entry)]
    seen: dict[tuple[int, int] | str, str] = {}
    for path in paths:
        name = path if path == "-" or path.startswith("hf:") else os.path.abspath(path)
        place = _place(path)
        if place in seen:
            also = "" if seen[place] == name else f" (also as {seen[place]})"
            raise ValueError(
                f"--input names {name} twice{also}; allowed: each once (a folder or pattern names its "
                f"files)"
            )
        seen[place] = name
    return [_open(number, path) for number, path in enumerate(paths)]


def _place(path: str) -> tuple[int, int] | str:
    """The same for all names of a file: what it is on the disk, if it is there."""
    if path.startswith("hf:"):
        return path
    try:
        stat = os.stat(0 if path == "-" else path)  # a number is a file descriptor
    except OSError:  # said at its opening
        return os.path.abspath(path)
    return stat.st_dev, stat.st_ino


def _expand(entry: str) -> list[str]:
    """The paths of one word behind `--input`."""
    if os.path.isdir(entry):
        return _files_in(entry)
    if not glob.has_magic(entry) or os.path.exists(entry):
        return [entry]
    found = sorted(
        path
        for path in glob.glob(entry, recursive=True)
        if not os.path.isdir(path) and not _is_work_folder(os.path.dirname(path))
    )
    if not found:
        raise FileNotFoundError(f"--input {entry} matches no file")
    return found


def _files_in(folder: str) -> list[str]:
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, onerror=_reraise, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not _is_work_folder(os.path.join(parent, name))
        )
        paths = [
            os.path.join(parent, name)
            for name in files
            if not name.startswith(".") and _suffix(name) in KINDS
        ]
        found += [
            path
            for path in paths
            if not _is_sidecar(path)
            and (  # a link to nothing is not passed over
                os.path.isfile(path) or not os.path.exists(path)
            )
        ]  # pipes and devices are
    if not found:
        raise ValueError(
            f"--input {folder} is a folder without files of a known suffix; known: {' '.join(KINDS)}"
        )
    return sorted(found)


def _is_work_folder(folder: str) -> bool:
    """Whether it holds what a run of ours has not published (see `WorkFolder`)."""
    return folder.endswith(".partial") and os.path.isfile(os.path.join(folder, "lock"))


def _is_sidecar(path: str) -> bool:
    """Whether it belongs to a pair of token shards, such as streaming keeps beside the text."""
    stem, suffix = os.path.splitext(path)
    return suffix == ".json" and os.path.isfile(stem + ".idx")


def _reraise(error: OSError) -> None:
    raise error  # os.walk would leave out a folder that it cannot list


def _open(number: int, path: str) -> DocumentSource:
    if path.startswith("hf:"):
        return HuggingFace(number, path)
    if path == "-":
        if sys.stdin is None:
            raise ValueError(
                "--input - is standard input, which is closed. Send it a file or the output of a program"
            )
        return PipeSource(number, path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"--input {path} does not exist")
    if not os.path.isfile(path):
        return PipeSource(number, path)
    return KINDS.get(_suffix(path), JsonLines)(number, path)


KINDS: dict[str, type[FileSource]] = {
    ".jsonl": JsonLines,
    ".json": JsonLines,
    ".gz": CompressedLines,
    ".zst": CompressedLines,
    ".zstd": CompressedLines,
    ".parquet": Parquet,
}


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _cut(pieces: Iterable[bytes], chunk_bytes: int, path: str, start: int) -> Iterator[bytes]:
    """The same text, cut behind every line that makes the part `chunk_bytes` long or longer.

    Args:
        path, start: where it begins, for messages.
    """
    pending, searched = bytearray(), chunk_bytes - 1
    for piece in pieces:
        pending += piece
        while end := pending.find(b"\n", searched) + 1:
            with memoryview(pending) as view:
                part = bytes(view[:end])
            del pending[:end]
            searched = chunk_bytes - 1
            start += end
            yield part
        searched = max(searched, len(pending))
        if len(pending) >= chunk_bytes + LARGEST_RECORD:
            raise _too_long(path, start + pending.rfind(b"\n") + 1)
    if pending:
        yield bytes(pending)


def _too_long(path: str, at: int) -> ValueError:
    return ValueError(
        f"{path}: the line that begins at byte {at} of the text is longer than {LARGEST_RECORD} bytes; "
        f"allowed: one JSON object per line, none longer. Rewrite the file (a JSON array: jq -c '.[]')"
    )


def _skip(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    """`pieces` without their first `count` bytes, which are taken at once."""
    while count > 0 and (piece := next(pieces, b"")):
        count -= len(piece)
        if count < 0:
            return chain([piece[count:]], pieces)
    return pieces


def _cut_rows(
    rows: Iterable[tuple],
    keys: Sequence[str],
    start: int,
    chunk_bytes: int,
) -> Iterator[tuple[int, int, dict[str, list]]]:
    """(first row, behind the last, key -> values), cut behind every row that makes the text `chunk_bytes` characters
    long or longer. `rows` begin with row `start`."""
    taken: list[tuple] = []
    size = 0
    for row in rows:
        taken.append(row)
        size += 1 + sum(
            len(value) for value in row if isinstance(value, str | bytes)
        )  # 1: rows without text count
        if size >= chunk_bytes:
            yield start, start + len(taken), dict(zip(keys, map(list, zip(*taken))))
            start += len(taken)
            taken, size = [], 0
    if taken:
        yield start, start + len(taken), dict(zip(keys, map(list, zip(*taken))))


def _values(column: Any) -> list:
    """Of an arrow array. Strings that are not UTF-8, which parquet files may hold, become bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_text_or_bytes(value) for value in column.cast("binary").to_pylist()]


def _text_or_bytes(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _check_columns(path: str, names: Sequence[str], keys: Sequence[str]) -> None:
    for key in keys:
        if key not in names:
            raise ValueError(
                f"{path}: no column {key!r}; there are: {listed(names)}. Set --json-keys"
            )
        if list(names).count(key) > 1:
            raise ValueError(
                f"{path}: {list(names).count(key)} columns are named {key!r}; allowed: one. Rename the "
                f"others, or set --json-keys to another column"
            )


def _package(name: str, path: str) -> ModuleType:
    """Import an optional package."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"--input {path} needs the package {name.split('.')[0]}, which is not installed. Install it: "
            f"pip install 'moe-megatron[data]'"
        ) from None


@contextmanager
def _one_error(what: str, problem: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise ValueError(f"{what} {problem} ({one_line(error)})") from None
