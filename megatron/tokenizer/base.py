"""The tokenizer interface, and helpers that all tokenizers share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np

LOGGER = logging.getLogger("megatron")

END_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<eod>",
    "<EOD>",
    "<|im_end|>",
    "<|eot_id|>",
    "[EOS]",
    "<EOS>",
)
"""literals that mark the end of a document, in the order they are looked for when the files do not say"""


class Tokenizer(ABC):
    """What every tokenizer offers.

    Attributes:
        name: the `--tokenizer-type`.
        vocab_size: largest id + 1, special tokens included, padding not.
        eod: id that ends a document.
        bos: id put before every text by `encode`, or None.
        fingerprint: sha256 hex of the vocabulary and merges: equal fingerprints give ids the same meaning.
        difference: how the fast encoder, where there is one, once differed from the reference; else empty.
    """

    name: str
    vocab_size: int
    eod: int
    fingerprint: str
    bos: int | None = None
    difference: str = ""

    def encode(self, text: str) -> np.ndarray:
        """uint32 ids of one text, without an end-of-document id."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(uint32 ids of all texts one after the other, int64 length of each)."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; ids beyond the vocabulary (its padding) have none. BPE kinds spell special tokens out."""
        return self._decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def compare(self, documents: int) -> None:  # noqa: B027 - most have no fast encoder
        """Compare the fast encoder on that many documents from the next batch on; 0: trust it."""

    def use_reference(self) -> None:  # noqa: B027
        """Use the reference implementation from now on."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


def _file(path: str, flag: str, kind: str, what: str) -> str:
    """`path`, which must be an existing file."""
    if not path:
        raise FileNotFoundError(f"{flag} is not set; {kind} needs {what}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{flag} {path} does not exist; {kind} needs {what}")
    return path


def find_eod(id_of: Callable[[str], int | None], source: str, named: str | None = None) -> int:
    """Id of the end-of-document token: the one the files name, else the first known literal.

    Args:
        id_of: literal -> id or None.
    Raises:
        ValueError: none is in the vocabulary.
    """
    tried = [*([named] if named else []), *END_OF_DOCUMENT]
    for literal in tried:
        if (found := id_of(literal)) is not None:
            return found
    raise ValueError(
        f"{source} has no end-of-document token; tried {' '.join(tried)}. Add one to the vocabulary"
    )


def flatten(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 ids one row after the other, int64 length of each row)."""
    lengths = np.fromiter(map(len, rows), np.int64, count=len(rows))
    return np.fromiter(chain.from_iterable(rows), np.uint32, count=int(lengths.sum())), lengths


def digest(*content: object) -> str:
    """sha256 hex of plain content."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def one_line(error: BaseException) -> str:
    """First line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
