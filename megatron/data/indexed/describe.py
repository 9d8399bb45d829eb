"""Text report of an inspected token dataset."""

from __future__ import annotations

import itertools
import math
from typing import Any

_LONGEST_BAR = 40  # characters of the longest bar of the histogram
_SHOWN_ITEMS = 5  # items shown of a list in the sidecar

_Row = tuple[str, str]
"""A label and its text"""


def describe(found: dict[str, Any]) -> list[str]:
    """Return the lines of a report.

    Args:
        found: result of `summarize`; the statistics of `scan`, if available, under "full".
    """
    rows = _size_rows(found) + _sidecar_rows(found["sidecar"])
    rows += [_document_row(document) for document in found["first_documents"]]
    if found["not_decoded"]:
        rows.append(("not decoded", f"{found['not_decoded']}. Give the tokenizer's flags"))
    if "full" in found:
        rows += _scan_rows(found["full"])
    rows += _verdict_rows(found)
    lines = [f"  {label:13s} {text}".rstrip() for label, text in rows]
    return [found["prefix"], *lines]


def _size_rows(found: dict[str, Any]) -> list[_Row]:
    rows = [
        (
            "format",
            f"version {found['format_version']}, {found['dtype']}, {found['sequences']} "
            f"sequences, {found['document_index_entries']} document-index entries",
        ),
        ("files", f".bin {found['bin_bytes']} bytes, .idx {found['idx_bytes']} bytes"),
        (
            "documents",
            f"{found['documents']}, {found['empty_documents']} of them empty; "
            f"{found['tokens']} tokens",
        ),
    ]
    length = found["document_length"]
    if length:
        text = (
            f"min {length['min']}, median {length['median']:g}, mean {length['mean']:.1f}, "
            f"max {length['max']}"
        )
        rows.append(("lengths", text))
    return rows + [("", line) for line in _bars(found["histogram"])]


def _bars(histogram: list[dict[str, Any]]) -> list[str]:
    """Return a line with a bar for each range of lengths, from the first non-empty one on."""
    largest = max((row["share"] for row in histogram), default=0)
    lines = []
    for row in itertools.dropwhile(lambda row: not row["documents"], histogram):
        bar = "#" * math.ceil(_LONGEST_BAR * row["share"] / largest)
        lines.append(
            f"{row['from']:>10} to {row['to']:<10} {row['documents']:>10} {row['share']:7.2%} {bar}"
        )
    return lines


def _sidecar_rows(sidecar: dict[str, Any] | None) -> list[_Row]:
    if sidecar is None:
        return [("record", "none (there is no .json)")]
    return [("record", f"{entry}: {_sidecar_value(value)}") for entry, value in sidecar.items()]


def _sidecar_value(value: Any) -> str:
    """Return an entry of the sidecar as text; a long list is cut."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    if not isinstance(value, list):
        return str(value)
    text = " ".join(map(str, value[:_SHOWN_ITEMS]))
    if len(value) > _SHOWN_ITEMS:
        text += f" ... ({len(value)} in all)"
    return text


def _document_row(document: dict[str, Any]) -> _Row:
    if document["text"] is None:
        shown = " ".join(map(str, document["ids"]))
    else:
        shown = repr(document["text"])
    if document["length"] > len(document["ids"]):
        shown += " ..."
    return f"document {document['document']}", f"{document['length']} tokens: {shown}"


def _scan_rows(full: dict[str, Any]) -> list[_Row]:
    vocabulary = full["vocab_size"]
    if vocabulary is None:
        vocabulary = "unknown"
    return [
        (
            "ids",
            f"{full['smallest_id']} to {full['largest_id']}, {full['distinct_ids']} distinct, "
            f"{full['ids_outside']} outside the vocabulary (its size: {vocabulary})",
        ),
        (
            "ends",
            f"{full['documents_ending_with_eod']} documents end with {full['eod']} "
            f"({full['eod_source']}), {full['documents_with_eod_inside']} have it inside, "
            f"{full['documents_without_eod']} nowhere",
        ),
        ("sha256", f".bin {full['bin_sha256']}"),
        ("", f".idx {full['idx_sha256']}"),
    ]


def _verdict_rows(found: dict[str, Any]) -> list[_Row]:
    if found["faults"]:
        return [("FAULT", fault) for fault in found["faults"]]
    if "full" in found:
        return [("sound", "all of it")]
    return [("sound", "as far as read (--full reads all tokens)")]
