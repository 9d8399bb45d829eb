"""Writing of token shards (see `indexed.py` for the format): in a work folder first, renamed at the end, `.idx` last.

What is kept per document goes to disk as it comes, so that memory does not grow with the data.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron import __version__
from megatron.data.indexed.reader import CODES, HEADER, MAGIC, VERSION, IndexedDataset
from megatron.io.atomic_write import errors_with_path, fsync_directory
from megatron.io.staging_dir import StagingDir

LONGEST_SEQUENCE = np.iinfo(np.int32).max  # lengths are i32
COPY_BYTES = 256 << 20  # copied at once, between two calls of a progress bar
BLOCK = 1 << 20  # entries of the index computed at once
PARTS = (
    ".bin",
    ".lengths",
    ".counts",
)  # tokens; i32 tokens of each sequence; i32 sequences of each document
PUBLISHED = (".bin", ".json", ".idx")


class IndexedWriter:
    """Writes a .bin/.idx pair and its sidecar in `<prefix>.partial/` and publishes them whole.

    A context manager: leaving it normally publishes (as `finish` does), leaving it by an exception removes everything.

    Args:
        prefix: the path without `.bin` and `.idx`; its folder is created, existing files are replaced at the end.
        dtype: integer dtype of the stored tokens, see `dtype_for_vocab`.
        folder: a work folder that somebody else holds; then it is theirs to clear, and files of this writer stay in
            it until `publish`. None: the writer's own.
        resume: what `commit` returned; the files in `folder` are cut back to it and continued.

    Raises:
        ValueError: the dtype is not an integer one of the format, or another process writes this prefix.
        OSError: a file cannot be written, here and in every method that writes; the message names it.
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        dtype: np.dtype | type,
        folder: StagingDir | None = None,
        resume: dict[str, int] | None = None,
    ):
        self.prefix, self.dtype = os.fspath(prefix), np.dtype(dtype)
        if self.dtype not in CODES or self.dtype.kind == "f":
            allowed = ", ".join(d.name for d in CODES if d.kind != "f")
            raise ValueError(f"dtype of {self.prefix} is {self.dtype}; allowed: {allowed}")
        self._folder, self._owned = folder or StagingDir(self.prefix), folder is None
        if self._owned:
            self._folder.clear()
        at = resume or {"documents": 0, "tokens": 0}
        self.num_documents, self.num_tokens = at["documents"], at["tokens"]
        mode = "r+b" if resume else "wb"
        self._files = {part: open(self._temp(part), mode) for part in PARTS}  # noqa: SIM115 - closed by _close
        for part, file in self._files.items():
            file.truncate(at.get(part, 0))
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
        """Append one document of one sequence (of none when it is empty). Raises like `add_documents`."""
        ids = np.asarray(ids if len(ids) else np.empty(0, self.dtype))
        self.add_documents(ids, np.array([len(ids)]))

    def add_documents(
        self, flat_ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None
    ) -> None:
        """Append documents given as one array.

        Args:
            flat_ids: integers [sum of lengths], one sequence after the other.
            lengths: tokens of each sequence; sequences of length 0 are not written.
            counts: sequences of each document; None: every sequence is a document.

        Raises:
            ValueError: an id does not fit the dtype, a length is out of range, or the arrays do not fit each other.
        """
        flat_ids, lengths = np.asarray(flat_ids), np.asarray(lengths, np.int64)
        counts = (
            np.ones(len(lengths), np.int64) if counts is None else np.asarray(counts, np.int64)
        )
        for length in (lengths.min(initial=0), lengths.max(initial=0)):
            if not 0 <= length <= LONGEST_SEQUENCE:
                raise ValueError(
                    f"a document for {self.prefix} has {length} tokens; allowed: 0 to {LONGEST_SEQUENCE}. "
                    f"Split long documents"
                )
        if (
            flat_ids.ndim != 1
            or flat_ids.dtype.kind not in "iu"
            or lengths.sum() != len(flat_ids)
        ):
            raise ValueError(
                f"documents for {self.prefix} are {flat_ids.dtype} of shape {flat_ids.shape} with lengths "
                f"that add up to {lengths.sum()}; allowed: one row of integers of that length"
            )
        if counts.sum() != len(lengths) or counts.min(initial=0) < 0:
            raise ValueError(
                f"documents for {self.prefix} have {counts.sum()} sequences and {len(lengths)} lengths; "
                f"allowed: one length per sequence"
            )
        for token in (flat_ids.min(initial=0), flat_ids.max(initial=0)):
            if not 0 <= token <= np.iinfo(self.dtype).max:
                raise ValueError(
                    f"a token id for {self.prefix} is {token}; allowed in {self.dtype}: 0 to "
                    f"{np.iinfo(self.dtype).max}. Give the writer the dtype of the whole vocabulary"
                )
        self._write(".bin", np.ascontiguousarray(flat_ids, self.dtype.newbyteorder("<")))
        some = lengths > 0
        if not some.all():
            before = np.concatenate([np.zeros(1, np.int64), np.cumsum(some)])
            counts = np.diff(before[np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])])
        self._count(lengths[some], counts)

    def add_dataset(
        self, dataset: IndexedDataset, progress: Callable[[int], object] = lambda copied: None
    ) -> None:
        """Append all documents of another dataset, copying its .bin file to file.

        Args:
            progress: called with the number of bytes just copied.
        Raises:
            ValueError: it has another dtype.
        """
        if dataset.dtype != self.dtype:
            raise ValueError(
                f"{dataset.prefix} holds {dataset.dtype}, {self.prefix} {self.dtype}; allowed: the same "
                f"dtype. Preprocess one of them again"
            )
        target = self._files[".bin"]
        with (
            errors_with_path(self._temp(".bin")),
            open(dataset.prefix + ".bin", "rb") as source,
        ):
            target.flush()
            _copy(source, target, self.num_tokens * self.dtype.itemsize, progress)
        self._count(dataset.lengths, np.diff(dataset.document_index))

    def commit(self) -> dict[str, int]:
        """Make everything added so far durable. Returns where the writing stands, for `resume`."""
        for part, file in self._files.items():
            with errors_with_path(self._temp(part)):
                file.flush()
                os.fsync(file.fileno())
        sizes = {part: file.tell() for part, file in self._files.items()}
        return {**sizes, "documents": self.num_documents, "tokens": self.num_tokens}

    def finish(self, sidecar: dict[str, Any] | None = None) -> None:
        """Publish, after `prepare` if that was not called. The sidecar has the given entries and the counts."""
        if self._files:
            self.prepare(sidecar)
        publish(self.prefix, self._folder)
        if self._owned:
            self._folder.clear()
            self._folder.release()

    def prepare(self, sidecar: dict[str, Any] | None = None) -> str:
        """Write all that `publish` will rename; nothing can be added any more.

        Returns:
            The prefix by which it can be read, to check it before it is published.
        """
        sizes = self.commit()
        self._close()
        if sizes[".bin"] != self.num_tokens * self.dtype.itemsize:
            raise ValueError(
                f"{self._temp('.bin')} has {sizes['.bin']} bytes, {self.num_tokens} tokens take "
                f"{self.num_tokens * self.dtype.itemsize}: something else wrote to it, or to a file that "
                f"was copied. Start again when nothing does"
            )
        sequences = sizes[".lengths"] // 4
        record = {
            **(sidecar or {}),
            "dtype": self.dtype.name,
            "documents": self.num_documents,
            "sequences": sequences,
            "tokens": self.num_tokens,
            "version": __version__,
        }
        _write(self._temp(".json"), [json.dumps(record, indent=1).encode() + b"\n"])
        header = HEADER.pack(
            MAGIC, VERSION, CODES[self.dtype], sequences, self.num_documents + 1
        )
        lengths, counts = self._temp(".lengths"), self._temp(".counts")
        _write(
            self._temp(".idx"),
            chain(
                [header],
                (block.data for block in _blocks(lengths)),
                _running_sums(lengths, self.dtype.itemsize),
                _running_sums(counts),
                [np.array(sequences, "<i8").data],
            ),
        )
        return self._temp("")

    def discard(self) -> None:
        """Stop writing. Files in the writer's own folder are removed, those in somebody else's are left to them."""
        self._close()
        if self._owned:
            self._folder.clear()
            self._folder.release()

    def _close(self) -> None:
        for file in self._files.values():
            with suppress(
                OSError
            ):  # of a flush that failed before: the error that matters is on its way
                file.close()
        self._files = {}

    def _count(self, lengths: np.ndarray, counts: np.ndarray) -> None:
        self._write(".lengths", np.ascontiguousarray(lengths, "<i4"))
        self._write(".counts", np.ascontiguousarray(counts, "<i4"))
        self.num_documents += len(counts)
        self.num_tokens += int(lengths.sum(dtype=np.int64))

    def _write(self, part: str, data: np.ndarray) -> None:
        with errors_with_path(self._temp(part)):
            self._files[part].write(data.data)

    def _temp(self, suffix: str) -> str:
        return self._folder.file(os.path.basename(self.prefix) + suffix)


def require_space(prefix: str, datasets: Sequence[IndexedDataset]) -> None:
    """Raise ValueError unless the datasets fit, joined to one, on the disk of a prefix."""
    # Beside .bin and .idx lie, at the end, 4 bytes per sequence and per document that the writer makes the index from.
    needed = sum(
        d.tokens.nbytes + HEADER.size + (12 + 4) * len(d) + (8 + 4) * len(d.document_index)
        for d in datasets
    )
    folder = next(parent for parent in Path(os.path.abspath(prefix)).parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{prefix} needs {needed / 1e9:.3f} GB, the disk of {folder} has {free / 1e9:.3f} GB left. "
            f"Make room there, or choose another disk"
        )


def is_resumable(prefix: str, folder: StagingDir, state: dict[str, int]) -> bool:
    """Whether the files of a writer hold at least what `commit` said."""
    try:
        return all(
            os.path.getsize(folder.file(os.path.basename(prefix) + part)) >= state[part]
            for part in PARTS
        )
    except FileNotFoundError:
        return False


def publish(prefix: str, folder: StagingDir) -> None:
    """Rename what `IndexedWriter.prepare` wrote; calling it again completes a call that was interrupted.

    `.idx` comes last and an older `.idx` goes first, so that no moment pairs it with other tokens.
    """
    temp, final = folder.file(os.path.basename(prefix)), prefix
    if os.path.exists(temp + ".bin"):
        with suppress(FileNotFoundError):
            os.remove(final + ".idx")
    for suffix in PUBLISHED:
        if os.path.exists(temp + suffix):
            os.replace(temp + suffix, final + suffix)
    fsync_directory(Path(prefix).parent)


def _copy(source, target, at: int, progress: Callable[[int], object]) -> None:
    """Append a whole file at byte `at` of another: inside the kernel where the filesystem can."""
    left = os.fstat(source.fileno()).st_size
    with suppress(
        OSError, AttributeError
    ):  # across filesystems, or not Linux: the rest is copied below
        while left:
            copied = os.copy_file_range(
                source.fileno(), target.fileno(), min(left, COPY_BYTES), None, at
            )
            if copied == 0:
                break
            left, at = left - copied, at + copied
            progress(copied)
    source.seek(-left, os.SEEK_END)
    target.seek(at)
    shutil.copyfileobj(source, target, 1 << 20)
    progress(left)


def _blocks(path: str) -> Iterator[np.ndarray]:
    """A file of i32, some at a time."""
    with open(path, "rb") as file:
        while data := file.read(4 * BLOCK):
            yield np.frombuffer(data, "<i4")


def _running_sums(path: str, scale: int = 1) -> Iterator[memoryview]:
    """i64 bytes: the sum of all entries before each entry of a file of i32, times `scale`."""
    total = 0
    for block in _blocks(path):
        ends = np.cumsum(block, dtype=np.int64)
        yield ((total + ends - block) * scale).astype("<i8").data
        total += int(ends[-1])


def _write(path: str, parts) -> None:
    with errors_with_path(path), open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
