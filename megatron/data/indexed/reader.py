"""Reader of token files in Megatron's format.

`<prefix>.bin` holds the raw tokens, `<prefix>.idx` the boundaries of sequences and documents.

Layout of `.idx`, little-endian and packed: magic (9 bytes) | u64 version | u8 dtype code |
u64 N | u64 D | i32 lengths[N] | i64 byte pointers[N] | i64 document index[D], whose entries
are sequence boundaries that rise from 0 to N. A sidecar, `<prefix>.json`, records the
tokenizer; Megatron ignores it.

A document consists of consecutive sequences in `.bin`. A text that encodes to no tokens is a
document without sequences, as Megatron's own preprocessing writes it: documents then
correspond to input lines, and no sequence has length 0. Readers accept sequences of length 0
too.
"""

from __future__ import annotations

import difflib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.io.mapped_file import map_file
from megatron.io.untrusted import parse_json

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
DTYPE_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_BLOCK_ENTRIES = 1 << 16  # index entries per validation step: small enough for the CPU cache
_ADVICE = "Copy it again, or preprocess the text again"


def dtype_for_vocab(vocab_size: int) -> np.dtype:
    """Return uint16 below 65,500 tokens (Megatron's limit, a little under 2^16), else int32."""
    if vocab_size < 65500:
        return np.dtype(np.uint16)
    return np.dtype(np.int32)


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """Content of `<prefix>.idx`."""

    dtype: np.dtype
    """Dtype of the stored tokens"""
    lengths: np.ndarray
    """int32 [N]: tokens of each sequence"""
    pointers: np.ndarray
    """int64 [N]: byte offset of each sequence in `.bin`"""
    document_index: np.ndarray
    """int64 [documents + 1]: sequence boundaries of the documents"""

    @property
    def num_documents(self) -> int:
        return len(self.document_index) - 1

    @property
    def num_tokens(self) -> int:
        if len(self.lengths) == 0:
            return 0
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def document_starts(self) -> np.ndarray:
        """Return int64 [documents + 1]: token offset of each document in `.bin`, then the end."""
        starts = np.empty(len(self.lengths) + 1, np.int64)
        np.floor_divide(self.pointers, self.dtype.itemsize, out=starts[:-1])
        starts[-1] = self.num_tokens
        return starts[self.document_index]


def read_index(prefix: str | os.PathLike) -> DatasetIndex:
    """Map `<prefix>.idx` into memory and validate it, without opening `.bin`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is corrupt, or of a kind that is not supported.
    """
    _require_file(os.fspath(prefix), ".idx")
    path = os.fspath(prefix) + ".idx"
    size = os.path.getsize(path)
    if size < INDEX_HEADER.size:
        raise ValueError(
            f"{path} has {size} bytes, fewer than its header: it is truncated. {_ADVICE}"
        )
    data = map_file(path)
    dtype, sequences, boundaries = _parse_header(data[: INDEX_HEADER.size].tobytes(), path)
    _check_index_size(path, size, sequences, boundaries)
    pointers_at = INDEX_HEADER.size + 4 * sequences
    documents_at = INDEX_HEADER.size + 12 * sequences
    index = DatasetIndex(
        dtype,
        lengths=data[INDEX_HEADER.size : pointers_at].view("<i4"),
        pointers=data[pointers_at:documents_at].view("<i8"),
        document_index=data[documents_at:].view("<i8"),
    )
    _check_lengths_and_pointers(index, path)
    _check_document_index(index, path)
    return index


def _parse_header(header: bytes, path: str) -> tuple[np.dtype, int, int]:
    """Return (dtype, number of sequences, number of document boundaries)."""
    magic, version, code, sequences, boundaries = INDEX_HEADER.unpack(header)
    if magic != INDEX_MAGIC:
        raise ValueError(
            f"{path} is not a Megatron index: it starts with {magic!r}, not {INDEX_MAGIC!r}"
        )
    if version != INDEX_VERSION:
        raise ValueError(
            f"{path} has format version {version}; allowed: {INDEX_VERSION}. {_ADVICE}"
        )
    if code not in _DTYPES:
        allowed = ", ".join(map(str, _DTYPES))
        raise ValueError(f"{path} has dtype code {code}; allowed: {allowed}. {_ADVICE}")
    return np.dtype(_DTYPES[code]), sequences, boundaries


def _check_index_size(path: str, size: int, sequences: int, boundaries: int) -> None:
    expected = INDEX_HEADER.size + 12 * sequences + 8 * boundaries
    if size == expected + sequences and sequences:
        raise ValueError(
            f"{path} has a modes section (multimodal data of newer Megatron-LM), which is not "
            f"supported. Preprocess the text alone with tools/preprocess_data.py"
        )
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, but its {sequences} sequences and {boundaries} document "
            f"boundaries take {expected}: it is truncated or corrupt. {_ADVICE}"
        )


def _check_lengths_and_pointers(index: DatasetIndex, path: str) -> None:
    """Require non-negative lengths whose running sum the pointers are, block by block."""
    lengths = index.lengths
    pointers = index.pointers
    for at in range(0, len(lengths), _BLOCK_ENTRIES):
        block = lengths[at : at + _BLOCK_ENTRIES]
        starts = pointers[at : at + _BLOCK_ENTRIES + 1]
        if block.min() < 0:
            raise ValueError(f"{path} is corrupt: it has negative sequence lengths. {_ADVICE}")
        sizes = np.multiply(block, index.dtype.itemsize, dtype=np.int64)
        if pointers[0] != 0 or not np.array_equal(np.diff(starts), sizes[: len(starts) - 1]):
            raise ValueError(
                f"{path} is corrupt: its pointers are not the running sum of its lengths. "
                f"{_ADVICE}"
            )


def _check_document_index(index: DatasetIndex, path: str) -> None:
    """Require document boundaries that never fall and lead from 0 to the last sequence."""
    documents = index.document_index
    sequences = len(index.lengths)
    is_complete = len(documents) > 0 and documents[0] == 0 and documents[-1] == sequences
    if not is_complete or _falls_anywhere(documents):
        raise ValueError(
            f"{path} is corrupt: its document index does not rise from 0 to the number of "
            f"sequences, {sequences}. {_ADVICE}"
        )


def _falls_anywhere(values: np.ndarray) -> bool:
    """Return whether an entry is smaller than the one before it."""
    for at in range(0, len(values), _BLOCK_ENTRIES):
        block = values[at : at + _BLOCK_ENTRIES + 1]
        if (block[1:] < block[:-1]).any():  # np.diff of two int64 values can wrap around
            return True
    return False


def num_uncounted_tokens(index: DatasetIndex, bin_bytes: int) -> int:
    """Return how many tokens `.bin` holds that its index does not count, if one per document.

    Some preprocessing forks leave the end-of-document token out of the sequence lengths, so
    that `.bin` is longer than its index by exactly one token per non-empty document.

    Returns:
        The number of non-empty documents if `bin_bytes` shows that pattern, else 0.
    """
    itemsize = index.dtype.itemsize
    excess = bin_bytes - index.num_tokens * itemsize
    if excess <= 0:
        return 0
    nonempty = int(np.count_nonzero(np.diff(index.document_starts())))
    if excess != itemsize * nonempty:
        return 0
    return nonempty


class IndexedDataset:
    """One .bin/.idx pair, memory-mapped and validated when opened.

    `len()` and `[i]` refer to sequences; `read` refers to documents.

    Args:
        prefix: the path without `.bin` and `.idx`.
        index: index to use instead of `.idx`, such as a repaired one.

    Attributes:
        prefix: the given prefix.
        index: index of `.bin`.
        dtype, lengths, pointers, document_index, num_documents, num_tokens: fields of `index`.
        tokens: read-only view of all of `.bin` in the stored dtype.
        sidecar: content of `<prefix>.json`; None if there is no such file.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the files are corrupt, do not match, or are of a kind that is not supported.
    """

    def __init__(self, prefix: str | os.PathLike, index: DatasetIndex | None = None):
        self.prefix = os.fspath(prefix)
        self._arguments = (self.prefix, index)
        self.index = index or read_index(self.prefix)
        self.dtype = self.index.dtype
        self.lengths = self.index.lengths
        self.pointers = self.index.pointers
        self.document_index = self.index.document_index
        self.num_documents = self.index.num_documents
        self.num_tokens = self.index.num_tokens
        self.tokens = self._map_tokens()
        self.sidecar = _read_sidecar(self.prefix)

    def _map_tokens(self) -> np.ndarray:
        """Map `.bin` into memory; its size must be what the index implies."""
        _require_file(self.prefix, ".bin")
        path = self.prefix + ".bin"
        size = os.path.getsize(path)
        expected = self.num_tokens * self.dtype.itemsize
        if uncounted := num_uncounted_tokens(self.index, size):
            raise ValueError(
                f"{path} has exactly one token per non-empty document ({uncounted}) more than "
                f"its index counts: it was written by a preprocessing that leaves the "
                f"end-of-document token out of the lengths, so that document i would start i "
                f"tokens early. Repair it with tools/inspect_dataset.py {self.prefix} "
                f"--repair OUT, or preprocess the text again with tools/preprocess_data.py"
            )
        if size != expected:
            raise ValueError(
                f"{path} has {size} bytes, but its index counts {self.num_tokens} tokens of "
                f"{self.dtype.itemsize} bytes, {expected} bytes: one of the two files is "
                f"truncated or belongs to another dataset. {_ADVICE}"
            )
        return map_file(path)[:size].view(self.dtype.newbyteorder("<"))

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> np.ndarray:
        """Return the tokens of one sequence, a read-only view in the stored dtype.

        Raises:
            IndexError: there is no such sequence.
        """
        if not 0 <= sequence < len(self):
            raise IndexError(
                f"sequence {sequence} of {self.prefix}: allowed 0 to {len(self) - 1}"
            )
        return self.tokens[self._token_offset(sequence) : self._token_offset(sequence + 1)]

    def __reduce__(self) -> tuple:
        # A worker process maps the files again instead of receiving their content.
        return (IndexedDataset, self._arguments)

    def document_lengths(self) -> np.ndarray:
        """Return int64 [documents]: tokens of each document, 0 for an empty one."""
        return np.diff(self.index.document_starts())

    def read(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return tokens [offset, offset + length) of a document, a read-only view.

        Args:
            length: None reads to the end of the document.

        Raises:
            IndexError: there is no such document.
            ValueError: the range reaches beyond the document.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(
                f"document {document} of {self.prefix}: allowed 0 to {self.num_documents - 1}"
            )
        start = self._token_offset(int(self.document_index[document]))
        size = self._token_offset(int(self.document_index[document + 1])) - start
        stop = size
        if length is not None:
            stop = offset + length
        if not 0 <= offset <= stop <= size:
            raise ValueError(
                f"tokens {offset} to {stop} of document {document} of {self.prefix}: "
                f"allowed 0 to {size}"
            )
        return self.tokens[start + offset : start + stop]

    def _token_offset(self, sequence: int) -> int:
        """Return the token offset of a sequence; `len(self)` stands for the end of the data."""
        if sequence < len(self):
            return int(self.pointers[sequence]) // self.dtype.itemsize
        return self.num_tokens


def dataset_prefix(path: str) -> str:
    """Return the prefix that `path` refers to: without `.bin` or `.idx` unless part of a name."""
    stem, suffix = os.path.splitext(path)
    if suffix in (".bin", ".idx") and not os.path.isfile(path + ".idx"):
        return stem
    return path


def dataset_identity(prefix: str) -> tuple[int, int] | str:
    """Return a value that is the same for all names of a dataset, such as links.

    It is the inode of `.bin` if that exists, else the absolute path.
    """
    try:
        stat = os.stat(prefix + ".bin")
    except OSError:
        return os.path.abspath(prefix)
    return stat.st_dev, stat.st_ino


def byte_pointers(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return int64 [N]: byte offsets of consecutive sequences of these lengths."""
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    return np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])


def _read_sidecar(prefix: str) -> dict[str, Any] | None:
    path = Path(prefix + ".json")
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(
            f"{path} is corrupt ({error}). Remove it, or preprocess the text again"
        ) from None
    return content


def _require_file(prefix: str, suffix: str) -> None:
    """Require a file of a pair; the error names similar prefixes, as one is easily mistyped."""
    if os.path.isfile(prefix + suffix):
        return
    folder = Path(prefix).parent
    name = Path(prefix).name.removesuffix(".bin").removesuffix(".idx")
    existing = []
    where = f"The folder {folder} does not exist; prefixes there"
    if folder.is_dir():
        existing = sorted(path.stem for path in folder.glob("*.idx"))
        where = f"Prefixes in {folder}"
    similar = [other for other in existing if other.startswith(name)]
    similar = similar or difflib.get_close_matches(name, existing) or existing
    found = ", ".join(str(folder / other) for other in similar[:5]) or "none"
    raise FileNotFoundError(
        f"{prefix}{suffix} does not exist. A dataset is named by its prefix, without .bin and "
        f".idx but with _text_document. {where}: {found}"
    )
