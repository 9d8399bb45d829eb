"""Byte-level BPE by gigatoken, checked against a reference tokenizer."""

from __future__ import annotations

import os
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from megatron.log import warn_on_rank0
from megatron.tokenizer.base import Tokenizer, flatten, one_line

if TYPE_CHECKING:
    import gigatoken

# Number of documents, and characters of each, on which the fast encoder has to agree with the
# reference implementation.
_COMPARED_DOCUMENTS = 16
_COMPARED_CHARACTERS = 1 << 12

# Growth of the process in bytes after which the fast encoder is loaded again. Most texts cause
# a fraction of it.
_CACHE_BYTES = 192 << 20

# Characters searched for new code points together: texts can be short, and each search has an
# overhead of some microseconds. A character takes 4 bytes during the search.
_SEARCHED_TOGETHER = 1 << 18

_FIRST_UNASSIGNED = 0x378  # lowest code point that Unicode does not assign
_LAST_ASSIGNED = 0x40000  # from here on there are only tags and private-use code points


@lru_cache(maxsize=1)
def new_characters() -> np.ndarray:
    """Return which code points below `_LAST_ASSIGNED` this Python's Unicode does not know (bool).

    Two libraries split text alike only where their Unicode tables agree. gigatoken knows
    version 17, `tokenizers` and tiktoken know 16: they differ in 4,657 characters (found by
    trying all), none of which is in Python's tables before 3.15. All libraries agree on the
    characters of an older table.
    """
    return np.fromiter(
        (unicodedata.category(chr(c)) == "Cn" for c in range(_LAST_ASSIGNED)),
        bool,
        _LAST_ASSIGNED,
    )


def texts_with_new_characters(texts: list[str]) -> set[int]:
    """Return the indices of texts for which the fast encoder cannot be trusted."""
    found: set[int] = set()
    group: list[int] = []
    characters = 0
    for i, text in enumerate(texts):
        if not text.isascii():
            group.append(i)
            characters += len(text)
        if characters >= _SEARCHED_TOGETHER:
            found |= _search(texts, group)
            group = []
            characters = 0
    return found | _search(texts, group)


def _search(texts: list[str], group: list[int]) -> set[int]:
    """Return the indices in `group` of texts with new characters."""
    if not _has_new_characters("".join([texts[i] for i in group])):
        return set()
    return {i for i in group if _has_new_characters(texts[i])}


def _has_new_characters(text: str) -> bool:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    codes = codes[codes >= _FIRST_UNASSIGNED]
    if not len(codes):
        return False
    if (codes >= _LAST_ASSIGNED).any():
        return True
    return bool(new_characters()[codes].any())


def resident_bytes() -> int:
    """Return the resident memory of this process, or 0 where the system does not provide it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class FastBPE(Tokenizer):
    """A reference implementation with gigatoken in front of it, if that is installed and can load
    the vocabulary.

    The first documents of each instance are encoded by both. If they differ, this instance
    logs a warning and uses only the reference from then on, which is slower by one to two
    orders of magnitude, but right. Texts with characters that are new in Unicode are always
    encoded by the reference.
    """

    _fast: gigatoken.Tokenizer | None = None
    _load: Callable[[], gigatoken.Tokenizer]
    _resident = 0
    """Resident memory of the process in bytes when `_fast` was loaded"""
    _to_compare = _COMPARED_DOCUMENTS
    """Number of documents on which the two implementations are still to be compared"""

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._fast is None or not texts:
            return flatten(self._reference(texts))
        doubtful = texts_with_new_characters(texts)
        trusted = texts
        if doubtful:
            trusted = [text for i, text in enumerate(texts) if i not in doubtful]
        if self._to_compare:
            self._compare(trusted)
        if self._fast is None:  # the comparison found a difference
            return flatten(self._reference(texts))
        self._bound_memory()
        ids, lengths = self._encode_fast(trusted)
        if not doubtful:
            return ids, lengths
        fast_rows = []
        if len(lengths):
            fast_rows = np.split(ids, np.cumsum(lengths)[:-1])
        return self._insert_reference_rows(texts, doubtful, fast_rows)

    def _insert_reference_rows(
        self, texts: list[str], doubtful: set[int], fast_rows: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode the doubtful texts by the reference and put their ids between those of the others.

        Args:
            fast_rows: ids of the other texts, in order.
        """
        fast = iter(fast_rows)
        reference = iter(self._reference([texts[i] for i in sorted(doubtful)]))
        rows = []
        for i in range(len(texts)):
            if i in doubtful:
                rows.append(np.array(next(reference), np.uint32))
            else:
                rows.append(next(fast))
        return np.concatenate(rows), np.array([len(row) for row in rows], np.int64)

    def _encode_fast(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # An awkward ListOffsetArray: flat content and offsets.
        layout = self._fast.encode_batch(texts).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids, np.diff(offsets)

    def _bound_memory(self) -> None:
        """Load gigatoken again when its cache, which keeps every word seen, has grown too large."""
        resident = resident_bytes()
        self._resident = self._resident or resident
        if resident - self._resident > _CACHE_BYTES:
            self._fast = None  # frees the old cache before there is a new one
            self._fast = self._load()
            self._resident = resident_bytes()

    def compare(self, documents: int) -> None:
        self._to_compare = documents

    def use_reference(self) -> None:
        self._fast = None

    def _compare(self, texts: list[str]) -> None:
        """Encode the beginnings of some texts by both implementations, and leave the fast one if
        they differ."""
        sample = [text[:_COMPARED_CHARACTERS] for text in texts[: self._to_compare]]
        expected = self._reference(sample)
        actual = self._fast.encode_batch_list(sample)
        for text, expected_ids, ids in zip(sample, expected, actual, strict=True):
            if list(expected_ids) != list(ids):
                self.difference = (
                    "gigatoken encodes a document differently from the reference "
                    f"implementation of {self.name} (it starts with {text[:40]!r}): using the "
                    "reference, which is much slower"
                )
                warn_on_rank0("%s", self.difference)
                self.use_reference()
                return
        self._to_compare -= len(sample)

    def _load_fast(
        self, load: Callable[[ModuleType], gigatoken.Tokenizer]
    ) -> gigatoken.Tokenizer | None:
        """Load the vocabulary with gigatoken.

        Args:
            load: takes the module gigatoken.
        Returns:
            None, after a warning, if gigatoken is not installed or does not support the
            vocabulary.
        """
        try:
            import gigatoken
        except ImportError:
            warn_on_rank0(
                "the package gigatoken is not installed: using the reference implementation of "
                "%s, which is much slower. Install it: pip install 'moe-megatron[fast]'",
                self.name,
            )
            return None
        self._load = partial(load, gigatoken)
        try:
            return self._load()
        except Exception as error:  # gigatoken raises plain RuntimeError, ValueError or OSError
            warn_on_rank0(
                "gigatoken cannot load this %s (%s): using the reference implementation, which "
                "is much slower",
                self.name,
                one_line(error),
            )
            return None

    @abstractmethod
    def _reference(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Return the ids of each text by the reference implementation."""
