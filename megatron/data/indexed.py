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
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def dtype_for_vocab(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 tokens (Megatron's limit, a little under 2^16), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDataset:
    """One .bin/.idx pair, memory-mapped and checked at opening. `len()` and `[i]` are about sequences.

    Attributes:
        prefix: the path without `.bin` and `.idx`.
        dtype: of the stored tokens.
        lengths: int32 [N], tokens of each sequence.
        pointers: int64 [N], byte offset of each sequence in `.bin`.
        document_index: int64 [documents + 1], sequence boundaries.
        num_documents, num_tokens: totals.
        sidecar: the content of `<prefix>.json`, or None when there is none.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the files are damaged, do not fit each other, or are of a kind that is not supported.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = os.fspath(prefix)
        for suffix in (".idx", ".bin"):
            if not os.path.isfile(self.prefix + suffix):
                raise FileNotFoundError(_missing(self.prefix, suffix))
        self._open_index()
        self._check_index()
        self._tokens = self._open_tokens()
        self.sidecar = _read_sidecar(self.prefix)

    def _open_index(self) -> None:
        path = self.prefix + ".idx"
        size = os.path.getsize(path)
        if size < HEADER.size:
            raise ValueError(f"{path} has {size} bytes, fewer than its header: it is truncated. {AGAIN}")
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
        magic, version, code, sequences, boundaries = HEADER.unpack(data[:HEADER.size].tobytes())
        if magic != MAGIC:
            raise ValueError(f"{path} is not a Megatron index: it starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise ValueError(f"{path} has format version {version}; allowed: {VERSION}. {AGAIN}")
        if code not in DTYPES:
            raise ValueError(f"{path} has dtype code {code}; allowed: {', '.join(map(str, DTYPES))}. {AGAIN}")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if size == expected + sequences and sequences:
            raise ValueError(f"{path} has a modes section (multimodal data of newer Megatron-LM), which is not "
                             f"supported. Preprocess the text alone with tools/preprocess_data.py")
        if size != expected:
            raise ValueError(f"{path} has {size} bytes, but its {sequences} sequences and {boundaries} document "
                             f"boundaries take {expected}: it is truncated or damaged. {AGAIN}")
        self.dtype = np.dtype(DTYPES[code])
        at_pointers, at_documents = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
        self.lengths = data[HEADER.size:at_pointers].view("<i4")
        self.pointers = data[at_pointers:at_documents].view("<i8")
        self.document_index = data[at_documents:].view("<i8")
        self.num_documents = boundaries - 1
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))

    def _check_index(self) -> None:
        path, documents = self.prefix + ".idx", self.document_index
        if (self.lengths < 0).any():
            raise ValueError(f"{path} is damaged: it has negative sequence lengths. {AGAIN}")
        if not np.array_equal(self.pointers, byte_pointers(self.lengths, self.dtype)):
            raise ValueError(f"{path} is damaged: its pointers are not the running sum of its lengths. {AGAIN}")
        if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(self) or (np.diff(documents) < 0).any():
            raise ValueError(f"{path} is damaged: its document index does not rise from 0 to the number of sequences, "
                             f"{len(self)}. {AGAIN}")

    def _open_tokens(self) -> np.ndarray:
        """The mapped .bin, whose size must be what the index says."""
        path = self.prefix + ".bin"
        size, expected = os.path.getsize(path), self.num_tokens * self.dtype.itemsize
        non_empty = int(np.count_nonzero(self.document_lengths()))
        if size != expected and size == expected + non_empty * self.dtype.itemsize:
            raise ValueError(
                f"{path} has exactly one token per non-empty document ({non_empty}) more than its index counts: it was "
                f"written by a preprocessing that leaves the end-of-document token out of the lengths, so that "
                f"document i would start i tokens early. Preprocess the text again with tools/preprocess_data.py")
        if size != expected:
            raise ValueError(f"{path} has {size} bytes, but its index counts {self.num_tokens} tokens of "
                             f"{self.dtype.itemsize} bytes, {expected} bytes: one of the two files is truncated or "
                             f"belongs to another run. {AGAIN}")
        if size == 0:  # cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(path, self.dtype.newbyteorder("<"), "r").view(np.ndarray)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> np.ndarray:
        """Tokens of one sequence: a read-only view in the stored dtype. IndexError beyond the end."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {self.prefix}: allowed 0 to {len(self) - 1}")
        return self._tokens[self._token(sequence):self._token(sequence + 1)]

    def __reduce__(self) -> tuple:
        return IndexedDataset, (self.prefix,)  # a worker process maps the files again instead of receiving them

    def document_lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document, 0 for an empty one."""
        starts = np.empty(len(self) + 1, np.int64)
        starts[:-1], starts[-1] = self.pointers // self.dtype.itemsize, self.num_tokens
        return np.diff(starts[self.document_index])

    def read(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a document (None: to its end): a read-only view in the stored dtype.

        Raises:
            IndexError: there is no such document.
            ValueError: the range reaches beyond the document.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.prefix}: allowed 0 to {self.num_documents - 1}")
        start = self._token(int(self.document_index[document]))
        size = self._token(int(self.document_index[document + 1])) - start
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise ValueError(f"tokens {offset} to {stop} of document {document} of {self.prefix}: allowed 0 to {size}")
        return self._tokens[start + offset:start + stop]

    def _token(self, sequence: int) -> int:
        """Where a sequence starts, in tokens; `len(self)` is the end of the data."""
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < len(self) else self.num_tokens


AGAIN = "Copy it again, or preprocess the text again"


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
        raise ValueError(f"{path} is damaged ({error}). Remove it, or preprocess the text again") from None
    return content


def _missing(prefix: str, suffix: str) -> str:
    """What to say when a file of the pair is not there: names near it, since a prefix is easily mistyped."""
    path = Path(prefix)
    folder, name = path.parent, path.name.removesuffix(".bin").removesuffix(".idx")
    there = sorted(p.stem for p in folder.glob("*.idx")) if folder.is_dir() else []
    near = [n for n in there if n.startswith(name)] or difflib.get_close_matches(name, there) or there
    found = ", ".join(str(folder / n) for n in near[:5]) if near else "none"
    where = f"Prefixes in {folder}" if folder.is_dir() else f"The folder {folder} does not exist; prefixes there"
    return (f"{prefix}{suffix} does not exist. A dataset is named by its prefix, without .bin and .idx but with "
            f"_text_document. {where}: {found}")
