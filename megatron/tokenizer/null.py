"""Tokenizer for text that consists of token ids already."""

from __future__ import annotations

from itertools import chain

import numpy as np

from megatron.config.tokenizer import TokenizerConfig
from megatron.tokenizer.base import Tokenizer, digest, flatten, refuse_eod_token

# The end-of-document id follows the vocabulary and has to be an int32.
_LARGEST_VOCABULARY = 2**31 - 2


class NullTokenizer(Tokenizer):
    """Reads token ids written in decimal and separated by whitespace.

    The end-of-document id follows the vocabulary.

    Args:
        size: number of ordinary ids; `vocab_size` is one more, as in Megatron.
    """

    name = "NullTokenizer"

    def __init__(self, size: int):
        self.eod = size
        self.vocab_size = size + 1
        self.fingerprint = digest([self.name, size])

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode several texts; see the base class.

        Raises:
            ValueError: a word is not an id of the vocabulary.
        """
        words = [text.split() for text in texts]
        for word in chain.from_iterable(words):
            if not (_is_decimal(word) and int(word) < self.vocab_size):
                raise ValueError(
                    f"{word[:40]!r} is no token id for {self.name}; allowed: 0 to {self.eod}, "
                    "written in decimal and separated by blanks"
                )
        return flatten([list(map(int, row)) for row in words])

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def build_null(config: TokenizerConfig, threads: int) -> Tokenizer:
    """Build the tokenizer from its vocabulary size, which is `--tokenizer-model`.

    Raises:
        ValueError: that is not a number in the allowed range, or --eod-token is set.
    """
    size = config.tokenizer_model
    # int() refuses thousands of digits: look at the length first.
    is_number = _is_decimal(size) and len(size) < 20
    if not is_number or not 0 < int(size) <= _LARGEST_VOCABULARY:
        raise ValueError(
            f"--tokenizer-model is {size!r}; allowed for NullTokenizer: the vocabulary size, "
            f"1 to {_LARGEST_VOCABULARY} (ids are stored as int32)"
        )
    refuse_eod_token(config, int(size))
    return NullTokenizer(int(size))


def _is_decimal(word: str) -> bool:
    """Return whether a word consists of the digits 0 to 9."""
    return word.isascii() and word.isdecimal()
