"""Token shards in Megatron's format: `<prefix>.bin` holds raw tokens, `<prefix>.idx` says where documents lie.

`.idx`, little-endian and packed: magic (9 bytes) | u64 version | u8 dtype code | u64 N | u64 D | i32 lengths[N] |
i64 byte pointers[N] | i64 document index[D], whose entries are sequence boundaries from 0 to N. `<prefix>.json` beside
them, which Megatron ignores, records the tokenizer.

A document is one or more sequences, one after the other in `.bin`. A text that encodes to nothing is a document
without sequences, as Megatron's own preprocessing writes it: it is kept, so that documents and input lines correspond,
and no sequence has length 0. Readers accept sequences of length 0 too.
"""

from __future__ import annotations

import difflib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
BLOCK = 1 << 16  # entries of an index checked at once
AGAIN = "Copy it again, or preprocess the text again"


def dtype_for_vocab(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 tokens (Megatron's limit, a little under 2^16), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True, eq=False)
class Index:
    """What `<prefix>.idx` says."""

    dtype: np.dtype
    """of the stored tokens"""
    lengths: np.ndarray
    """int32 [N], tokens of each sequence"""
    pointers: np.ndarray
    """int64 [N], byte offset of each sequence in `.bin`"""
    document_index: np.ndarray
    """int64 [documents + 1], sequence boundaries"""

    @property
    def num_documents(self) -> int:
        return len(self.document_index) - 1

    @property
    def num_tokens(self) -> int:
        return (
            int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])
            if len(self.lengths)
            else 0
        )

    def document_starts(self) -> np.ndarray:
        """int64 [documents + 1]: where each document starts in `.bin`, in tokens, and the end of the last."""
        starts = np.empty(len(self.lengths) + 1, np.int64)
        np.floor_divide(self.pointers, self.dtype.itemsize, out=starts[:-1])
        starts[-1] = self.num_tokens
        return starts[self.document_index]


def read_index(prefix: str | os.PathLike) -> Index:
    """Map `<prefix>.idx` and check it; `.bin` is not looked at.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged or of a kind that is not supported.
    """
    _require_file(os.fspath(prefix), ".idx")
    path = os.fspath(prefix) + ".idx"
    size = os.path.getsize(path)
    if size < HEADER.size:
        raise ValueError(
            f"{path} has {size} bytes, fewer than its header: it is truncated. {AGAIN}"
        )
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    magic, version, code, sequences, boundaries = HEADER.unpack(data[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise ValueError(
            f"{path} is not a Megatron index: it starts with {magic!r}, not {MAGIC!r}"
        )
    if version != VERSION:
        raise ValueError(f"{path} has format version {version}; allowed: {VERSION}. {AGAIN}")
    if code not in DTYPES:
        raise ValueError(
            f"{path} has dtype code {code}; allowed: {', '.join(map(str, DTYPES))}. {AGAIN}"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size == expected + sequences and sequences:
        raise ValueError(
            f"{path} has a modes section (multimodal data of newer Megatron-LM), which is not "
            f"supported. Preprocess the text alone with tools/preprocess_data.py"
        )
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, but its {sequences} sequences and {boundaries} document "
            f"boundaries take {expected}: it is truncated or damaged. {AGAIN}"
        )
    at_pointers, at_documents = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
    index = Index(
        np.dtype(DTYPES[code]),
        data[HEADER.size : at_pointers].view("<i4"),
        data[at_pointers:at_documents].view("<i8"),
        data[at_documents:].view("<i8"),
    )
    _check_index(index, path)
    return index


def _check_index(index: Index, path: str) -> None:
    """Each entry of the index once, block by block, so that the working memory stays in the processor's cache."""
    lengths, pointers, documents = index.lengths, index.pointers, index.document_index
    for at in range(0, len(lengths), BLOCK):
        block, starts = lengths[at : at + BLOCK], pointers[at : at + BLOCK + 1]
        if block.min() < 0:
            raise ValueError(f"{path} is damaged: it has negative sequence lengths. {AGAIN}")
        steps = np.multiply(block, index.dtype.itemsize, dtype=np.int64)
        if pointers[0] != 0 or not np.array_equal(np.diff(starts), steps[: len(starts) - 1]):
            raise ValueError(
                f"{path} is damaged: its pointers are not the running sum of its lengths. {AGAIN}"
            )
    parts = (documents[at : at + BLOCK + 1] for at in range(0, len(documents), BLOCK))
    falls = any(
        (part[1:] < part[:-1]).any() for part in parts
    )  # a difference of two int64 can wrap around
    if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(lengths) or falls:
        raise ValueError(
            f"{path} is damaged: its document index does not rise from 0 to the number of sequences, "
            f"{len(lengths)}. {AGAIN}"
        )


def uncounted_ends(index: Index, bin_size: int) -> int:
    """How many tokens a `.bin` of this many bytes has beyond its index, if it is one for each non-empty document: what
    a preprocessing leaves that forgets the end-of-document token in the lengths. 0 for any other size."""
    beyond = bin_size - index.num_tokens * index.dtype.itemsize
    if beyond <= 0 or beyond != index.dtype.itemsize * np.count_nonzero(
        np.diff(index.document_starts())
    ):
        return 0
    return beyond // index.dtype.itemsize


class IndexedDataset:
    """One .bin/.idx pair, memory-mapped and checked at opening. `len()` and `[i]` are about sequences.

    Args:
        prefix: the path without `.bin` and `.idx`.
        index: what to read `.bin` by instead of `.idx`: a repaired one.

    Attributes:
        prefix: as given.
        index: what `.bin` is read by.
        dtype, lengths, pointers, document_index, num_documents, num_tokens: of the index.
        tokens: all of `.bin`, a read-only view in the stored dtype.
        sidecar: the content of `<prefix>.json`, or None when there is none.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the files are damaged, do not fit each other, or are of a kind that is not supported.
    """

    def __init__(self, prefix: str | os.PathLike, index: Index | None = None):
        self.prefix = os.fspath(prefix)
        self._arguments = (self.prefix, index)
        self.index = index = index or read_index(self.prefix)
        self.dtype, self.lengths, self.pointers = index.dtype, index.lengths, index.pointers
        self.document_index = index.document_index
        self.num_documents, self.num_tokens = index.num_documents, index.num_tokens
        self.tokens = self._open_tokens()
        self.sidecar = _read_sidecar(self.prefix)

    def _open_tokens(self) -> np.ndarray:
        """The mapped .bin, whose size must be what the index says."""
        _require_file(self.prefix, ".bin")
        path = self.prefix + ".bin"
        size, expected = os.path.getsize(path), self.num_tokens * self.dtype.itemsize
        if uncounted := uncounted_ends(self.index, size):
            raise ValueError(
                f"{path} has exactly one token per non-empty document ({uncounted}) more than its index counts: it was "
                f"written by a preprocessing that leaves the end-of-document token out of the lengths, so that "
                f"document i would start i tokens early. Repair it with tools/inspect_dataset.py {self.prefix} "
                f"--repair OUT, or preprocess the text again with tools/preprocess_data.py"
            )
        if size != expected:
            raise ValueError(
                f"{path} has {size} bytes, but its index counts {self.num_tokens} tokens of "
                f"{self.dtype.itemsize} bytes, {expected} bytes: one of the two files is truncated or "
                f"belongs to another run. {AGAIN}"
            )
        if size == 0:  # cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(path, self.dtype.newbyteorder("<"), "r").view(np.ndarray)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> np.ndarray:
        """Tokens of one sequence: a read-only view in the stored dtype. IndexError beyond the end."""
        if not 0 <= sequence < len(self):
            raise IndexError(
                f"sequence {sequence} of {self.prefix}: allowed 0 to {len(self) - 1}"
            )
        return self.tokens[self._token(sequence) : self._token(sequence + 1)]

    def __reduce__(self) -> tuple:
        return (
            IndexedDataset,
            self._arguments,
        )  # a worker process maps the files again instead of receiving them

    def document_lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document, 0 for an empty one."""
        return np.diff(self.index.document_starts())

    def read(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a document (None: to its end): a read-only view in the stored dtype.

        Raises:
            IndexError: there is no such document.
            ValueError: the range reaches beyond the document.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(
                f"document {document} of {self.prefix}: allowed 0 to {self.num_documents - 1}"
            )
        start = self._token(int(self.document_index[document]))
        size = self._token(int(self.document_index[document + 1])) - start
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise ValueError(
                f"tokens {offset} to {stop} of document {document} of {self.prefix}: allowed 0 to {size}"
            )
        return self.tokens[start + offset : start + stop]

    def _token(self, sequence: int) -> int:
        """Where a sequence starts, in tokens; `len(self)` is the end of the data."""
        return (
            int(self.pointers[sequence]) // self.dtype.itemsize
            if sequence < len(self)
            else self.num_tokens
        )


def prefix_of(path: str) -> str:
    """The prefix that a path means: what is before `.bin` or `.idx`, or the path as it is."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix in (".bin", ".idx") and not os.path.isfile(path + ".idx") else path


def byte_pointers(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """int64 [N]: where sequences of these lengths start, one after the other."""
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    return np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])


def _read_sidecar(prefix: str) -> dict[str, Any] | None:
    path = Path(prefix + ".json")
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(
            f"{path} is damaged ({error}). Remove it, or preprocess the text again"
        ) from None
    return content


def _require_file(prefix: str, suffix: str) -> None:
    """Raise FileNotFoundError, with the names near it (a prefix is easily mistyped), unless the file is there."""
    if os.path.isfile(prefix + suffix):
        return
    path = Path(prefix)
    folder, name = path.parent, path.name.removesuffix(".bin").removesuffix(".idx")
    there = sorted(p.stem for p in folder.glob("*.idx")) if folder.is_dir() else []
    near = (
        [n for n in there if n.startswith(name)]
        or difflib.get_close_matches(name, there)
        or there
    )
    found = ", ".join(str(folder / n) for n in near[:5]) if near else "none"
    where = (
        f"Prefixes in {folder}"
        if folder.is_dir()
        else f"The folder {folder} does not exist; prefixes there"
    )
    raise FileNotFoundError(
        f"{prefix}{suffix} does not exist. A dataset is named by its prefix, without .bin and .idx "
        f"but with _text_document. {where}: {found}"
    )
