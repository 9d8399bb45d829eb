"""Texts of files of records, for programs that read them once and store nothing."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.data.ingest.formats import DEFAULT_CHUNK_BYTES
from megatron.data.ingest.records import FlagNames
from megatron.data.ingest.sources import open_sources


def read_texts(
    path: str, key: str, flags: FlagNames, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> Iterator[list[str]]:
    """Yield the texts of an input in order, those of one chunk at a time.

    Args:
        path: any input of `open_sources`.
        key: field of a record with its text.
        flags: flags that error messages refer to.
        chunk_bytes: see `DocumentSource.chunks`.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the data is damaged, or a record has no text.
    """
    for source in open_sources([path], flags):
        lines_before = 0
        for chunk in source.chunks([key], chunk_bytes=chunk_bytes):
            parsed = chunk.parse([key])
            for rejected in parsed.rejected:
                raise chunk.rejection_error(rejected, lines_before + rejected.line)
            lines_before += parsed.lines
            yield parsed.texts[key]
