"""Opening of token datasets for inspection and repair, including those with uncounted tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from megatron.data.indexed.reader import (
    DatasetIndex,
    IndexedDataset,
    byte_pointers,
    num_uncounted_tokens,
    read_index,
)
from megatron.data.indexed.validation import check_sidecar
from megatron.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class OpenedDataset:
    """A dataset that can be read, possibly after a repair of its index in memory."""

    index: DatasetIndex
    """Index as stored in `.idx`"""
    dataset: IndexedDataset
    """Documents; read with the repaired index if there are uncounted tokens"""
    uncounted_tokens: int
    """Number of documents whose last token is in `.bin` but not counted by `.idx`"""

    def recorded_number(self, entry: str) -> int | None:
        """Return an entry of the sidecar if it is a non-negative integer, else None."""
        value = (self.dataset.sidecar or {}).get(entry)
        if type(value) is int and value >= 0:  # not isinstance: bool is a subclass of int
            return value
        return None

    def expected_eod(self, tokenizer: Tokenizer | None) -> tuple[int | None, str]:
        """Return the end-of-document id, None if unknown, and where it comes from."""
        if tokenizer is not None:
            return tokenizer.eod, "of the tokenizer"
        return self.recorded_number("eod"), "of the .json"


def open_dataset(prefix: str, tokenizer: Tokenizer | None = None) -> OpenedDataset:
    """Open a dataset even if its index does not count the last token of each document.

    Args:
        tokenizer: compared with the sidecar; None: not compared.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is corrupt in another way, or the sidecar contradicts the tokenizer.
    """
    index = read_index(prefix)
    path = prefix + ".bin"
    uncounted = 0
    if os.path.isfile(path):
        uncounted = num_uncounted_tokens(index, os.path.getsize(path))
    if uncounted:
        dataset = IndexedDataset(prefix, _with_last_tokens(index))
    else:
        dataset = IndexedDataset(prefix, index)
    check_sidecar(dataset, tokenizer)
    return OpenedDataset(index, dataset, uncounted)


def _with_last_tokens(index: DatasetIndex) -> DatasetIndex:
    """Return the index with one more token in the last sequence of each non-empty document."""
    nonempty = np.diff(index.document_starts()) > 0
    lengths = np.array(index.lengths)
    lengths[index.document_index[1:][nonempty] - 1] += 1
    pointers = byte_pointers(lengths, index.dtype)
    return DatasetIndex(index.dtype, lengths, pointers, index.document_index)
