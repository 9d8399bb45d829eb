"""Cutting text and table rows into chunks, at positions that depend on the content only."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

MAX_LINE_BYTES = 128 << 20
"""limit for the part of a line beyond its chunk: parsing needs several times as much memory"""
_SEARCH_BYTES = 1 << 16
"""bytes read at a time in search of the end of a line"""


def find_line_end(file: io.FileIO, start: int, chunk_bytes: int, size: int, path: str) -> int:
    """Find where the chunk that starts at byte `start` of a file ends.

    Args:
        chunk_bytes: the chunk ends after the line that makes it this long or longer.
        size: size of the file when it was opened; the file may have changed since.
        path: name of the file in messages.

    Returns:
        The position after a line feed, or `size` when there is none.

    Raises:
        ValueError: the line is longer than MAX_LINE_BYTES.
    """
    position = start + chunk_bytes - 1
    limit = position + MAX_LINE_BYTES
    file.seek(position)
    while position < size:
        block = file.read(_SEARCH_BYTES)
        if not block:
            break
        found = block.find(b"\n")
        if found >= 0:
            return min(position + found + 1, size)
        position += len(block)
        if position > limit:
            file.seek(start)
            head = file.read(chunk_bytes - 1)
            raise _line_too_long_error(path, start + head.rfind(b"\n") + 1)
    return size


def cut_lines(
    pieces: Iterable[bytes], chunk_bytes: int, path: str, start: int
) -> Iterator[bytes]:
    """Regroup a text into parts that end after the line that fills `chunk_bytes`.

    Args:
        pieces: the text, divided anywhere.
        path: name of the source in messages.
        start: position of the text in the source, for messages.

    Raises:
        ValueError: a line is longer than MAX_LINE_BYTES.
    """
    pending = bytearray()
    searched = chunk_bytes - 1  # line feeds before this byte do not end a chunk
    for piece in pieces:
        pending += piece
        while True:
            end = pending.find(b"\n", searched) + 1
            if not end:
                break
            with memoryview(pending) as view:
                part = bytes(view[:end])
            del pending[:end]
            searched = chunk_bytes - 1
            start += end
            yield part
        searched = max(searched, len(pending))
        if len(pending) >= chunk_bytes + MAX_LINE_BYTES:
            raise _line_too_long_error(path, start + pending.rfind(b"\n") + 1)
    if pending:
        yield bytes(pending)


def skip_bytes(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Return `pieces` without their first `count` bytes, which are consumed here."""
    while count > 0:
        piece = next(pieces, b"")
        if not piece:
            break
        count -= len(piece)
        if count < 0:
            return chain([piece[count:]], pieces)
    return pieces


def cut_rows(
    rows: Iterable[tuple], keys: Sequence[str], start: int, chunk_bytes: int
) -> Iterator[tuple[int, int, dict[str, list]]]:
    """Group table rows; a group ends with the row that fills `chunk_bytes` characters.

    Args:
        rows: one value per key, from row `start` on.

    Yields:
        (first row, row after the last, values by key).
    """
    group: list[tuple] = []
    size = 0
    for row in rows:
        group.append(row)
        size += 1  # rows without text count, too
        size += sum(len(value) for value in row if isinstance(value, str | bytes))
        if size >= chunk_bytes:
            yield start, start + len(group), _to_columns(group, keys)
            start += len(group)
            group = []
            size = 0
    if group:
        yield start, start + len(group), _to_columns(group, keys)


def _to_columns(rows: list[tuple], keys: Sequence[str]) -> dict[str, list]:
    return {key: list(column) for key, column in zip(keys, zip(*rows))}


def _line_too_long_error(path: str, position: int) -> ValueError:
    return ValueError(
        f"{path}: the line that begins at byte {position} of the text is longer than "
        f"{MAX_LINE_BYTES} bytes; allowed: one JSON object per line, none longer. Rewrite the "
        f"file (a JSON array: jq -c '.[]')"
    )
