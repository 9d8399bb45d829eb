"""Text files -> token shards: the work behind tools/preprocess_data.py.

The JSON is parsed here and not by the tokenizer library, because nothing in a file may be skipped in silence: a line
that cannot be used is an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import orjson

from megatron.data.indexed import dtype_for_vocab
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.tokenizer import Tokenizer

BATCH_BYTES = 16 << 20  # of input parsed and encoded at once


@dataclass
class Totals:
    """What became of one key of the input."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """of the texts in UTF-8"""


def read_jsonl(path: str, keys: Sequence[str], batch_bytes: int = BATCH_BYTES,
               ) -> Iterator[tuple[int, dict[str, list[str]]]]:
    """Batches of a JSON-lines file: (bytes read, key -> the string of each line). Blank lines are no documents.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: a line is not a JSON object in UTF-8, or lacks a key, or has something else than a string there.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--input {path} does not exist")
    number = 0
    with open(path, "rb") as file:
        while lines := file.readlines(batch_bytes):
            texts: dict[str, list[str]] = {key: [] for key in keys}
            for line in lines:
                number += 1
                if not line.isspace():
                    record = _parse(line, path, number)
                    for key in keys:
                        texts[key].append(_text(record, key, path, number))
            yield sum(map(len, lines)), texts


def _parse(line: bytes, path: str, number: int) -> dict:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not a JSON object in UTF-8 ({error}). Correct or remove the line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}:{number}: the line is a JSON {type(record).__name__}; allowed: an object")
    return record


def _text(record: dict, key: str, path: str, number: int) -> str:
    if key not in record:
        raise ValueError(f"{path}:{number}: no key {key!r}; there are: {', '.join(record) or 'none'}. Set --json-keys")
    if not isinstance(record[key], str):
        raise ValueError(f"{path}:{number}: {key!r} is a JSON {type(record[key]).__name__}; allowed: a string")
    return record[key]


def with_eod(flat_ids: np.ndarray, lengths: np.ndarray, eod: int) -> tuple[np.ndarray, np.ndarray]:
    """The same documents, each with the id `eod` at its end and counted in its length; empty ones stay empty.

    Args:
        flat_ids: uint32, all documents one after the other.
        lengths: int64 [documents].
    """
    some = lengths > 0
    return np.insert(flat_ids, np.cumsum(lengths)[some], eod), lengths + some


def preprocess(inputs: Sequence[str], output_prefix: str, keys: Sequence[str], tokenizer: Tokenizer, *,
               append_eod: bool, progress: Callable[[int], object] = lambda read: None) -> list[Totals]:
    """Write `<output_prefix>_<key>_document.{bin,idx,json}` for each key. A failure leaves no output.

    Args:
        inputs: JSON-lines files, in the order of the documents.
        append_eod: end each non-empty document with the tokenizer's end-of-document id.
        progress: called with the number of input bytes just dealt with.

    Raises:
        FileNotFoundError: an input is not there.
        ValueError: a line cannot be used (see `read_jsonl`), or there are no documents at all.
    """
    keys = list(dict.fromkeys(keys))
    totals = {key: Totals(f"{output_prefix}_{key}_document") for key in keys}
    dtype = dtype_for_vocab(tokenizer.vocab_size)
    with ExitStack() as stack:
        writers = {key: stack.enter_context(IndexedWriter(totals[key].prefix, dtype)) for key in keys}
        for path in inputs:
            for read, texts in read_jsonl(path, keys):
                for key in keys:
                    flat_ids, lengths = tokenizer.encode_batch(texts[key])
                    if append_eod:
                        flat_ids, lengths = with_eod(flat_ids, lengths, tokenizer.eod)
                    writers[key].add_documents(flat_ids, lengths)
                    totals[key].bytes += sum(len(t) if t.isascii() else len(t.encode()) for t in texts[key])
                progress(read)
        for key, writer in writers.items():
            if not writer.num_documents:
                raise ValueError(f"--input {' '.join(inputs)} has no documents")
            totals[key].documents, totals[key].tokens = writer.num_documents, writer.num_tokens
            writer.finish({
                "tool": "preprocess_data", "tokenizer": tokenizer.name, "vocab_hash": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "append_eod": append_eod,
                "sources": [os.path.abspath(path) for path in inputs], "key": key})
    return list(totals.values())
