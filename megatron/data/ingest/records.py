"""Chunks of records, and parsing them: JSON lines or table rows -> strings by key.

No record is dropped silently: one that cannot be used becomes a `RejectedRecord` with
its position and the reason.
"""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson

from megatron.data.ingest.content import require_json_lines

DEFAULT_CHUNK_BYTES = 8 << 20
_ORJSON_OUT_OF_MEMORY = "Not enough memory"
"""start of the message of a JSONDecodeError that reports a failed allocation"""
_SHOWN_CHARACTERS = 300
"""limit for a list of names in a message: a record can have thousands of keys"""
_BOM = b"\xef\xbb\xbf"
"""numbers that JSON lacks, but Python's json module writes and reads"""


@dataclass(frozen=True)
class FlagNames:
    """Command-line flags that error messages refer to; defaults: those of tools/."""

    input: str = "--input"
    keys: str = "--json-keys"
    output: str = "--output-prefix"
    skip_advice: str = "leave such records out: --on-error skip"
    """how to continue without the records that cannot be used"""


TOOL_FLAGS = FlagNames()


@dataclass(frozen=True)
class RejectedRecord:
    """A record that cannot be used.

    Attributes:
        line: line or row number within the chunk, from 1.
        documents_before: usable documents that precede it in the chunk.
        reason: what is wrong with it, without its position (see `Chunk.location`).
        raw: the line without its line feed; for a table row, its values as JSON.
    """

    line: int
    documents_before: int
    reason: str
    raw: bytes


@dataclass(frozen=True)
class ParsedChunk:
    """The content of a chunk.

    Attributes:
        texts: for each key, the strings of the usable documents. A document is usable
            when the values of all keys are.
        lines: lines or rows of the chunk, blank lines included.
        rejected: records that cannot be used, in order.
    """

    texts: dict[str, list[str]]
    lines: int
    rejected: list[RejectedRecord]


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one source: the unit of work that is pickled to a worker.

    Attributes:
        source: index of the source in the list that `open_sources` returns.
        path: path of the source, as shown in messages.
        unit: "line" or "row".
        start: position of the first record: byte of the (decompressed) text, or row.
        end: position after the last record; `chunks(start=end)` continues there.
        disk_bytes: bytes of the file on disk that the chunk accounts for, 0 if unknown.
            They add up to the size of the file, or of the rest of it when reading
            started in the middle (approximately, for compressed files).
        data: the lines; or the values by key; or None for bytes [start, end) of `path`.
        flags: flags that error messages refer to.
    """

    source: int
    path: str
    unit: str
    start: int
    end: int
    disk_bytes: int
    data: bytes | dict[str, list] | None
    flags: FlagNames = TOOL_FLAGS

    def location(self, number: int) -> str:
        """Format the position of a record for a message: `PATH:LINE` or `PATH, row N`.

        Args:
            number: line or row number within the source, from 1.
        """
        if self.unit == "line":
            return f"{self.path}:{number}"
        return f"{self.path}, {self.unit} {number}"

    def rejection_error(self, rejected: RejectedRecord, number: int) -> ValueError:
        """Build the error for a record that may not be skipped; `number` as in `location`."""
        return ValueError(
            f"{self.location(number)}: {rejected.reason}. Correct or remove it, or "
            f"{self.flags.skip_advice}"
        )

    def parse(self, keys: Sequence[str]) -> ParsedChunk:
        """Extract the strings under `keys`. Blank lines are not documents.

        Raises:
            OSError: the file cannot be read any more, or memory is exhausted.
            ValueError: the file became shorter since the chunk was cut, or is not JSON lines.
        """
        if isinstance(self.data, dict):
            return _parse_rows(self.data, keys)
        data = self._read() if self.data is None else self.data
        if not self.start:
            data = data.removeprefix(_BOM)
            require_json_lines(data, self.path)
        return _parse_lines(data, keys, self.flags.keys)

    def _read(self) -> bytes:
        parts = []
        missing = self.end - self.start
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            while missing:  # a single read returns 2 GiB at most
                part = file.read(missing)
                if not part:
                    break
                parts.append(part)
                missing -= len(part)
        if missing:
            raise ValueError(
                f"{self.path} became shorter while it was read: it ends before byte {self.end}. "
                f"Start again when nothing writes to it"
            )
        return b"".join(parts)


def _parse_lines(data: bytes, keys: Sequence[str], keys_flag: str) -> ParsedChunk:
    usable: list[dict[str, str]] = []
    rejected: list[RejectedRecord] = []
    add = usable.append
    loads = orjson.loads
    number = 0
    # BytesIO is faster than split() or find(), and copies only one line at a time.
    for line in io.BytesIO(data):
        number += 1
        try:
            record = loads(line)
            for key in keys:
                if type(record[key]) is not str:
                    break
            else:
                add(record)
                continue
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            _raise_if_out_of_memory(error, line)
        if line.isspace():
            continue
        record, reason = _read_again(line.rstrip(b"\r\n"), keys, keys_flag)
        if not reason:
            add(record)
            continue
        raw = line.removesuffix(b"\n")
        rejected.append(RejectedRecord(number, len(usable), reason, raw))
    texts = {}
    for key in keys:
        texts[key] = [record[key] for record in usable]
    return ParsedChunk(texts, number, rejected)


def _read_again(line: bytes, keys: Sequence[str], keys_flag: str) -> tuple[Any, str]:
    """Read a line that `_parse_lines` did not accept, with all that Python's json writes.

    Returns:
        The record, and why it cannot be used; empty if it can.
    """
    try:
        record = _load_line(line)
    except orjson.JSONDecodeError as error:
        _raise_if_out_of_memory(error, line)
        return None, _syntax_problem(line, error)
    if not isinstance(record, dict):
        return None, f"the line is a JSON {type(record).__name__}; allowed: an object"
    for key in keys:
        if key not in record:
            names = format_names(record)
            return None, f"no key {key!r}; there are: {names}. Set {keys_flag}"
        if not isinstance(record[key], str):
            kind = type(record[key]).__name__
            return None, f"{key!r} is a JSON {kind}; allowed: a string"
        problem = _value_problem(key, record[key])  # json reads lone surrogates, too
        if problem:
            return None, problem
    return record, ""


def _load_line(line: bytes) -> Any:
    """Parse a line as Python's json does: NaN, 1e400 and lone surrogates; raises as `orjson.loads`.

    Megatron reads such lines, and what they hold is often not under the key of the text.
    """
    # ValueError includes errors of UTF-8; RecursionError: nested too deeply.
    with suppress(ValueError, RecursionError):
        return json.loads(line.decode())
    return orjson.loads(line)


def _syntax_problem(line: bytes, error: orjson.JSONDecodeError) -> str:
    """Explain why a line is not JSON."""
    problem = f"not a JSON object in UTF-8 ({error})"
    record = line.strip()
    if record == b"{":
        return f"{problem}; it continues on the next line; allowed: one per line (jq -c .)"
    outside = line.replace(record, b"").strip(b" \t\r")
    if outside:
        return f"{problem}; {outside!r} around it is no white space in JSON"
    return problem


def _raise_if_out_of_memory(error: Exception, line: bytes) -> None:
    """Raise OSError if parsing failed for lack of memory, not because of the line."""
    if not isinstance(error, orjson.JSONDecodeError):
        return
    if str(error).startswith(_ORJSON_OUT_OF_MEMORY):
        raise OSError(
            errno.ENOMEM,
            f"not enough memory to parse a line of {len(line)} bytes. Use fewer --workers, or "
            f"a machine with more memory",
        ) from None


def _parse_rows(columns: dict[str, list], keys: Sequence[str]) -> ParsedChunk:
    usable: list[tuple[str, ...]] = []
    rejected: list[RejectedRecord] = []
    number = 0
    for number, row in enumerate(zip(*(columns[key] for key in keys)), 1):
        reason = _row_problem(keys, row)
        if reason:
            # json, not orjson: orjson refuses lone surrogates.
            raw = json.dumps(dict(zip(keys, row)), default=repr).encode()
            rejected.append(RejectedRecord(number, len(usable), reason, raw))
        else:
            usable.append(row)
    texts = {}
    for i, key in enumerate(keys):
        texts[key] = [row[i] for row in usable]
    return ParsedChunk(texts, number, rejected)


def _row_problem(keys: Sequence[str], row: tuple) -> str:
    """Return the problem of the first unusable value of a row; empty if there is none."""
    for key, value in zip(keys, row):
        problem = _value_problem(key, value)
        if problem:
            return problem
    return ""


def _value_problem(key: str, value: object) -> str:
    if isinstance(value, bytes):
        return f"{key!r} is binary; allowed: a string"
    if not isinstance(value, str):
        return f"{key!r} is {type(value).__name__}; allowed: a string"
    if value.isascii():
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{key!r} has a lone surrogate; allowed: a string in UTF-8"
    return ""


def no_documents_error(
    inputs: Sequence[str], skipped: int, flags: FlagNames = TOOL_FLAGS
) -> ValueError:
    """Build the error for inputs without documents, or with unusable records only."""
    message = f"{flags.input} {' '.join(inputs)} has no documents"
    if skipped:
        message += f": all {skipped} records were skipped"
    return ValueError(message)


def format_names(names: Iterable[str]) -> str:
    """Format names as one line of bounded length, whatever characters they contain."""
    text = ", ".join(names) or "none"
    if not text.isprintable():
        text = repr(text)[1:-1]
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:_SHOWN_CHARACTERS]} ..."
    return text
