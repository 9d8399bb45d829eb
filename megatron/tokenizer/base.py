"""The tokenizer interface, and helper functions shared by all tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np

# Literals that mark the end of a document, in the order in which they are looked up when the
# tokenizer's files do not name one.
_END_OF_DOCUMENT = (
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


class Tokenizer(ABC):
    """Interface of all tokenizers.

    Attributes:
        name: the `--tokenizer-type`.
        vocab_size: largest id + 1, including special tokens but not padding.
        eod: id of the end-of-document token.
        bos: id that `encode` puts before every text, or None.
        fingerprint: SHA-256 (hex) of the vocabulary and merges; with equal fingerprints, ids
            have the same meaning.
        difference: how the fast encoder, if there is one, was found to differ from the
            reference implementation; empty if it was not.
    """

    name: str
    vocab_size: int
    eod: int
    fingerprint: str
    bos: int | None = None
    difference: str = ""

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text (uint32), without an end-of-document token."""
        ids, _ = self.encode_batch([text])
        return ids

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode several texts.

        Returns:
            The concatenated ids of all texts (uint32), and the number of ids of each text
            (int64).
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; ids outside the vocabulary (its padding) are skipped.

        BPE tokenizers spell out special tokens.
        """
        return self._decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def compare(self, documents: int) -> None:  # noqa: B027 - most have no fast encoder
        """Compare the fast encoder with the reference on the next `documents` texts; 0: do not."""

    def use_reference(self) -> None:  # noqa: B027
        """Use the reference implementation from now on."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Return the text of ids that are all in the vocabulary."""


def require_file(path: str, flag: str, kind: str, what: str) -> str:
    """Return `path` if it is an existing file.

    Args:
        flag: flag that sets the path.
        kind: tokenizer type that needs the file.
        what: description of the file.
    Raises:
        FileNotFoundError: the path is empty or not a file.
    """
    if not path:
        raise FileNotFoundError(f"{flag} is not set; {kind} needs {what}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{flag} {path} does not exist; {kind} needs {what}")
    return path


def find_eod(id_of: Callable[[str], int | None], source: str, named: str | None = None) -> int:
    """Return the id of the end-of-document token: the one named by the files, or else the first
    known literal that is in the vocabulary.

    Args:
        id_of: returns the id of a literal, or None.
        source: file of the vocabulary, for the error message.
        named: literal that the tokenizer's files name, if any.
    Raises:
        ValueError: the vocabulary contains none of these literals.
    """
    candidates = list(_END_OF_DOCUMENT)
    if named:
        candidates.insert(0, named)
    for literal in candidates:
        found = id_of(literal)
        if found is not None:
            return found
    raise ValueError(
        f"{source} has no end-of-document token; tried {' '.join(candidates)}. Add one to the "
        "vocabulary"
    )


def flatten(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated rows (uint32) and the length of each row (int64)."""
    lengths = np.fromiter(map(len, rows), np.int64, count=len(rows))
    ids = np.fromiter(chain.from_iterable(rows), np.uint32, count=int(lengths.sum()))
    return ids, lengths


def digest(*content: object) -> str:
    """Return the SHA-256 (hex) of JSON-serialisable content."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it is empty."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0]
