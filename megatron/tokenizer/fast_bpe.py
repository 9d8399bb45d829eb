"""Byte-level BPE through gigatoken, checked against a reference tokenizer."""

from __future__ import annotations

import os
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from megatron.tokenizer.base import LOGGER, Tokenizer, flatten

COMPARED_DOCUMENTS, COMPARED_CHARACTERS = 16, 1 << 12
"""documents, and characters of each, on which the fast encoder must agree with the reference one"""

CACHE_BYTES = 192 << 20
"""by which the process may grow before the fast encoder is loaded anew: several times what most text makes of it"""

LOOKED_AT = 1 << 18  # characters, which take 4 bytes each meanwhile

NEW_FROM = 0x378  # the first code point that is not assigned

ALL_NEW_FROM = 0x40000  # nothing is assigned here but tags and private use


@lru_cache(maxsize=1)
def new_characters() -> np.ndarray:
    """bool [ALL_NEW_FROM]: code points that this Python's Unicode does not know.

    Two libraries split text alike only where their Unicode tables agree. gigatoken knows version 17, `tokenizers` and
    tiktoken know 16: they differ in 4,657 characters (found by trying all), none of which is in Python's tables before
    3.15. What an older table knows, all know alike.
    """
    return np.fromiter(
        (unicodedata.category(chr(c)) == "Cn" for c in range(ALL_NEW_FROM)), bool, ALL_NEW_FROM
    )


def texts_with_new_characters(texts: list[str]) -> set[int]:
    """Numbers of the texts on which the fast encoder is not to be trusted."""
    found: set[int] = set()
    group, characters = (
        [],
        0,
    )  # looked at together: texts can be short, and each look costs some microseconds
    for i, text in enumerate(texts):
        if not text.isascii():
            group.append(i)
            characters += len(text)
        if characters >= LOOKED_AT or (group and i == len(texts) - 1):
            if _has_new("".join([texts[k] for k in group])):
                found.update(k for k in group if _has_new(texts[k]))
            group, characters = [], 0
    return found


def _has_new(text: str) -> bool:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    codes = codes[codes >= NEW_FROM]
    return bool(len(codes)) and bool(
        (codes >= ALL_NEW_FROM).any() or new_characters()[codes].any()
    )


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class FastBPE(Tokenizer):
    """A tokenizer with a reference implementation and, where it can load the vocabulary, gigatoken in front of it.

    The first documents of each instance are encoded by both. On a difference this instance says so and uses only the
    reference from then on: it is slower by one to two orders of magnitude, but right. Texts with characters that are
    new in Unicode always go to the reference.
    """

    _fast: gigatoken.Tokenizer | None = None
    _load: Callable[[], gigatoken.Tokenizer]
    _resident = 0
    """bytes of memory of the process when `_fast` was loaded"""
    _to_compare = COMPARED_DOCUMENTS

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        doubtful = texts_with_new_characters(texts) if self._fast is not None else set()
        if self._fast is not None and texts and self._to_compare:
            self._compare(
                [text for i, text in enumerate(texts) if i not in doubtful]
                if doubtful
                else texts
            )
        if self._fast is None or not texts:
            return flatten(self._reference(texts))
        self._bound_memory()
        if not doubtful:
            return self._encode_fast(texts)
        ids, lengths = self._encode_fast(
            [text for i, text in enumerate(texts) if i not in doubtful]
        )
        rows, fast = [], iter(np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else ())
        right = iter(self._reference([texts[i] for i in sorted(doubtful)]))
        for i in range(len(texts)):
            rows.append(np.array(next(right), np.uint32) if i in doubtful else next(fast))
        return np.concatenate(rows), np.array([*map(len, rows)], np.int64)

    def _encode_fast(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        layout = self._fast.encode_batch(
            texts
        ).layout  # an awkward ListOffsetArray: flat content and offsets
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def _bound_memory(self) -> None:
        """gigatoken remembers every word that it has seen; load it anew when that has become too much."""
        resident = resident_bytes()
        self._resident = self._resident or resident
        if resident - self._resident > CACHE_BYTES:
            self._fast = None  # frees the old one before there is a new one
            self._fast = self._load()
            self._resident = resident_bytes()

    def compare(self, documents: int) -> None:
        self._to_compare = documents

    def use_reference(self) -> None:
        self._fast = None

    def _compare(self, texts: list[str]) -> None:
        sample = [t[:COMPARED_CHARACTERS] for t in texts[: self._to_compare]]
        for text, right, fast in zip(
            sample, self._reference(sample), self._fast.encode_batch_list(sample)
        ):
            if list(right) != list(fast):
                self.difference = (
                    f"gigatoken encodes a document differently from the reference implementation of {self.name} (it "
                    f"starts with {text[:40]!r}): using the reference, which is much slower"
                )
                LOGGER.warning("%s", self.difference)
                self.use_reference()
                return
        self._to_compare -= len(sample)

    def _load_fast(self, load: Callable[[], gigatoken.Tokenizer]) -> gigatoken.Tokenizer | None:
        """Call `load`; a vocabulary that gigatoken does not support leaves the reference alone, with a warning."""
        self._load = load
        try:
            return load()
        except Exception as error:  # gigatoken raises plain RuntimeError, ValueError or OSError
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            LOGGER.warning(
                "gigatoken cannot load this %s (%s): using the reference implementation, which is much "
                "slower",
                self.name,
                reason,
            )
            return None

    @abstractmethod
    def _reference(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Ids of each text by the reference implementation."""
