"""Encoding a chunk of texts to token arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megatron.config.schema import TokenizerConfig
from megatron.data.indexed.reader import dtype_for_vocab
from megatron.data.ingest.records import Chunk, RejectedRecord
from megatron.optional_packages import import_optional
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer

# Documents that a fast encoder and its reference both encode, for comparison.
_COMPARED_IN_FIRST_SOURCE = 16  # at the start of the first source, for each key
_COMPARED_IN_OTHER_SOURCES = 4  # at the start of each other source, for each key
_COMPARED_IN_LATER_CHUNKS = 1  # of every chunk that continues a source, for each key

Splitter = Callable[[str], list[str]]
"""a function from a text to its sentences"""


@dataclass(frozen=True)
class EncodeConfig:
    """How texts become tokens."""

    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)
    """keys (columns) of the texts"""
    append_eod: bool = False
    """end each non-empty document with the end-of-document token"""
    split_sentences: str = ""
    """language of the texts ("english"), whose sentences become sequences; empty: each
    document is one sequence"""
    append_eod_flag: str = "--append-eod"
    """flag that messages about the end-of-document token refer to"""


@dataclass(frozen=True)
class EncodedDocuments:
    """The encoded texts of one key of a chunk."""

    ids: np.ndarray
    """token ids of all sequences, concatenated, in the dtype of the dataset"""
    sequence_lengths: np.ndarray
    """int64 [sequences], tokens of each sequence"""
    sequence_counts: np.ndarray
    """int64 [documents], sequences of each document"""
    text_bytes: np.ndarray
    """int64 [documents], bytes of each text in UTF-8"""

    def first(self, documents: int) -> EncodedDocuments:
        """Return the first `documents` documents."""
        sequences = int(self.sequence_counts[:documents].sum())
        tokens = int(self.sequence_lengths[:sequences].sum())
        return EncodedDocuments(
            self.ids[:tokens],
            self.sequence_lengths[:sequences],
            self.sequence_counts[:documents],
            self.text_bytes[:documents],
        )


@dataclass(frozen=True)
class EncodedChunk:
    """The result of encoding one chunk."""

    chunk: Chunk
    """the chunk, without its data"""
    lines: int
    """lines or rows of the chunk, blank lines included"""
    rejected: list[RejectedRecord]
    by_key: dict[str, EncodedDocuments]
    difference: str
    """how the fast encoder differed from its reference; empty if it did not"""

    @property
    def num_documents(self) -> int:
        """Number of usable documents."""
        return len(next(iter(self.by_key.values())).text_bytes)


class ChunkEncoder:
    """Parses and encodes chunks in this process.

    Args:
        config: how texts become tokens.
        tokenizer: a tokenizer to use instead of the one that `config` names.

    Raises:
        ValueError: files of the tokenizer or of the sentence splitter are missing or wrong, or
            the tokenizer has no end-of-document token to append.
    """

    def __init__(self, config: EncodeConfig, tokenizer: Tokenizer | None = None):
        if tokenizer is None:
            tokenizer = build_tokenizer(config.tokenizer, threads=1)
        self.config = config
        self.tokenizer = tokenizer
        if config.append_eod:
            tokenizer.require_eod(config.append_eod_flag)
        self._split = build_splitter(config.split_sentences)

    def encode(self, chunk: Chunk, use_reference: bool = False) -> EncodedChunk:
        """Parse and encode one chunk.

        Args:
            use_reference: whether to stop using the tokenizer's fast encoder, for good.

        Raises:
            ValueError: the chunk cannot be read, or a token id is outside the vocabulary.
        """
        if use_reference:
            self.tokenizer.use_reference()
        parsed = chunk.parse(self.config.keys)
        compared = _documents_to_compare(chunk)
        by_key = {}
        try:
            for key in self.config.keys:
                by_key[key] = self._encode_texts(parsed.texts[key], compared)
        except ValueError as error:
            unit = "row" if chunk.unit == "row" else "byte"
            raise ValueError(
                f"{chunk.path}, between {unit} {chunk.start} and {chunk.end}: {error}"
            ) from None
        return EncodedChunk(
            replace(chunk, data=None),
            parsed.lines,
            parsed.rejected,
            by_key,
            self.tokenizer.difference,
        )

    def _encode_texts(self, texts: list[str], compared: int) -> EncodedDocuments:
        tokenizer = self.tokenizer
        tokenizer.compare(compared)
        number = len(texts)
        text_bytes = np.fromiter(map(_utf8_length, texts), np.int64, count=number)
        counts = np.ones(number, np.int64)
        if self._split:
            documents = [self._split(text) for text in texts]
            counts = np.fromiter(map(len, documents), np.int64, count=number)
            texts = [sentence for document in documents for sentence in document]
        ids, lengths = tokenizer.encode_batch(texts)
        if self._split and tokenizer.bos is not None:
            ids, lengths = _drop_inner_bos(ids, lengths, counts)
        largest = ids.max(initial=0)
        if largest >= tokenizer.vocab_size:
            raise ValueError(
                f"{tokenizer.name} gives the token id {largest}, outside its vocabulary of "
                f"{tokenizer.vocab_size}: the vocabulary file is damaged. Fetch or train it again"
            )
        dtype = dtype_for_vocab(tokenizer.vocab_size)
        if self.config.append_eod:
            ids, lengths = append_eod(ids, lengths, counts, tokenizer.eod, dtype)
        return EncodedDocuments(ids.astype(dtype, copy=False), lengths, counts, text_bytes)


def _documents_to_compare(chunk: Chunk) -> int:
    """Number of documents of a chunk to encode with the reference, too."""
    if chunk.start:
        return _COMPARED_IN_LATER_CHUNKS
    if chunk.source == 0:
        return _COMPARED_IN_FIRST_SOURCE
    return _COMPARED_IN_OTHER_SOURCES


def _utf8_length(text: str) -> int:
    """Bytes of a text in UTF-8, for ASCII without encoding it."""
    return len(text) if text.isascii() else len(text.encode())


def append_eod(
    ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray, eod: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Append the token `eod` to the last non-empty sequence of each document.

    Documents without tokens stay empty.

    Args:
        ids: tokens of all sequences, concatenated.
        lengths: [sequences], tokens of each sequence.
        counts: [documents], sequences of each document.

    Returns:
        (ids in `dtype`, new lengths).
    """
    non_empty = np.flatnonzero(lengths)
    documents = np.repeat(np.arange(len(counts)), counts)[non_empty]
    last = non_empty
    if len(non_empty):
        last = non_empty[np.append(documents[1:] != documents[:-1], True)]
    # Positions of the added tokens in the output.
    eod_positions = np.cumsum(lengths)[last] + np.arange(len(last))
    out = np.empty(len(ids) + len(last), dtype)
    is_old = np.ones(len(out), bool)
    is_old[eod_positions] = False
    out[is_old] = ids
    out[eod_positions] = eod
    lengths = lengths.copy()
    lengths[last] += 1
    return out, lengths


def _drop_inner_bos(
    ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop the begin-of-sequence token of every sequence except a document's first."""
    is_first = np.zeros(len(lengths), bool)
    is_first[(np.cumsum(counts) - counts)[counts > 0]] = True
    dropped = (np.cumsum(lengths) - lengths)[~is_first]
    return np.delete(ids, dropped), lengths - ~is_first


def build_splitter(language: str) -> Splitter | None:
    """Build a sentence splitter from NLTK's Punkt model of a language such as "english".

    The sentences add up to the text: white space between two belongs to the second, as in
    GPT-2's tokens. Returns None for an empty language.

    Raises:
        ValueError: the package, or its model of the language, is not installed.
    """
    if not language:
        return None
    punkt_module = import_optional("nltk.tokenize.punkt", "sentences", "--split-sentences")
    try:
        punkt = punkt_module.PunktTokenizer(language)
    except LookupError:
        raise ValueError(
            f"--lang is {language!r}, for which NLTK's Punkt model is not installed. Fetch the "
            f"models: python -m nltk.downloader punkt_tab (or name their folder in NLTK_DATA)"
        ) from None

    def split(text: str) -> list[str]:
        ends = [end for _, end in punkt.span_tokenize(text)][:-1]
        return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]

    return split
