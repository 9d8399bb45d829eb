"""Chunks of documents and what is in them: JSON lines or rows -> the strings under some keys.

Nothing is passed over in silence: a record that cannot be used is a `RejectedRecord` with its place and reason.
"""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson

CHUNK_BYTES = 8 << 20
LARGEST_RECORD = 128 << 20
"""bytes of a line beyond its chunk: parsing takes several times as much memory"""
NO_MEMORY = "Not enough memory"
"""how orjson, which has no other error, words it"""
SHOWN_NAMES = 300
"""characters of a list of keys in a message: a record can have thousands"""
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RejectedRecord:
    """A record that cannot be used.

    Attributes:
        line: its number within the chunk, from 1.
        before: usable documents before it in the chunk.
        reason: without the place, which `Chunk.place` gives, and without what to do about it.
        raw: the line as it was, without its line feed; of a row, its values in JSON.
    """

    line: int
    before: int
    reason: str
    raw: bytes


@dataclass(frozen=True)
class Parsed:
    """What is in a chunk.

    Attributes:
        texts: key -> its string of each usable document; a document is usable when all keys are good.
        lines: lines or rows of the chunk, blank lines included.
        rejected: in their order.
    """

    texts: dict[str, list[str]]
    lines: int
    rejected: list[RejectedRecord]


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one source: the work of one process, which it is pickled to.

    Attributes:
        source: number of the source in the list.
        path: of the source, as in messages.
        unit: "line" or "row".
        start: where the first record begins: a byte of the text (decompressed, if need be), or the number of a row.
        end: just behind the last record; `chunks(start=end)` continues here.
        read: bytes of the file on disk that the chunk stands for, 0 when unknown. They sum up to the file's size; when
            continued, to what was left (compressed files: about).
        data: the lines; key -> value of each row; or None for bytes [start, end) of the file `path`.
    """

    source: int
    path: str
    unit: str
    start: int
    end: int
    read: int
    data: bytes | dict[str, list] | None

    def place(self, number: int) -> str:
        """Of a record in messages: `PATH:LINE`, or `PATH, row N`; `number` counts from the source's begin, from 1."""
        return (
            f"{self.path}:{number}"
            if self.unit == "line"
            else f"{self.path}, {self.unit} {number}"
        )

    def refusal(self, rejected: RejectedRecord, number: int) -> ValueError:
        """The error of a record that is not to be skipped; `number` as for `place`."""
        return ValueError(
            f"{self.place(number)}: {rejected.reason}. Correct or remove it, or leave such records out: "
            f"--on-error skip"
        )

    def parse(self, keys: Sequence[str]) -> Parsed:
        """The strings under `keys`; blank lines are no documents.

        Raises:
            OSError: the file cannot be read any more, or the memory is used up.
            ValueError: the file was cut short meanwhile.
        """
        if isinstance(self.data, dict):
            return _parse_rows(self.data, keys)
        data = self._read() if self.data is None else self.data
        if not self.start:
            data = data.removeprefix(BOM)
        return _parse_lines(data, keys)

    def _read(self) -> bytes:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            parts, left = [], self.end - self.start
            while left and (part := file.read(left)):  # one read gives 2 GiB at most
                parts.append(part)
                left -= len(part)
        if left:
            raise ValueError(
                f"{self.path} became shorter while it was read: it ends before byte {self.end}. Start "
                f"again when nothing writes to it"
            )
        return b"".join(parts)


def _parse_lines(data: bytes, keys: Sequence[str]) -> Parsed:
    usable: list[dict[str, str]] = []
    rejected: list[RejectedRecord] = []
    add, loads, number = usable.append, orjson.loads, 0
    for line in io.BytesIO(
        data
    ):  # the fastest of split, find and this, which also copies line by line only
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
            _require_memory(error, line)
        if not line.isspace():
            rejected.append(
                RejectedRecord(
                    number,
                    len(usable),
                    _why_not_line(line.rstrip(), keys),
                    line.removesuffix(b"\n"),
                )
            )
    return Parsed({key: [record[key] for record in usable] for key in keys}, number, rejected)


def _why_not_line(line: bytes, keys: Sequence[str]) -> str:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _require_memory(error, line)
        return f"not a JSON object in UTF-8 ({error})"
    if not isinstance(record, dict):
        return f"the line is a JSON {type(record).__name__}; allowed: an object"
    for key in keys:
        if key not in record:
            return f"no key {key!r}; there are: {listed(record)}. Set --json-keys"
        if not isinstance(record[key], str):
            break
    return f"{key!r} is a JSON {type(record[key]).__name__}; allowed: a string"


def _require_memory(error: Exception, line: bytes) -> None:
    """Raise OSError when `error` says nothing about the line."""
    if isinstance(error, orjson.JSONDecodeError) and str(error).startswith(NO_MEMORY):
        raise OSError(
            errno.ENOMEM,
            f"not enough memory to parse a line of {len(line)} bytes. Use fewer --workers, or "
            f"a machine with more memory",
        ) from None


def _parse_rows(columns: dict[str, list], keys: Sequence[str]) -> Parsed:
    usable: list[tuple[str, ...]] = []
    rejected: list[RejectedRecord] = []
    number = 0
    for number, row in enumerate(zip(*(columns[key] for key in keys)), 1):
        if reason := next(
            (why for key, value in zip(keys, row) if (why := _why_not_value(key, value))), ""
        ):
            raw = json.dumps(
                dict(zip(keys, row)), default=repr
            ).encode()  # orjson refuses lone surrogates
            rejected.append(RejectedRecord(number, len(usable), reason, raw))
        else:
            usable.append(row)
    return Parsed(
        {key: [row[i] for row in usable] for i, key in enumerate(keys)}, number, rejected
    )


def _why_not_value(key: str, value: object) -> str:
    """Empty: a good value."""
    if not isinstance(value, str):
        return f"{key!r} is {'binary' if isinstance(value, bytes) else type(value).__name__}; allowed: a string"
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        return f"{key!r} has a lone surrogate; allowed: a string in UTF-8"
    return ""


def no_documents(inputs: Sequence[str], skipped: int) -> ValueError:
    """The error of inputs that turned out to be empty, or of which every record was skipped."""
    return ValueError(
        f"--input {' '.join(inputs)} has no documents"
        + (f": all {skipped} records were skipped" if skipped else "")
    )


def listed(names: Iterable[str]) -> str:
    """Names on one line, however many and whatever they contain."""
    text = ", ".join(names) or "none"
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= SHOWN_NAMES else f"{text[:SHOWN_NAMES]} ..."
