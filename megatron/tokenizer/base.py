"""The tokenizer interface, and helper functions shared by all tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

from megatron.config.tokenizer import TokenizerConfig

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
        eod: id of the end-of-document token; None if the vocabulary has none.
        bos: id that `encode` puts before every text, or None.
        fingerprint: SHA-256 (hex) of the vocabulary and merges; with equal fingerprints, ids
            have the same meaning.
        difference: how the fast encoder, if there is one, was found to differ from the
            reference implementation; empty if it was not.
    """

    name: str
    vocab_size: int
    eod: int | None
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

    def require_eod(self, needed_by: str) -> int:
        """Return the id of the end-of-document token.

        Args:
            needed_by: the flag that needs it.
        Raises:
            ValueError: there is none.
        """
        if self.eod is None:
            raise ValueError(
                f"{needed_by} needs an end-of-document token, and the vocabulary of this "
                f"{self.name} has none; tried {' '.join(_END_OF_DOCUMENT)}. Name one of its "
                "tokens with --eod-token, or add one to the vocabulary"
            )
        return self.eod

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


def find_eod(
    vocabulary: Mapping[str, int], source: str, flag: str = "", named: str | None = None
) -> str | None:
    """Return the literal of the end-of-document token: the one that the flag names, or the files
    name, or else the first known literal that is in the vocabulary; None: there is none.

    Args:
        source: file of the vocabulary, for the error message.
        flag: value of --eod-token; empty: not set.
        named: literal that the tokenizer's files name, if any.
    Raises:
        ValueError: the flag's token is not in the vocabulary.
    """
    if flag:
        if flag not in vocabulary:
            raise ValueError(
                f"--eod-token is {flag!r}, which is not in the vocabulary of {source}; allowed: "
                f"one of its tokens. Known names of such tokens: {' '.join(_END_OF_DOCUMENT)}"
            )
        return flag
    candidates = [named, *_END_OF_DOCUMENT] if named else _END_OF_DOCUMENT
    return next((literal for literal in candidates if literal in vocabulary), None)


def refuse_eod_token(config: TokenizerConfig, eod: int) -> None:
    """Refuse --eod-token for a tokenizer whose end-of-document id is fixed.

    Raises:
        ValueError: the flag is set.
    """
    if config.eod_token:
        raise ValueError(
            f"--eod-token is {config.eod_token!r}; allowed with {config.tokenizer_type}: none, "
            f"because its end-of-document id is always {eod}. Leave the flag out"
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
