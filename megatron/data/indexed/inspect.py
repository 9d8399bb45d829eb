"""Inspection of a token dataset: what it holds, and what is inconsistent in it.

A *problem* is an inconsistency in a dataset that can be read. Files that cannot be read raise
ValueError, as everywhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed.opened import OpenedDataset
from megatron.data.indexed.reader import INDEX_VERSION, IndexedDataset
from megatron.data.indexed.recorded_tokenizer import build_recorded_tokenizer
from megatron.io.progress import ProgressCallback, no_progress
from megatron.io.sha256 import file_sha256
from megatron.tokenizer.base import Tokenizer

_BLOCK_TOKENS = 1 << 22  # tokens read per step
# No vocabulary is nearly as large: without a known vocabulary, larger ids are reported.
_LARGEST_VOCABULARY = 1 << 24


def summarize(
    opened: OpenedDataset,
    tokenizer: Tokenizer | None = None,
    documents: int = 3,
    tokens: int = 64,
) -> dict[str, Any]:
    """Return what a dataset holds as JSON values, without reading all of it.

    Args:
        tokenizer: decodes the documents shown; None: the one that the sidecar records does, if
            its files are still there. Otherwise only ids are shown.
        documents: number of documents to show, from the first on.
        tokens: number of tokens to show of each.

    Returns:
        Sizes and counts by name. Lengths are those that `.idx` records; the documents shown are
        read with the repaired index if there are uncounted tokens.
    """
    index = opened.index
    dataset = opened.dataset
    lengths = np.diff(index.document_starts())
    shown = range(min(documents, dataset.num_documents))
    not_decoded = ""
    if tokenizer is None and shown:
        tokenizer, not_decoded = build_recorded_tokenizer(dataset.sidecar)
    return {
        "prefix": dataset.prefix,
        "format_version": INDEX_VERSION,
        "dtype": index.dtype.name,
        "sequences": len(index.lengths),
        "document_index_entries": len(index.document_index),
        "bin_bytes": dataset.tokens.nbytes,
        "idx_bytes": os.path.getsize(dataset.prefix + ".idx"),
        "documents": index.num_documents,
        "empty_documents": int(np.count_nonzero(lengths == 0)),
        "tokens": index.num_tokens,
        "uncounted_tokens": opened.uncounted_tokens,
        "document_length": _length_statistics(lengths),
        "histogram": _histogram(lengths),
        "sidecar": dataset.sidecar,
        "first_documents": [_document(dataset, i, tokens, tokenizer) for i in shown],
        "not_decoded": not_decoded,
        "faults": problems(opened),
    }


def _length_statistics(lengths: np.ndarray) -> dict[str, int | float] | None:
    """Return statistics of the document lengths; None if there are no documents."""
    if len(lengths) == 0:
        return None
    return {
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "max": int(lengths.max()),
    }


def _histogram(lengths: np.ndarray) -> list[dict[str, Any]]:
    """Return document counts by length: 0, 1, 2 to 3, 4 to 7, ..., up to the longest."""
    # frexp's exponent is the number of binary digits of a length.
    counts = np.bincount(np.frexp(lengths.astype(np.float64))[1])
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
    """Return the length of a document and its first tokens, as ids and as text."""
    ids = dataset.read(document)
    shown = ids[:tokens].tolist()
    text = None
    if tokenizer is not None:
        text = tokenizer.decode(shown)
    return {"document": document, "length": len(ids), "ids": shown, "text": text}


def problems(opened: OpenedDataset) -> list[str]:
    """Return one line per inconsistency that shows without reading the tokens."""
    prefix = opened.dataset.prefix
    record = opened.dataset.sidecar or {}
    found = []
    if opened.uncounted_tokens:
        found.append(
            f"the index leaves the last token of each of {opened.uncounted_tokens} documents "
            f"uncounted: document i starts i tokens early. Tokens are shown as they are after "
            f"--repair OUT"
        )
    counts = {
        "dtype": opened.index.dtype.name,
        "documents": opened.index.num_documents,
        "sequences": len(opened.index.lengths),
        "tokens": opened.index.num_tokens,
    }
    for entry, value in counts.items():
        if record.get(entry, value) != value:
            found.append(
                f"{prefix}.json records {entry} {record[entry]}, the index {value}: it belongs "
                f"to other files"
            )
    for entry in ("vocab_size", "eod"):
        if record.get(entry) is not None and opened.recorded_number(entry) is None:
            found.append(
                f"{prefix}.json records {entry} {record[entry]!r}; allowed: a number, 0 or more"
            )
    return found


def scan(
    opened: OpenedDataset,
    tokenizer: Tokenizer | None = None,
    progress: ProgressCallback = no_progress,
) -> tuple[dict[str, Any], list[str]]:
    """Read all tokens, and return statistics of them and the problems found.

    The vocabulary and the end-of-document id are those of the tokenizer, else of the sidecar,
    else guessed from the data.

    Args:
        progress: called with the bytes just read.

    Returns:
        Statistics as JSON values, and one line per problem.

    Raises:
        ValueError: `.bin` became shorter while it was read.
    """
    dataset = opened.dataset
    vocab_size = opened.recorded_number("vocab_size")
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    eod, source = opened.expected_eod(tokenizer)
    if eod is None and dataset.num_tokens:
        first = np.argmax(np.diff(dataset.index.document_starts()) > 0)
        eod = dataset.read(first)[-1].item()
        source = f"the last token of document {first}"
    ids = _IdStatistics(vocab_size or _LARGEST_VOCABULARY)
    eods = _EodStatistics(dataset.index.document_starts(), eod)
    offset = 0
    digest = hashlib.sha256()
    for block in _read_blocks(dataset):
        digest.update(block.data)
        ids.add(block, offset)
        eods.add(block, offset)
        offset += len(block)
        progress(block.nbytes)
    found = {
        "vocab_size": vocab_size,
        **ids.summary(eods.locate),
        "eod": eod,
        "eod_source": source,
        **eods.summary(),
        "bin_sha256": digest.hexdigest(),
        "idx_sha256": file_sha256(Path(dataset.prefix + ".idx")),
    }
    return found, _token_problems(opened, found, ids.vocab_size)


def _token_problems(opened: OpenedDataset, found: dict[str, Any], vocab_size: int) -> list[str]:
    """Return one line per inconsistency in the statistics of a scan."""
    lines = []
    if found["ids_outside"]:
        first = found["first_outside"]
        lines.append(
            f"{found['ids_outside']} ids are outside the vocabulary, 0 to {vocab_size - 1}: the "
            f"first, {first['id']}, is token {first['position']} of document "
            f"{first['document']}"
        )
    record = opened.dataset.sidecar or {}
    without_eod = found["documents_not_ending_with_eod"]
    if record.get("append_eod") and without_eod:
        lines.append(
            f"{without_eod} documents do not end with the end-of-document id {found['eod']}, "
            f"though {opened.dataset.prefix}.json records append_eod"
        )
    return lines


class _IdStatistics:
    """Statistics of the token ids, collected block by block.

    Args:
        vocab_size: ids from here on are counted as outside the vocabulary.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._outside = 0
        self._first_offset: int | None = None  # token offset of the first id outside
        self._first_id: int | float | None = None
        self._extremes: list = []
        self._seen = np.zeros(0, bool)

    def add(self, block: np.ndarray, offset: int) -> None:
        """Add the tokens that start at a token offset of `.bin`."""
        smallest = np.fmin.reduce(block)  # fmin and fmax ignore NaN
        largest = np.fmax.reduce(block)
        self._extremes += [smallest, largest]
        if not (smallest >= 0 and largest < self.vocab_size) or block.dtype.kind == "f":
            valid = (block >= 0) & (block < self.vocab_size) & (block == np.floor(block))
            self._add_invalid(block, np.flatnonzero(~valid), offset)
            block = block[valid].astype(np.int64)
            largest = block.max(initial=0)
        if largest >= len(self._seen):
            self._seen = np.pad(self._seen, (0, int(largest) + 1 - len(self._seen)))
        self._seen[block] = True

    def _add_invalid(self, block: np.ndarray, invalid: np.ndarray, offset: int) -> None:
        if self._first_offset is None and len(invalid):
            self._first_offset = offset + int(invalid[0])
            self._first_id = block[invalid[0]].item()
        self._outside += len(invalid)

    def summary(self, locate: Callable[[int], tuple[int, int]]) -> dict[str, Any]:
        """Return the statistics as JSON values.

        Args:
            locate: returns (document, position) of a token offset.
        """
        first = None
        if self._first_offset is not None:
            document, position = locate(self._first_offset)
            first = {"document": document, "position": position, "id": self._first_id}
        smallest = None
        largest = None
        if self._extremes:
            smallest = np.fmin.reduce(self._extremes).item()
            largest = np.fmax.reduce(self._extremes).item()
        return {
            "smallest_id": smallest,
            "largest_id": largest,
            "distinct_ids": int(np.count_nonzero(self._seen)),
            "ids_outside": self._outside,
            "first_outside": first,
        }


class _EodStatistics:
    """Positions of the end-of-document id in the documents, collected block by block.

    Args:
        starts: int64 [documents + 1]: token offset of each document.
        eod: the end-of-document id; None if there are no tokens.
    """

    def __init__(self, starts: np.ndarray, eod: int | None):
        self._starts = starts
        self._eod = eod
        self._at_end = np.zeros(len(starts) - 1, bool)
        self._inside = np.zeros(len(starts) - 1, bool)

    def add(self, block: np.ndarray, offset: int) -> None:
        """Add the tokens that start at a token offset of `.bin`."""
        offsets = offset + np.flatnonzero(block == self._eod)
        documents = np.searchsorted(self._starts, offsets, "right") - 1
        is_last = offsets + 1 == self._starts[documents + 1]
        self._at_end[documents[is_last]] = True
        self._inside[documents[~is_last]] = True

    def locate(self, offset: int) -> tuple[int, int]:
        """Return (document, position in the document) of a token offset of `.bin`."""
        document = int(np.searchsorted(self._starts, offset, "right")) - 1
        return document, offset - int(self._starts[document])

    def summary(self) -> dict[str, int]:
        """Return document counts by the position of the end-of-document id."""
        unended = (np.diff(self._starts) > 0) & ~self._at_end
        return {
            "documents_ending_with_eod": int(np.count_nonzero(self._at_end)),
            "documents_not_ending_with_eod": int(np.count_nonzero(unended)),
            "documents_with_eod_inside": int(np.count_nonzero(self._inside)),
            "documents_without_eod": int(np.count_nonzero(unended & ~self._inside)),
        }


def _read_blocks(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    """Yield all tokens in blocks.

    The file is read, not mapped: a failing disk then raises OSError instead of SIGBUS.
    """
    path = dataset.prefix + ".bin"
    with open(path, "rb") as file:
        for offset in range(0, dataset.num_tokens, _BLOCK_TOKENS):
            count = min(_BLOCK_TOKENS, dataset.num_tokens - offset)
            block = np.fromfile(file, dataset.dtype.newbyteorder("<"), count)
            if len(block) < count:
                raise ValueError(
                    f"{path} became shorter while it was read: another program writes it. Try "
                    f"again later"
                )
            yield block
