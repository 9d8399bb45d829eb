"""Writer of token files, whose format `reader.py` describes.

Files are staged in a folder and renamed at the end, `.idx` last. Sequence lengths and counts go
to disk as they come, so that memory does not grow with the data.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, BinaryIO

import numpy as np

from megatron import __version__
from megatron.data.indexed.reader import (
    DTYPE_CODES,
    INDEX_HEADER,
    INDEX_MAGIC,
    INDEX_VERSION,
    IndexedDataset,
)
from megatron.io.atomic_write import commit_files, errors_with_path, flush_and_fsync
from megatron.io.disk_space import require_disk_space
from megatron.io.progress import ProgressCallback, no_progress
from megatron.io.staging_dir import StagingDir

_LONGEST_SEQUENCE = np.iinfo(np.int32).max  # lengths are stored as i32
_COPY_BYTES = 256 << 20  # bytes copied between two progress reports
_BLOCK_ENTRIES = 1 << 20  # index entries computed per step
# Staged files: tokens; i32 tokens of each sequence; i32 sequences of each document.
_STAGED_SUFFIXES = (".bin", ".lengths", ".counts")
PUBLISHED = (".bin", ".json", ".idx")
"""Suffixes of the published files, in the order of renaming"""


class IndexedWriter:
    """Writes a .bin/.idx pair and its sidecar in `<prefix>.partial/` and publishes them complete.

    A context manager: a normal exit publishes the pair (see `finish`), an exception discards it.

    Args:
        prefix: the path without `.bin` and `.idx`. Its folder is created; existing files are
            replaced when the pair is published.
        dtype: integer dtype of the stored tokens, see `dtype_for_vocab`.
        folder: staging directory held by the caller, who also clears it; files of this writer
            stay there until `publish`. None: the writer creates and clears its own.
        resume: a state returned by `commit`. The files in `folder` are truncated to it, and
            writing continues from there.

    Raises:
        ValueError: the dtype is not an integer dtype of the format, or another process is
            writing this prefix.
        OSError: a file cannot be written (here or in any method that writes); the message
            names the file.
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        dtype: np.dtype | type,
        folder: StagingDir | None = None,
        resume: dict[str, int] | None = None,
    ):
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in DTYPE_CODES or self.dtype.kind == "f":
            allowed = ", ".join(d.name for d in DTYPE_CODES if d.kind != "f")
            raise ValueError(f"dtype of {self.prefix} is {self.dtype}; allowed: {allowed}")
        self._owns_folder = folder is None
        self._folder = folder or StagingDir(self.prefix)
        if self._owns_folder:
            self._folder.clear()
        state = resume or {"documents": 0, "tokens": 0}
        self.num_documents = state["documents"]
        self.num_tokens = state["tokens"]
        self._files = {}
        for suffix in _STAGED_SUFFIXES:
            mode = "r+b" if resume else "wb"
            file = open(self._staged(suffix), mode)  # noqa: SIM115 - closed by _close
            self._files[suffix] = file
        for suffix, file in self._files.items():
            file.truncate(state.get(suffix, 0))
            file.seek(0, os.SEEK_END)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._files:
                self.finish()
        finally:
            self.discard()

    def add_document(self, ids: np.ndarray | list[int]) -> None:
        """Append one document of one sequence, or of none if it is empty.

        Raises:
            ValueError: see `add_documents`.
        """
        if len(ids) == 0:
            ids = np.empty(0, self.dtype)
        self.add_documents(np.asarray(ids), np.array([len(ids)]))

    def add_documents(
        self, flat_ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None
    ) -> None:
        """Append several documents given as one array.

        Args:
            flat_ids: integers [sum of lengths]: the tokens of consecutive sequences.
            lengths: tokens of each sequence; sequences of length 0 are not written.
            counts: sequences of each document; None: every sequence is a document.

        Raises:
            ValueError: an id does not fit the dtype, a length is out of range, or the arrays
                do not match.
        """
        flat_ids = np.asarray(flat_ids)
        lengths = np.asarray(lengths, np.int64)
        if counts is None:
            counts = np.ones(len(lengths), np.int64)
        counts = np.asarray(counts, np.int64)
        self._check_lengths(flat_ids, lengths, counts)
        self._check_ids(flat_ids)
        self._write(".bin", np.ascontiguousarray(flat_ids, self.dtype.newbyteorder("<")))
        nonempty = lengths > 0
        if not nonempty.all():
            counts = _counts_of_nonempty(nonempty, counts)
        self._write_counts(lengths[nonempty], counts)

    def _check_lengths(
        self, flat_ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray
    ) -> None:
        for length in (lengths.min(initial=0), lengths.max(initial=0)):
            if not 0 <= length <= _LONGEST_SEQUENCE:
                raise ValueError(
                    f"a document for {self.prefix} has {length} tokens; allowed: 0 to "
                    f"{_LONGEST_SEQUENCE}. Split long documents"
                )
        is_flat = flat_ids.ndim == 1 and flat_ids.dtype.kind in "iu"
        if not is_flat or lengths.sum() != len(flat_ids):
            raise ValueError(
                f"documents for {self.prefix} are {flat_ids.dtype} of shape {flat_ids.shape} "
                f"with lengths that add up to {lengths.sum()}; allowed: a one-dimensional "
                f"integer array of that length"
            )
        if counts.sum() != len(lengths) or counts.min(initial=0) < 0:
            raise ValueError(
                f"documents for {self.prefix} have {counts.sum()} sequences and {len(lengths)} "
                f"lengths; allowed: one length per sequence"
            )

    def _check_ids(self, flat_ids: np.ndarray) -> None:
        largest = np.iinfo(self.dtype).max
        for token in (flat_ids.min(initial=0), flat_ids.max(initial=0)):
            if not 0 <= token <= largest:
                raise ValueError(
                    f"a token id for {self.prefix} is {token}; allowed in {self.dtype}: 0 to "
                    f"{largest}. Choose the dtype by the size of the full vocabulary"
                )

    def add_dataset(
        self, dataset: IndexedDataset, progress: ProgressCallback = no_progress
    ) -> None:
        """Append all documents of another dataset by copying its `.bin` file.

        Args:
            progress: called with the number of bytes just copied.

        Raises:
            ValueError: the dataset has another dtype.
        """
        if dataset.dtype != self.dtype:
            raise ValueError(
                f"{dataset.prefix} holds {dataset.dtype}, {self.prefix} {self.dtype}; allowed: "
                f"the same dtype. Preprocess one of them again"
            )
        target = self._files[".bin"]
        with (
            errors_with_path(self._staged(".bin")),
            open(dataset.prefix + ".bin", "rb") as source,
        ):
            target.flush()
            _append_file(source, target, self.num_tokens * self.dtype.itemsize, progress)
        self._write_counts(dataset.lengths, np.diff(dataset.document_index))

    def commit(self) -> dict[str, int]:
        """Make everything added so far durable.

        Returns:
            The state to pass as `resume`.
        """
        for suffix, file in self._files.items():
            with errors_with_path(self._staged(suffix)):
                flush_and_fsync(file)
        sizes = {suffix: file.tell() for suffix, file in self._files.items()}
        return {**sizes, "documents": self.num_documents, "tokens": self.num_tokens}

    def finish(self, sidecar: dict[str, Any] | None = None) -> None:
        """Publish the pair, calling `prepare` first unless that was done.

        Args:
            sidecar: entries of the sidecar in addition to the counts.
        """
        if self._files:
            self.prepare(sidecar)
        publish(self.prefix, self._folder)
        if self._owns_folder:
            self._folder.clear()
            self._folder.release()

    def prepare(self, sidecar: dict[str, Any] | None = None) -> str:
        """Write all files that `publish` renames; nothing can be added afterwards.

        Returns:
            The prefix of the staged pair, which can be read back before it is published.
        """
        sizes = self.commit()
        self._close()
        expected = self.num_tokens * self.dtype.itemsize
        if sizes[".bin"] != expected:
            raise ValueError(
                f"{self._staged('.bin')} has {sizes['.bin']} bytes, {self.num_tokens} tokens "
                f"take {expected}: another program wrote to it, or to a file that was copied. "
                f"Start again when no other program writes there"
            )
        sequences = sizes[".lengths"] // 4
        self._write_sidecar(sequences, sidecar or {})
        self._write_index(sequences)
        return self._staged("")

    def _write_sidecar(self, sequences: int, entries: dict[str, Any]) -> None:
        record = {
            **entries,
            "dtype": self.dtype.name,
            "documents": self.num_documents,
            "sequences": sequences,
            "tokens": self.num_tokens,
            "version": __version__,
        }
        _write_durably(self._staged(".json"), [json.dumps(record, indent=1).encode() + b"\n"])

    def _write_index(self, sequences: int) -> None:
        header = INDEX_HEADER.pack(
            INDEX_MAGIC,
            INDEX_VERSION,
            DTYPE_CODES[self.dtype],
            sequences,
            self.num_documents + 1,
        )
        lengths = self._staged(".lengths")
        pointers = _exclusive_sums(lengths, self.dtype.itemsize)
        document_index = _exclusive_sums(self._staged(".counts"))
        end = np.array(sequences, "<i8").data
        parts = chain(
            [header],
            (block.data for block in _read_i32(lengths)),
            pointers,
            document_index,
            [end],
        )
        _write_durably(self._staged(".idx"), parts)

    def discard(self) -> None:
        """Stop writing. Files in the writer's own staging directory are removed."""
        self._close()
        if self._owns_folder:
            self._folder.clear()
            self._folder.release()

    def _close(self) -> None:
        for file in self._files.values():
            # A flush that failed before fails again here; the first error is being raised.
            with suppress(OSError):
                file.close()
        self._files = {}

    def _write_counts(self, lengths: np.ndarray, counts: np.ndarray) -> None:
        self._write(".lengths", np.ascontiguousarray(lengths, "<i4"))
        self._write(".counts", np.ascontiguousarray(counts, "<i4"))
        self.num_documents += len(counts)
        self.num_tokens += int(lengths.sum(dtype=np.int64))

    def _write(self, suffix: str, data: np.ndarray) -> None:
        with errors_with_path(self._staged(suffix)):
            self._files[suffix].write(data.data)

    def _staged(self, suffix: str) -> str:
        return self._folder.file(os.path.basename(self.prefix) + suffix)


def _counts_of_nonempty(nonempty: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the number of non-empty sequences of each document.

    Args:
        nonempty: bool [sequences].
        counts: sequences of each document, empty ones included.
    """
    zero = np.zeros(1, np.int64)
    nonempty_before = np.concatenate([zero, np.cumsum(nonempty)])
    document_index = np.concatenate([zero, np.cumsum(counts)])
    return np.diff(nonempty_before[document_index])


def require_merge_space(prefix: str, datasets: Iterable[IndexedDataset]) -> None:
    """Require disk space at `prefix` for the concatenation of the datasets.

    Raises:
        OSError: there is not enough.
    """
    require_disk_space(prefix, sum(map(_bytes_to_write, datasets)))


def _bytes_to_write(dataset: IndexedDataset) -> int:
    """Return the disk space that writing a copy of a dataset takes at its peak."""
    # The index takes 12 bytes per sequence and 8 per document boundary. The staged .lengths
    # and .counts, from which it is written, take another 4 bytes each.
    index = INDEX_HEADER.size + 12 * len(dataset) + 8 * len(dataset.document_index)
    staged = 4 * len(dataset) + 4 * len(dataset.document_index)
    return dataset.tokens.nbytes + index + staged


def is_resumable(prefix: str, folder: StagingDir, state: dict[str, int]) -> bool:
    """Return whether the staged files hold at least what `commit` returned as `state`."""
    name = os.path.basename(prefix)
    try:
        return all(
            os.path.getsize(folder.file(name + suffix)) >= state[suffix]
            for suffix in _STAGED_SUFFIXES
        )
    except FileNotFoundError:
        return False


def publish(prefix: str, folder: StagingDir) -> None:
    """Rename the files written by `IndexedWriter.prepare` to their final names.

    `.idx` is renamed last, and an older `.idx` is removed first, so that no index is ever
    paired with other tokens. Calling this again completes an interrupted call.
    """
    staged = folder.file(os.path.basename(prefix))
    if os.path.exists(staged + ".bin"):
        with suppress(FileNotFoundError):
            os.remove(prefix + ".idx")
    suffixes = [suffix for suffix in PUBLISHED if os.path.exists(staged + suffix)]
    commit_files((staged + suffix, prefix + suffix) for suffix in suffixes)


def _append_file(
    source: BinaryIO, target: BinaryIO, offset: int, progress: ProgressCallback
) -> None:
    """Copy a file to byte `offset` of another, inside the kernel where that is possible."""
    left = os.fstat(source.fileno()).st_size
    # Fails across some filesystems and is Linux only: the rest is then copied below.
    with suppress(OSError, AttributeError):
        while left:
            copied = os.copy_file_range(
                source.fileno(), target.fileno(), min(left, _COPY_BYTES), None, offset
            )
            if copied == 0:
                break
            left -= copied
            offset += copied
            progress(copied)
    source.seek(-left, os.SEEK_END)
    target.seek(offset)
    shutil.copyfileobj(source, target, 1 << 20)
    progress(left)


def _read_i32(path: str) -> Iterator[np.ndarray]:
    """Yield the entries of a file of i32 in blocks."""
    with open(path, "rb") as file:
        while data := file.read(4 * _BLOCK_ENTRIES):
            yield np.frombuffer(data, "<i4")


def _exclusive_sums(path: str, scale: int = 1) -> Iterator[memoryview]:
    """Yield, as i64, `scale` times the sum of the entries before each entry of an i32 file."""
    total = 0
    for block in _read_i32(path):
        ends = np.cumsum(block, dtype=np.int64)
        yield ((total + ends - block) * scale).astype("<i8").data
        total += int(ends[-1])


def _write_durably(path: str, parts: Iterable[bytes | memoryview]) -> None:
    with errors_with_path(path), open(path, "wb") as file:
        for part in parts:
            file.write(part)
        flush_and_fsync(file)
