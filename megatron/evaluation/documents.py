"""Documents whose perplexity is measured: of token datasets and of text files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron.config.fields import require
from megatron.data.indexed.reader import IndexedDataset, dataset_prefix
from megatron.data.indexed.validation import check_sidecar
from megatron.data.ingest.records import FlagNames
from megatron.data.ingest.texts import read_texts
from megatron.tokenizer.base import Tokenizer

_CHUNK_BYTES = 1 << 20
_FLAGS = FlagNames(input="--data", skip_advice="leave it out of the file")


@dataclass(frozen=True)
class TextDocument:
    """Tokens of one text, and its size."""

    tokens: np.ndarray
    """ids, without what the tokenizer puts before texts and without the end of the document"""
    num_bytes: int
    """length of the text in UTF-8"""
    num_words: int
    """words of the text, separated by white space"""


@dataclass(frozen=True)
class DocumentSet:
    """The documents behind one path: a token dataset, or files of text.

    Attributes:
        path: prefix of a .bin/.idx pair, or any input of tools/preprocess_data.py.
        tokenizer: that of the model.
        key: field of a record with its text.
    """

    path: str
    tokenizer: Tokenizer
    key: str = "text"

    @property
    def is_tokens(self) -> bool:
        """Whether the path is that of a token dataset, whose texts are decoded."""
        return os.path.isfile(dataset_prefix(self.path) + ".idx")

    def documents(self) -> Iterator[TextDocument]:
        """Yield the documents in order, one at a time.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: the data is damaged or has other tokens than the tokenizer, or a record
                has no text.
        """
        if self.is_tokens:
            yield from self._decoded()
            return
        for texts in read_texts(self.path, self.key, _FLAGS, _CHUNK_BYTES):
            ids, lengths = self.tokenizer.encode_batch(texts)
            ends = np.cumsum(lengths)
            for text, start, end in zip(texts, ends - lengths, ends, strict=True):
                yield self._document(ids[start:end], text)

    def _decoded(self) -> Iterator[TextDocument]:
        """Yield the documents of a token dataset, which end where the index or a token says so."""
        dataset = IndexedDataset(dataset_prefix(self.path))
        check_sidecar(dataset, self.tokenizer)
        eod = self.tokenizer.eod
        vocab_size = self.tokenizer.vocab_size
        for number in range(dataset.num_documents):
            tokens = np.asarray(dataset.read(number))
            largest = int(tokens.max(initial=0))
            require(
                largest < vocab_size,
                f"a token of document {number} of {dataset.prefix}",
                largest,
                f"below the {vocab_size} of {self.tokenizer.name}",
                "The dataset was made with another tokenizer.",
            )
            for part in _split_at(tokens, eod):
                yield self._document(part, self.tokenizer.decode(part))

    def _document(self, tokens: np.ndarray, text: str) -> TextDocument:
        bos = self.tokenizer.bos
        if bos is not None and len(tokens) and tokens[0] == bos:
            tokens = tokens[1:]
        return TextDocument(
            tokens.astype(np.int64), len(text.encode(errors="replace")), len(text.split())
        )


def _split_at(tokens: np.ndarray, eod: int | None) -> list[np.ndarray]:
    """Return the documents that an entry of the index holds, without their last token `eod`."""
    if eod is None:
        return [tokens]
    starts = np.flatnonzero(tokens == eod) + 1
    parts = [part[part != eod] for part in np.split(tokens, starts)]
    if len(parts) > 1 and not len(parts[-1]):  # nothing follows the last end of a document
        parts.pop()
    return parts
