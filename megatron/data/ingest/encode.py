"""Chunks of text -> token arrays, in several processes, in order.

What comes out does not depend on how many processes there are: chunks are cut by the reader, each document is encoded
on its own, and a fast encoder that fails its comparison is put aside from that file on, whichever process found out.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron.config.schema import TokenizerConfig
from megatron.data.indexed.reader import dtype_for_vocab
from megatron.data.ingest.records import Chunk, RejectedRecord
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer

LOGGER = logging.getLogger("megatron")
IN_FLIGHT = (
    2  # chunks per process that are being encoded or wait for their turn: bounds the memory
)
ALONE_BYTES, ALONE_SECONDS = (
    64 << 20,
    2.0,
)  # input that is encoded, or time that passes, before others are started
COMPARED_DOCUMENTS, COMPARED_OF_FIRST = (
    4,
    16,
)  # of each file and key, of the first file; and one of each later chunk


def usable_cores() -> int:
    """Cores that this process may use: its CPU set, and the quota of its control group (containers)."""
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    with suppress(OSError, ValueError):  # no such file, or "max": no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


@dataclass(frozen=True)
class EncodeConfig:
    """What is done to every text."""

    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    """end each non-empty document with the end-of-document id"""
    split_sentences: str = ""
    """language of the texts ("english"): sentences become sequences; empty: a document is one sequence"""


@dataclass(frozen=True)
class Tokens:
    """The documents of one key of a chunk."""

    ids: np.ndarray
    """the dataset's dtype: all sequences one after the other"""
    lengths: np.ndarray
    """int64, tokens of each sequence"""
    counts: np.ndarray
    """int64 [documents], sequences of each"""
    sizes: np.ndarray
    """int64 [documents], bytes of each text in UTF-8"""

    def first(self, documents: int) -> Tokens:
        """Only the first so many documents."""
        sequences = int(self.counts[:documents].sum())
        return Tokens(
            self.ids[: int(self.lengths[:sequences].sum())],
            self.lengths[:sequences],
            self.counts[:documents],
            self.sizes[:documents],
        )


@dataclass(frozen=True)
class EncodedChunk:
    """What became of one chunk."""

    chunk: Chunk
    """without its data"""
    lines: int
    rejected: list[RejectedRecord]
    keys: dict[str, Tokens]
    difference: str
    """the fast encoder's failed comparison; else empty"""

    @property
    def documents(self) -> int:
        return len(next(iter(self.keys.values())).sizes)


class EncoderPool:
    """Encodes chunks in `workers` processes; in this one while those start, and when there is little to do.

    Starting a process takes about half a second of its core, in which 80 MB of text could be encoded.

    A context manager: leaving it ends the processes. They also end when this process is killed.

    Raises:
        ValueError: the tokenizer's files or those of the sentence splitter are missing or wrong.
    """

    def __init__(self, recipe: EncodeConfig, workers: int):
        self.recipe, self.workers = recipe, workers
        self.tokenizer = build_tokenizer(recipe.tokenizer, threads=1)
        self.split = build_splitter(recipe.split_sentences)
        self.use_reference = False
        self._pool: ProcessPoolExecutor | None = None
        self._started: Future | None = None
        """done as soon as a worker is ready"""

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, chunks: Iterable[Chunk], size: int = 0) -> Iterator[EncodedChunk]:
        """Each chunk's result, in order. With `use_reference` set the fast encoder is not used.

        Args:
            size: bytes of all chunks, to judge whether other processes are worth starting; 0: unknown.

        Raises:
            ValueError: a chunk cannot be read, or a token id is outside the vocabulary.
            OSError: a worker process ended.
        """
        running: deque[tuple[Chunk, Future]] = deque()
        begin = time.monotonic()
        try:
            for chunk in chunks:
                long = size >= ALONE_BYTES or time.monotonic() - begin >= ALONE_SECONDS
                if long and self._started is None and self.workers > 1:
                    self._started = self._submit(None)
                if self._started is None or not self._started.done():
                    yield self._checked(
                        chunk,
                        encode(
                            chunk, self.recipe, self.tokenizer, self.split, self.use_reference
                        ),
                    )
                    continue
                running.append((chunk, self._submit(chunk)))
                if len(running) >= IN_FLIGHT * self.workers:
                    yield self._result(running)
            while running:
                yield self._result(running)
        finally:
            for _, future in running:
                future.cancel()

    def _submit(self, chunk: Chunk | None) -> Future:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self.recipe,),
            )
        # Ctrl-C is this process's, which ends the workers; they inherit what is blocked while they are started.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _unbroken():
                return self._pool.submit(_work, chunk, self.use_reference)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _result(self, running: deque[tuple[Chunk, Future]]) -> EncodedChunk:
        chunk, future = running.popleft()
        with _unbroken():
            encoded = future.result()
        trusted = not self.use_reference
        encoded = self._checked(chunk, encoded)
        if trusted and self.use_reference:  # what is under way was not to be trusted either
            for i, (later, future) in enumerate(running):
                future.cancel()
                running[i] = later, self._submit(later)
        return encoded

    def _checked(self, chunk: Chunk, encoded: EncodedChunk) -> EncodedChunk:
        """The same, or, when the fast encoder failed, what the reference makes of the chunk, which stays in use."""
        if not encoded.difference or self.use_reference:
            return encoded
        LOGGER.warning("%s: %s", chunk.path, encoded.difference)
        self.use_reference = True
        return encode(chunk, self.recipe, self.tokenizer, self.split, use_reference=True)


@contextmanager
def _unbroken() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise OSError(
            "a worker process ended before its work was done (killed, or out of memory?). Run the program "
            "again, with fewer --workers if memory is short"
        ) from None


_OWN: dict[str, object] = {}
"""of a worker process: its recipe, tokenizer and sentence splitter, made once"""


def _start_worker(recipe: EncodeConfig) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("megatron").setLevel(logging.ERROR)  # the parent says it, once
    _OWN.update(
        recipe=recipe,
        tokenizer=build_tokenizer(recipe.tokenizer, threads=1),
        split=build_splitter(recipe.split_sentences),
    )


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(chunk: Chunk | None, use_reference: bool) -> EncodedChunk | None:
    return chunk and encode(
        chunk, _OWN["recipe"], _OWN["tokenizer"], _OWN["split"], use_reference
    )


def encode(
    chunk: Chunk,
    recipe: EncodeConfig,
    tokenizer: Tokenizer,
    split: Splitter | None,
    use_reference: bool = False,
) -> EncodedChunk:
    """Parse and encode one chunk.

    Raises:
        ValueError: the chunk cannot be read, or a token id is outside the vocabulary.
    """
    if use_reference:
        tokenizer.use_reference()
    compared = (
        1 if chunk.start else COMPARED_OF_FIRST if chunk.source == 0 else COMPARED_DOCUMENTS
    )
    parsed = chunk.parse(recipe.keys)
    try:
        keys = {
            key: _tokens(parsed.texts[key], recipe, tokenizer, split, compared)
            for key in recipe.keys
        }
    except ValueError as error:
        raise ValueError(
            f"{chunk.path}, between {chunk.unit if chunk.unit == 'row' else 'byte'} {chunk.start} and "
            f"{chunk.end}: {error}"
        ) from None
    return EncodedChunk(
        replace(chunk, data=None), parsed.lines, parsed.rejected, keys, tokenizer.difference
    )


def _tokens(
    texts: list[str],
    recipe: EncodeConfig,
    tokenizer: Tokenizer,
    split: Splitter | None,
    compared: int,
) -> Tokens:
    tokenizer.compare(compared)
    sizes = np.fromiter(
        (len(t) if t.isascii() else len(t.encode()) for t in texts), np.int64, count=len(texts)
    )
    counts = np.ones(len(texts), np.int64)
    if split:
        sentences = [split(text) for text in texts]
        counts = np.fromiter(map(len, sentences), np.int64, count=len(texts))
        texts = [s for document in sentences for s in document]
    ids, lengths = tokenizer.encode_batch(texts)
    if split and tokenizer.bos is not None:
        ids, lengths = _without_inner_bos(ids, lengths, counts)
    if ids.max(initial=0) >= tokenizer.vocab_size:
        raise ValueError(
            f"{tokenizer.name} gives the token id {ids.max()}, outside its vocabulary of "
            f"{tokenizer.vocab_size}: the vocabulary file is damaged. Fetch or train it again"
        )
    dtype = dtype_for_vocab(tokenizer.vocab_size)
    if recipe.append_eod:
        return Tokens(*with_eod(ids, lengths, counts, tokenizer.eod, dtype), counts, sizes)
    return Tokens(ids.astype(dtype), lengths, counts, sizes)


def with_eod(
    ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray, eod: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The same documents, each with the id `eod` at the end of its last non-empty sequence, counted in its length.

    Empty documents stay empty. Returns ids in `dtype`, and the lengths.
    """
    some = np.flatnonzero(lengths)
    document = np.repeat(np.arange(len(counts)), counts)[some]
    last = some[np.append(document[1:] != document[:-1], True)] if len(some) else some
    at = np.cumsum(lengths)[last] + np.arange(len(last))  # where the added ids come to lie
    out = np.empty(len(ids) + len(last), dtype)
    old = np.ones(len(out), bool)
    old[at] = False
    out[old], out[at] = ids, eod
    lengths = lengths.copy()
    lengths[last] += 1
    return out, lengths


def _without_inner_bos(
    ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop the begin-of-sequence id of every sequence but a document's first."""
    first = np.zeros(len(lengths), bool)
    first[(np.cumsum(counts) - counts)[counts > 0]] = True
    drop = (np.cumsum(lengths) - lengths)[~first]
    return np.delete(ids, drop), lengths - ~first


Splitter = Callable[[str], list[str]]


def build_splitter(language: str) -> Splitter | None:
    """A function from a text to its sentences by NLTK's Punkt model of a language ("english"); None for no language.

    The sentences add up to the text: blanks between two belong to the second, as GPT-2's tokens have them.

    Raises:
        ValueError: the package, or its model of the language, is not installed.
    """
    if not language:
        return None
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError:
        raise ValueError(
            "--split-sentences needs the package nltk, which is not installed. Install it: "
            "pip install 'moe-megatron[sentences]'"
        ) from None
    try:
        punkt = PunktTokenizer(language)
    except LookupError:
        raise ValueError(
            f"--lang is {language!r}, for which NLTK's Punkt model is not installed. Fetch the models: "
            f"python -m nltk.downloader punkt_tab (or name their folder in NLTK_DATA)"
        ) from None

    def split(text: str) -> list[str]:
        ends = [end for _, end in punkt.span_tokenize(text)][:-1]
        return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]

    return split
