"""Sequences of tokens from a sample of text: JSONL and other text files, or .bin/.idx files."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megatron.config.fields import require
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.ingest.records import FlagNames
from megatron.data.ingest.texts import read_texts
from megatron.tokenizer.base import Tokenizer

FLAG = "--sample-data"
_KEY = "text"
_FLAGS = FlagNames(
    input=FLAG, keys=f"the key {_KEY!r}", output="", skip_advice="give another file"
)


def read_sample(path: str, tokenizer: Tokenizer, num_tokens: int, length: int) -> list[Tensor]:
    """Read the first tokens of a sample.

    Args:
        path: prefix of .bin/.idx files, or a text file with the key "text".
        tokenizer: encodes text; documents end with its end-of-document token, if it has one.
        num_tokens: tokens to read.
        length: tokens per sequence.
    Returns:
        int64 sequences of `length` + 1 tokens, the last of which begins the next sequence.
    Raises:
        ValueError: there are fewer than two tokens, or an id that the tokenizer does not have.
        OSError: a file cannot be read.
    """
    documents = _indexed(path) if os.path.exists(f"{path}.idx") else _encoded(path, tokenizer)
    parts = []
    missing = num_tokens + 1
    for tokens in documents:
        parts.append(tokens[:missing].astype(np.int64))
        missing -= len(parts[-1])
        if not missing:
            break
    tokens_T = torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0)
    require(len(tokens_T) > 1, FLAG, path, "text of two tokens or more")
    require(
        int(tokens_T.max()) < tokenizer.vocab_size,
        FLAG,
        path,
        f"ids below {tokenizer.vocab_size}, the vocabulary size of the model's tokenizer",
        f"It has the id {int(tokens_T.max())}: preprocess the text with that tokenizer.",
    )
    starts = range(0, len(tokens_T) - 1, length)
    return [tokens_T[start : start + length + 1] for start in starts]


def _indexed(prefix: str) -> Iterator[np.ndarray]:
    dataset = IndexedDataset(prefix)
    for sequence in range(len(dataset)):
        yield dataset[sequence]


def _encoded(path: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the tokens of the documents of text files, each with its end."""
    end = [] if tokenizer.eod is None else [tokenizer.eod]
    for texts in read_texts(path, _KEY, _FLAGS):
        for text in texts:
            yield np.concatenate([tokenizer.encode(text), np.array(end, np.uint32)])
