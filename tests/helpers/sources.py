"""Helpers for the tests of document sources: reading a source to its end."""

from __future__ import annotations

import pickle
from pathlib import Path

from megatron.data.ingest.formats import DocumentSource
from megatron.data.ingest.sources import open_sources

KEYS = ["text", "title"]


def open_source(path: str | Path) -> DocumentSource:
    """Open the source that one word after `--input` stands for."""
    (source,) = open_sources([str(path)])
    return source


def read(
    source: DocumentSource, keys=("text",), **arguments
) -> tuple[list[tuple], list[tuple[int, int, str]], int]:
    """Read a source to its end.

    Returns:
        (values of each document, (number, documents before it, reason) of each rejected
        record, number of records).
    """
    documents = []
    rejected = []
    lines = 0
    for chunk in source.chunks(keys, **arguments):
        parsed = pickle.loads(pickle.dumps(chunk)).parse(keys)
        assert parsed == chunk.parse(keys)
        assert len({len(parsed.texts[key]) for key in keys}) == 1
        for r in parsed.rejected:
            before = len(documents) + r.documents_before
            rejected.append((lines + r.line, before, r.reason))
        documents += zip(*(parsed.texts[key] for key in keys))
        lines += parsed.lines
    return documents, rejected, lines


def read_texts(source: DocumentSource, **arguments) -> list[str]:
    """Read the texts of a source in which no record is rejected."""
    documents, rejected, _ = read(source, **arguments)
    assert not rejected
    return [text for (text,) in documents]
