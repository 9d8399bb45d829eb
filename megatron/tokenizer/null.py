"""Token ids written as text."""

from __future__ import annotations

from itertools import chain

import numpy as np

from megatron.tokenizer.base import Tokenizer, digest, flatten

LARGEST_NULL = 2**31 - 2
"""vocabulary size of a NullTokenizer: the id after it, the end of documents, is an int32"""


class NullTokenizer(Tokenizer):
    """Text is ids already, written in decimal and separated by blanks; the end-of-document id follows the vocabulary.

    Args:
        size: number of ordinary ids; `vocab_size` is one more, as in Megatron.
    """

    name = "NullTokenizer"

    def __init__(self, size: int):
        self.eod, self.vocab_size = size, size + 1
        self.fingerprint = digest([self.name, size])

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """As in the base class. Raises ValueError for a word that is no id below the vocabulary size."""
        words = [text.split() for text in texts]
        for word in chain.from_iterable(words):
            if not (word.isascii() and word.isdecimal() and int(word) < self.vocab_size):
                raise ValueError(
                    f"{word[:40]!r} is no token id for {self.name}; allowed: 0 to {self.eod}, written in "
                    f"decimal and separated by blanks"
                )
        return flatten([[int(word) for word in row] for row in words])

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))
