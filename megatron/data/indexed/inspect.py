"""What a pair of token files holds and whether it is sound; the repair of shards that do not count their last tokens.

A fault is something wrong in a pair that can be read. Files that cannot be read are a ValueError, as everywhere.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.data.indexed.reader import (
    VERSION,
    Index,
    IndexedDataset,
    byte_pointers,
    read_index,
    uncounted_ends,
)
from megatron.data.indexed.writer import IndexedWriter, require_space
from megatron.data.splits import check_sidecar
from megatron.tokenizer.base import Tokenizer

BLOCK = 1 << 22  # tokens, or documents, dealt with at once
UNKNOWN_VOCABULARY = (
    1 << 24
)  # no vocabulary is near this large: a larger id is damage, whatever the tokenizer was
BAR = 40  # characters of the longest bar of the histogram

Progress = Callable[[int], object]


@dataclass(frozen=True)
class OpenedDataset:
    """A pair that can be read."""

    index: Index
    """what `.idx` says"""
    dataset: IndexedDataset
    """the documents; those of the repaired index when there are uncounted tokens"""
    uncounted: int
    """last tokens of documents that are in `.bin` but not counted by `.idx`"""


def open_dataset(prefix: str, tokenizer: Tokenizer | None = None) -> OpenedDataset:
    """Open a pair also when its index leaves the last token of each document uncounted.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged in another way, or the sidecar contradicts the tokenizer.
    """
    index, path = read_index(prefix), prefix + ".bin"
    uncounted = uncounted_ends(index, os.path.getsize(path)) if os.path.isfile(path) else 0
    dataset = IndexedDataset(prefix, repaired(index) if uncounted else index)
    check_sidecar(dataset, tokenizer)
    return OpenedDataset(index, dataset, uncounted)


def repaired(index: Index) -> Index:
    """The index with one token more in the last sequence of every non-empty document."""
    some = np.diff(index.document_starts()) > 0
    lengths = np.array(index.lengths)
    lengths[index.document_index[1:][some] - 1] += 1
    return Index(
        index.dtype, lengths, byte_pointers(lengths, index.dtype), index.document_index
    )


def repair(
    pair: OpenedDataset,
    out: str,
    tokenizer: Tokenizer | None = None,
    progress: Progress = lambda read: None,
) -> int:
    """Write the pair that it should have been to `out`. Returns the id that its documents end with.

    Args:
        tokenizer: recorded in the sidecar of `out` if given.
        progress: called with the bytes just dealt with, twice the size of `.bin` in all.

    Raises:
        ValueError: there is nothing to repair, `out` is the input, the uncounted tokens are not one and the same id or
            not the end-of-document id that the tokenizer or the sidecar names.
    """
    dataset = pair.dataset
    if not pair.uncounted:
        raise ValueError(
            f"--repair {out}: nothing to repair, {dataset.prefix}.idx counts all tokens of its .bin"
        )
    if os.path.realpath(out + ".bin") == os.path.realpath(dataset.prefix + ".bin"):
        raise ValueError(f"--repair {out} is the input itself. Write to another name or folder")
    eod, (named, source) = _common_last_token(dataset, progress), _eod(dataset, tokenizer)
    if named not in (None, eod):
        raise ValueError(
            f"the uncounted tokens of {dataset.prefix} are all {eod}, the end-of-document id {source} is "
            f"{named}; allowed: the same. Give the tokenizer of the data, or preprocess the text again"
        )
    require_space(out, [dataset])
    about = (
        {}
        if tokenizer is None
        else {
            "tokenizer": tokenizer.name,
            "vocab_hash": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        }
    )
    with IndexedWriter(out, dataset.dtype) as writer:
        writer.add_dataset(dataset, progress)
        writer.finish(
            {
                **(dataset.sidecar or {}),
                **about,
                "tool": "inspect_dataset",
                "eod": eod,
                "append_eod": True,
                "repaired_from": os.path.abspath(dataset.prefix),
            }
        )
    return eod


def _common_last_token(dataset: IndexedDataset, progress: Progress) -> int:
    """The id that every non-empty document ends with, which proves that it belongs there."""
    starts = dataset.index.document_starts()
    documents = np.flatnonzero(np.diff(starts))
    eod, at = dataset.tokens[starts[documents[0] + 1] - 1].item(), 0
    for block in np.split(documents, range(BLOCK, len(documents), BLOCK)):
        last = dataset.tokens[starts[block + 1] - 1]
        if (last != eod).any():
            i = np.argmax(last != eod)
            raise ValueError(
                f"the uncounted tokens of {dataset.prefix} differ: {eod} after document {documents[0]}, {last[i]} "
                f"after document {block[i]}, so that they are no end-of-document tokens. Preprocess the text again"
            )
        progress((starts[block[-1] + 1] - at) * dataset.dtype.itemsize)
        at = starts[block[-1] + 1]
    return eod


def summarize(
    pair: OpenedDataset,
    tokenizer: Tokenizer | None = None,
    documents: int = 3,
    tokens: int = 64,
) -> dict[str, Any]:
    """What a pair holds, without reading all of it, ready for JSON. Lengths are those that `.idx` says.

    Args:
        documents: how many of the first ones to show, repaired if need be, and
        tokens: how many tokens of each.
    """
    index, dataset = pair.index, pair.dataset
    lengths = np.diff(index.document_starts())
    some = len(lengths) > 0
    return {
        "prefix": dataset.prefix,
        "format_version": VERSION,
        "dtype": index.dtype.name,
        "sequences": len(index.lengths),
        "document_index_entries": len(index.document_index),
        "bin_bytes": dataset.tokens.nbytes,
        "idx_bytes": os.path.getsize(dataset.prefix + ".idx"),
        "documents": index.num_documents,
        "empty_documents": int(np.count_nonzero(lengths == 0)),
        "tokens": index.num_tokens,
        "uncounted_tokens": pair.uncounted,
        "document_length": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        }
        if some
        else None,
        "histogram": _histogram(lengths),
        "sidecar": dataset.sidecar,
        "first_documents": [
            _document(dataset, i, tokens, tokenizer)
            for i in range(min(documents, dataset.num_documents))
        ],
        "faults": _faults(pair),
    }


def _histogram(lengths: np.ndarray) -> list[dict[str, Any]]:
    """Documents by length: 0, 1, 2 to 3, 4 to 7, ..., up to the longest."""
    counts = np.bincount(
        np.frexp(lengths.astype(np.float64))[1]
    )  # the exponent is the number of binary digits
    return [
        {
            "from": 2**digits // 2,
            "to": 2**digits - 1,
            "documents": int(count),
            "share": int(count) / len(lengths),
        }
        for digits, count in enumerate(counts)
    ]


def _document(
    dataset: IndexedDataset, document: int, tokens: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    ids = dataset.read(document)
    shown = ids[:tokens].tolist()
    return {
        "document": document,
        "length": len(ids),
        "ids": shown,
        "text": tokenizer and tokenizer.decode(shown),
    }


def _faults(pair: OpenedDataset) -> list[str]:
    dataset, record = pair.dataset, pair.dataset.sidecar or {}
    found = []
    if pair.uncounted:
        found.append(
            f"the index leaves the last token of each of {pair.uncounted} documents uncounted: document i "
            f"starts i tokens early. Tokens are shown as they are after --repair OUT"
        )
    for entry, here in (
        ("dtype", pair.index.dtype.name),
        ("documents", pair.index.num_documents),
        ("sequences", len(pair.index.lengths)),
        ("tokens", pair.index.num_tokens),
    ):
        if record.get(entry, here) != here:
            found.append(
                f"{dataset.prefix}.json records {entry} {record[entry]}, the index {here}: it belongs to "
                f"other files"
            )
    for entry in ("vocab_size", "eod"):
        if record.get(entry) is not None and _recorded(dataset, entry) is None:
            found.append(
                f"{dataset.prefix}.json records {entry} {record[entry]!r}; allowed: a number, 0 or more"
            )
    return found


def _eod(dataset: IndexedDataset, tokenizer: Tokenizer | None) -> tuple[int | None, str]:
    """The end-of-document id as far as it is known, and by what."""
    if tokenizer is not None:
        return tokenizer.eod, "of the tokenizer"
    return _recorded(dataset, "eod"), "of the .json"


def _recorded(dataset: IndexedDataset, entry: str) -> int | None:
    """A number of the sidecar, if it is there and is one."""
    value = (dataset.sidecar or {}).get(entry)
    return value if type(value) is int and value >= 0 else None


def scan(
    pair: OpenedDataset,
    tokenizer: Tokenizer | None = None,
    progress: Progress = lambda read: None,
) -> tuple[dict[str, Any], list[str]]:
    """Read all tokens: what they are, ready for JSON, and the faults among them.

    Args:
        progress: called with the bytes just read.

    Raises:
        ValueError: `.bin` shrinks meanwhile.
    """
    dataset, record = pair.dataset, pair.dataset.sidecar or {}
    vocab_size = tokenizer.vocab_size if tokenizer else _recorded(dataset, "vocab_size")
    eod, source = _eod(dataset, tokenizer)
    if eod is None and dataset.num_tokens:
        first = np.argmax(np.diff(dataset.index.document_starts()) > 0)
        eod, source = dataset.read(first)[-1].item(), f"the last token of document {first}"
    ids = _Ids(vocab_size or UNKNOWN_VOCABULARY)
    ends = _Ends(dataset.index.document_starts(), eod)
    at, digest = 0, hashlib.sha256()
    for block in _blocks(dataset):
        digest.update(block.data)
        ids.add(block, at)
        ends.add(block, at)
        at += len(block)
        progress(block.nbytes)
    found = {
        "vocab_size": vocab_size,
        **ids.facts(ends.place),
        "eod": eod,
        "eod_source": source,
        **ends.facts(),
        "bin_sha256": digest.hexdigest(),
        "idx_sha256": _sha256(dataset.prefix + ".idx"),
    }
    problems = []
    if ids.outside:
        first = found["first_outside"]
        problems.append(
            f"{ids.outside} ids are outside the vocabulary, 0 to {ids.vocab_size - 1}: the first, "
            f"{first['id']}, is token {first['position']} of document {first['document']}"
        )
    if record.get("append_eod") and found["documents_not_ending_with_eod"]:
        problems.append(
            f"{found['documents_not_ending_with_eod']} documents do not end with the end-of-document id "
            f"{eod}, though {dataset.prefix}.json records append_eod"
        )
    return found, problems


class _Ids:
    """Which ids there are."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.outside = vocab_size, 0
        self._first: tuple[int, int | float] | None = (
            None  # place and id of the first one outside
        )
        self._extremes: list = []
        self._seen = np.zeros(0, bool)

    def add(self, block: np.ndarray, at: int) -> None:
        smallest, largest = (
            np.fmin.reduce(block),
            np.fmax.reduce(block),
        )  # which pass over not-a-number
        self._extremes += [smallest, largest]
        if not (smallest >= 0 and largest < self.vocab_size) or block.dtype.kind == "f":
            good = (block >= 0) & (block < self.vocab_size) & (block == np.floor(block))
            bad = np.flatnonzero(~good)
            if self._first is None and len(bad):
                self._first = at + int(bad[0]), block[bad[0]].item()
            self.outside += len(bad)
            block = block[good].astype(np.int64)
            largest = block.max(initial=0)
        if largest >= len(self._seen):
            self._seen = np.pad(self._seen, (0, int(largest) + 1 - len(self._seen)))
        self._seen[block] = True

    def facts(self, place: Callable[[int], tuple[int, int]]) -> dict[str, Any]:
        first = None
        if self._first is not None:
            document, position = place(self._first[0])
            first = {"document": document, "position": position, "id": self._first[1]}
        some = len(self._extremes) > 0
        return {
            "smallest_id": np.fmin.reduce(self._extremes).item() if some else None,
            "largest_id": np.fmax.reduce(self._extremes).item() if some else None,
            "distinct_ids": int(np.count_nonzero(self._seen)),
            "ids_outside": self.outside,
            "first_outside": first,
        }


class _Ends:
    """Where in the documents the end-of-document id is."""

    def __init__(self, starts: np.ndarray, eod: int | None):
        self._starts, self._eod = starts, eod
        self._last, self._inside = np.zeros((2, len(starts) - 1), bool)

    def add(self, block: np.ndarray, at: int) -> None:
        places = at + np.flatnonzero(block == self._eod)
        documents = np.searchsorted(self._starts, places, "right") - 1
        last = places + 1 == self._starts[documents + 1]
        self._last[documents[last]] = True
        self._inside[documents[~last]] = True

    def place(self, token: int) -> tuple[int, int]:
        """(document, position in it) of a token of `.bin`."""
        document = int(np.searchsorted(self._starts, token, "right")) - 1
        return document, token - int(self._starts[document])

    def facts(self) -> dict[str, int]:
        some = np.diff(self._starts) > 0
        return {
            "documents_ending_with_eod": int(np.count_nonzero(self._last)),
            "documents_not_ending_with_eod": int(np.count_nonzero(some & ~self._last)),
            "documents_with_eod_inside": int(np.count_nonzero(self._inside)),
            "documents_without_eod": int(np.count_nonzero(some & ~self._last & ~self._inside)),
        }


def _blocks(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    """All tokens. Read, not mapped: a failing disk is then an OSError and no signal that kills the process."""
    path = dataset.prefix + ".bin"
    with open(path, "rb") as file:
        for at in range(0, dataset.num_tokens, BLOCK):
            count = min(BLOCK, dataset.num_tokens - at)
            block = np.fromfile(file, dataset.dtype.newbyteorder("<"), count)
            if len(block) < count:
                raise ValueError(
                    f"{path} became shorter while it was read: something else writes it. Try again later"
                )
            yield block


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def describe(found: dict[str, Any]) -> list[str]:
    """The lines that show what `facts` and, under "full", `scan` found."""
    f, length, record = found, found["document_length"], found["sidecar"]
    rows = [
        (
            "format",
            f"version {f['format_version']}, {f['dtype']}, {f['sequences']} sequences, "
            f"{f['document_index_entries']} document-index entries",
        ),
        ("files", f".bin {f['bin_bytes']} bytes, .idx {f['idx_bytes']} bytes"),
        (
            "documents",
            f"{f['documents']}, {f['empty_documents']} of them empty; {f['tokens']} tokens",
        ),
    ]
    if length:
        rows.append(
            (
                "lengths",
                f"min {length['min']}, median {length['median']:g}, mean {length['mean']:.1f}, "
                f"max {length['max']}",
            )
        )
    rows += [("", line) for line in _bars(f["histogram"])]
    if record is None:
        rows.append(("record", "none (no .json beside it)"))
    rows += [("record", f"{entry}: {_value(value)}") for entry, value in (record or {}).items()]
    for d in f["first_documents"]:
        shown = " ".join(map(str, d["ids"])) if d["text"] is None else repr(d["text"])
        more = " ..." if d["length"] > len(d["ids"]) else ""
        rows.append((f"document {d['document']}", f"{d['length']} tokens: {shown}{more}"))
    rows += _full_rows(f["full"]) if "full" in f else []
    rows += [("FAULT", fault) for fault in f["faults"]] or [
        ("sound", "all of it" if "full" in f else "as far as read (--full reads all tokens)")
    ]
    return [f["prefix"], *(f"  {name:13s} {text}".rstrip() for name, text in rows)]


def _value(value: Any) -> str:
    """An entry of the sidecar; of a long list, the first few."""
    if not isinstance(value, list):
        return str(value)
    return " ".join(map(str, value[:5])) + (
        f" ... ({len(value)} in all)" if len(value) > 5 else ""
    )


def _bars(histogram: list[dict[str, Any]]) -> list[str]:
    longest = max((row["share"] for row in histogram), default=0)
    shown = itertools.dropwhile(lambda row: not row["documents"], histogram)
    return [
        f"{row['from']:>10} to {row['to']:<10} {row['documents']:>10} {row['share']:7.2%} "
        f"{'#' * math.ceil(BAR * row['share'] / longest)}"
        for row in shown
    ]


def _full_rows(full: dict[str, Any]) -> list[tuple[str, str]]:
    vocabulary = "unknown" if full["vocab_size"] is None else full["vocab_size"]
    return [
        (
            "ids",
            f"{full['smallest_id']} to {full['largest_id']}, {full['distinct_ids']} distinct, "
            f"{full['ids_outside']} outside the vocabulary (its size: {vocabulary})",
        ),
        (
            "ends",
            f"{full['documents_ending_with_eod']} documents end with {full['eod']} ({full['eod_source']}), "
            f"{full['documents_with_eod_inside']} have it inside, {full['documents_without_eod']} nowhere",
        ),
        ("sha256", f".bin {full['bin_sha256']}"),
        ("", f".idx {full['idx_sha256']}"),
    ]
