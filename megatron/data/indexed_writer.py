"""Writing of token shards (see `indexed.py` for the format): temporary names, renamed at the end, `.idx` last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron import __version__
from megatron.data.indexed import CODES, HEADER, MAGIC, VERSION, IndexedDataset, byte_pointers

LONGEST_SEQUENCE = np.iinfo(np.int32).max  # lengths are i32


class IndexedWriter:
    """Writes a .bin/.idx pair and its sidecar under temporary names and publishes them whole.

    A context manager: leaving it normally publishes (as `finish` does), leaving it by an exception removes everything.

    Args:
        prefix: the path without `.bin` and `.idx`; its folder is created, existing files are replaced at the end.
        dtype: integer dtype of the stored tokens, see `dtype_for_vocab`.

    Raises:
        ValueError: the dtype is not an integer one of the format.
    """

    def __init__(self, prefix: str | os.PathLike, dtype: np.dtype | type):
        self.prefix, self.dtype = os.fspath(prefix), np.dtype(dtype)
        if self.dtype not in CODES or self.dtype.kind == "f":
            allowed = ", ".join(d.name for d in CODES if d.kind != "f")
            raise ValueError(f"dtype of {self.prefix} is {self.dtype}; allowed: {allowed}")
        self.num_documents = self.num_tokens = 0
        self._lengths: list[np.ndarray] = []  # int32, of each sequence
        self._sequences: list[np.ndarray] = []  # sequences of each document
        self._published = False
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._temp(".bin"), "wb")  # noqa: SIM115 - closed by finish or discard

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self._published:
                self.finish()
        finally:
            self.discard()

    def add_document(self, ids: np.ndarray | list[int]) -> None:
        """Append one document of one sequence (of none when it is empty). Raises like `add_documents`."""
        ids = np.asarray(ids if len(ids) else np.empty(0, self.dtype))
        self.add_documents(ids, np.array([len(ids)]))

    def add_documents(self, flat_ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents given as one array: integers [sum of lengths] and their lengths [documents].

        Raises:
            ValueError: an id does not fit the dtype, a length is out of range, or the two do not fit each other.
        """
        flat_ids, lengths = np.asarray(flat_ids), np.asarray(lengths, np.int64)
        for length in (lengths.min(initial=0), lengths.max(initial=0)):
            if not 0 <= length <= LONGEST_SEQUENCE:
                raise ValueError(f"a document for {self.prefix} has {length} tokens; allowed: 0 to {LONGEST_SEQUENCE}. "
                                 f"Split long documents")
        if flat_ids.ndim != 1 or flat_ids.dtype.kind not in "iu" or lengths.sum() != len(flat_ids):
            raise ValueError(f"documents for {self.prefix} are {flat_ids.dtype} of shape {flat_ids.shape} with lengths "
                             f"that add up to {lengths.sum()}; allowed: one row of integers of that length")
        for token in (flat_ids.min(initial=0), flat_ids.max(initial=0)):
            if not 0 <= token <= np.iinfo(self.dtype).max:
                raise ValueError(f"a token id for {self.prefix} is {token}; allowed in {self.dtype}: 0 to "
                                 f"{np.iinfo(self.dtype).max}. Give the writer the dtype of the whole vocabulary")
        self._bin.write(np.ascontiguousarray(flat_ids, self.dtype.newbyteorder("<")).data)
        self._count(lengths[lengths > 0].astype(np.int32), (lengths > 0).astype(np.int64))

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of another dataset, copying its .bin file to file.

        Raises:
            ValueError: it has another dtype.
        """
        if dataset.dtype != self.dtype:
            raise ValueError(f"{dataset.prefix} holds {dataset.dtype}, {self.prefix} {self.dtype}; allowed: the same "
                             f"dtype. Preprocess one of them again")
        self._bin.flush()
        with open(dataset.prefix + ".bin", "rb") as source:
            _copy(source, self._bin, self.num_tokens * self.dtype.itemsize)
        self._bin.seek(0, os.SEEK_END)
        self._count(np.array(dataset.lengths), np.diff(dataset.document_index))

    def finish(self, sidecar: dict[str, Any] | None = None) -> None:
        """Publish: rename `.bin`, then `.json` (the given entries and the counts), and `.idx` last.

        An older `.idx` goes first, so that no moment pairs it with new tokens.
        """
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        bounds = np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._sequences]))
        header = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(bounds))
        parts = (lengths.astype("<i4"), byte_pointers(lengths, self.dtype).astype("<i8"), bounds.astype("<i8"))
        record = {**(sidecar or {}), "dtype": self.dtype.name, "documents": self.num_documents,
                  "sequences": len(lengths), "tokens": self.num_tokens, "version": __version__}
        _sync_and_close(self._bin)
        _write(self._temp(".json"), lambda f: f.write(json.dumps(record, indent=1).encode() + b"\n"))
        _write(self._temp(".idx"), lambda f: f.writelines([header, *(part.data for part in parts)]))
        with suppress(FileNotFoundError):
            os.remove(self.prefix + ".idx")
        for suffix in (".bin", ".json", ".idx"):
            os.replace(self._temp(suffix), self.prefix + suffix)
        self._published = True
        _sync_folder(Path(self.prefix).parent)

    def discard(self) -> None:
        """Remove what is not published. Does nothing after `finish`."""
        self._bin.close()
        for suffix in (".bin", ".json", ".idx"):
            with suppress(FileNotFoundError):
                os.remove(self._temp(suffix))

    def _count(self, lengths: np.ndarray, sequences: np.ndarray) -> None:
        self._lengths.append(lengths)
        self._sequences.append(sequences)
        self.num_documents += len(sequences)
        self.num_tokens += int(lengths.sum(dtype=np.int64))

    def _temp(self, suffix: str) -> str:
        folder, name = os.path.split(self.prefix)
        return os.path.join(folder, f".{name}{suffix}.{os.getpid()}.tmp")


def _copy(source, target, at: int) -> None:
    """Append a whole file at byte `at` of another: inside the kernel where the filesystem can."""
    left = os.fstat(source.fileno()).st_size
    with suppress(OSError, AttributeError):  # across filesystems, or not Linux: the rest is copied below
        while left:
            copied = os.copy_file_range(source.fileno(), target.fileno(), left, None, at)
            if copied == 0:
                break
            left, at = left - copied, at + copied
    source.seek(-left, os.SEEK_END)
    target.seek(at)
    shutil.copyfileobj(source, target, 1 << 20)


def _write(path: str, write: Callable[[Any], object]) -> None:
    with open(path, "wb") as file:
        write(file)
        _sync_and_close(file)


def _sync_and_close(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
