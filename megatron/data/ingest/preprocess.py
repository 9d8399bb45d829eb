"""Text files -> token shards: the work behind tools/preprocess_data.py and streaming training.

Everything is written to `<output prefix>.partial/` first. Now and then the work is committed: data made durable, then
`state.json` renamed into place, which says how far the inputs are done and how long the files are. A later run of the
same job cuts the files back to that and goes on: an interrupted run ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.schema import TokenizerConfig, require
from megatron.data.indexed.reader import dtype_for_vocab
from megatron.data.indexed.writer import PUBLISHED, IndexedWriter, is_resumable, publish
from megatron.data.ingest.encode import EncodeConfig, EncodedChunk, EncoderPool
from megatron.data.ingest.records import CHUNK_BYTES, Chunk, RejectedRecord, no_documents
from megatron.data.ingest.sources import open_sources
from megatron.io.atomic_write import errors_with_path, write_text
from megatron.io.staging_dir import StagingDir

LOGGER = logging.getLogger("megatron")
COMMIT_SECONDS = 10.0
SHOWN_REJECTIONS = 5
STATE, REJECTED = "state.json", "rejected.jsonl"
LAYOUT = 1  # of the work folder; part of a job's identity: raise it when a change would give other bytes


@dataclass(frozen=True)
class PreprocessConfig:
    """What to preprocess, and where to."""

    inputs: Sequence[str]
    """as `open_sources` takes them"""
    output_prefix: str
    recipe: EncodeConfig
    skip_errors: bool = False
    """records that cannot be used are written to `<output prefix>.rejected.jsonl` instead of ending the work"""
    max_documents: int = 0
    """0: all"""
    workers: int = 1
    """processes that encode; the result does not depend on it"""

    def __post_init__(self):
        require(self.workers >= 1, "--workers", self.workers, "1 or more")
        require(
            self.max_documents >= 0, "--max-documents", self.max_documents, "0 (all) or more"
        )
        require(
            os.path.basename(self.output_prefix) not in ("", ".", ".."),
            "--output-prefix",
            self.output_prefix,
            "a path whose last part begins the names of the files, such as data/corpus",
        )
        for key in self.recipe.keys:
            require(
                key and not {"/", "\0"} & {*key},
                "--json-keys",
                key,
                "keys without a slash, since they become part of file names",
            )


@dataclass
class OutputStats:
    """What became of one key of the input."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """of the texts in UTF-8"""


class PreprocessRun:
    """One job, from wherever an earlier run of it stopped. A context manager, which holds the output prefix.

    Iterating it does the work: every step is a chunk, already written; `finish` then publishes. Leaving it early keeps
    what was committed.

    Args:
        commit_seconds: time from one commit to the next; does not change what is written.
        chunk_bytes: text taken at once; changes it only if the fast encoder errs in a way that the comparisons, one of
            them in each chunk, find sooner or later.

    Attributes:
        skipped: records that could not be used.
        read: bytes of the inputs that are done.
        size: bytes of the inputs; 0 where that is not known.
        resumed: whether an earlier run is continued.
        published: whether that run was publishing already: then only `finish` is left to do.

    Raises:
        FileNotFoundError: an input is not there.
        ValueError: a record cannot be used (and is not to be skipped), there are no documents at all, or another
            process writes the same output.
        OSError: something cannot be read or written.
    """

    def __init__(
        self,
        job: PreprocessConfig,
        commit_seconds: float = COMMIT_SECONDS,
        chunk_bytes: int = CHUNK_BYTES,
    ):
        self.job, self._chunk_bytes = job, chunk_bytes
        self._commit_seconds, self._committed = commit_seconds, time.monotonic()
        self._sources = open_sources(job.inputs)
        self.size = sum(source.size for source in self._sources)
        with ExitStack() as stack:
            self._encoders = stack.enter_context(EncoderPool(job.recipe, job.workers))
            self._tokenizer = self._encoders.tokenizer
            self._refuse_own_outputs()
            self._folder = stack.enter_context(StagingDir(job.output_prefix))
            for prefix in (
                self._prefixes().values()
            ):  # others may get there from another output prefix, or by merging
                stack.enter_context(StagingDir(prefix))
            self._identity = self._describe()
            state = self._earlier_state()
            self.resumed = state is not None
            if state is None:
                self._folder.clear()
                state = {
                    "source": 0,
                    "position": 0,
                    "line": 0,
                    "skipped": 0,
                    "rejected": 0,
                    "read": 0,
                    "use_reference": False,
                    "published": False,
                    "writers": {},
                    "bytes": {},
                }
            self._restore(state, stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> PreprocessRun:
        return self

    def __exit__(self, *_: object) -> None:
        if not os.path.exists(self._folder.file(STATE)):
            self._folder.clear()
        self._stack.close()

    def __iter__(self) -> Iterator[EncodedChunk]:
        if self._at_end():
            return
        for encoded in self._encoders.map(self._chunks(), self.size - self.read):
            self._take(encoded)
            if time.monotonic() - self._committed >= self._commit_seconds:
                self.commit()
            yield encoded
            if self._at_end():
                return
        self._require_unchanged()
        self._source = len(self._sources)

    @property
    def documents(self) -> int:
        """Documents taken so far."""
        return next(iter(self._writers.values())).num_documents

    @property
    def tokens(self) -> int:
        """Tokens of all keys so far."""
        return sum(writer.num_tokens for writer in self._writers.values())

    def commit(self) -> None:
        """Let a later run continue from here."""
        self._require_unchanged()
        writers = {key: writer.commit() for key, writer in self._writers.items()}
        self._sync_rejected()
        self._save(
            {
                "source": self._source,
                "position": self._position,
                "line": self._line,
                "skipped": self.skipped,
                "rejected": self._rejected.tell(),
                "read": self.read,
                "published": False,
                "use_reference": self._encoders.use_reference,
                "writers": writers,
                "bytes": self._bytes,
            }
        )
        self._committed = time.monotonic()

    def finish(self) -> list[OutputStats]:
        """Publish every key's pair, and the rejected records if there are any."""
        if not self.documents:
            raise no_documents(self.job.inputs, self.skipped)
        totals = [
            OutputStats(
                writer.prefix, writer.num_documents, writer.num_tokens, self._bytes[key]
            )
            for key, writer in self._writers.items()
        ]
        if not self.published:
            self._require_unchanged()
            self._sync_rejected()
            writers = {
                key: {
                    "num_documents": w.num_documents,
                    "num_tokens": w.num_tokens,
                    "file": _file(w.prepare(self._sidecar(key)) + ".bin"),
                }
                for key, w in self._writers.items()
            }
            self._save(
                {
                    **self._state,
                    "published": True,
                    "skipped": self.skipped,
                    "read": self.read,
                    "rejected": self._rejected.tell(),
                    "writers": writers,
                    "bytes": self._bytes,
                }
            )
        for writer in self._writers.values():
            publish(writer.prefix, self._folder)
        self._publish_rejected()
        self._folder.clear()
        return totals

    def _describe(self) -> dict[str, Any]:
        """What makes two runs the same job."""
        recipe = self.job.recipe
        return {
            "layout": LAYOUT,
            "inputs": [source.identity() for source in self._sources],
            "tokenizer": [
                self._tokenizer.name,
                self._tokenizer.fingerprint,
                digest_of_files(recipe.tokenizer),
            ],
            "keys": list(recipe.keys),
            "append_eod": recipe.append_eod,
            "split_sentences": recipe.split_sentences,
            "max_documents": self.job.max_documents,
        }

    def _refuse_own_outputs(self) -> None:
        outputs = {
            os.path.realpath(f"{prefix}{suffix}")
            for prefix in self._prefixes().values()
            for suffix in PUBLISHED
        } | {os.path.realpath(self._rejected_name())}
        for source in self._sources:
            if os.path.realpath(source.path) in outputs:
                raise ValueError(
                    f"--input names {source.path}, which this run would write. Choose another "
                    f"--output-prefix, or name the inputs one by one"
                )

    def _require_unchanged(self) -> None:
        """The input being read must be what it was at the start."""
        for source in self._sources[self._source : self._source + 1]:
            path, *known = source.identity()[:3]
            if any(known) and _file(path)[2:] != known:
                raise ValueError(
                    f"{path} changed while it was read. Start again when nothing writes to it"
                )

    def _earlier_state(self) -> dict[str, Any] | None:
        """The committed state of an earlier run of this job, if its files are there."""
        path = self._folder.file(STATE)
        if not os.path.exists(path):
            return None
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            reasons = self._differences(state)
        except (ValueError, TypeError, KeyError):
            reasons = ["its state, which cannot be read"]
        if reasons:
            LOGGER.warning(
                "%s holds an unfinished run that differs in: %s. Starting again",
                self._folder.path,
                ", ".join(reasons),
            )
            return None
        LOGGER.info("continuing the unfinished run in %s", self._folder.path)
        return state

    def _differences(self, state: dict[str, Any]) -> list[str]:
        """Why a state cannot be continued; nothing when it can."""
        if state["job"]["layout"] != LAYOUT:
            return ["layout"]
        reasons = [
            name.replace("_", " ")
            for name, value in self._identity.items()
            if state["job"][name] != value
        ]
        if not all(source.resumable for source in self._sources):
            reasons.append("standard input, which cannot be read again")
        if state["skipped"] and not self.job.skip_errors:
            reasons.append("--on-error, and records were skipped")
        if not reasons and not self._are_there(state):
            reasons.append("files that were cut off or replaced")
        return reasons

    def _are_there(self, state: dict[str, Any]) -> bool:
        """Whether the files are still what the state says they are."""
        if state["published"]:
            return all(
                writer["file"]
                in (
                    _file(prefix + ".bin"),
                    _file(self._folder.file(f"{Path(prefix).name}.bin")),
                )
                for prefix, writer in zip(self._prefixes().values(), state["writers"].values())
            )
        rejected = self._folder.file(REJECTED)
        return (
            os.path.exists(rejected)
            and os.path.getsize(rejected) >= state["rejected"]
            and all(
                is_resumable(prefix, self._folder, state["writers"][key])
                for key, prefix in self._prefixes().items()
            )
        )

    def _restore(self, state: dict[str, Any], stack: ExitStack) -> None:
        self._state = state
        self._source, self._position, self._line = (
            state["source"],
            state["position"],
            state["line"],
        )
        self.skipped, self.read, self.published = (
            state["skipped"],
            state["read"],
            state["published"],
        )
        self._encoders.use_reference = state["use_reference"]
        self._bytes = dict(state["bytes"]) or dict.fromkeys(self.job.recipe.keys, 0)
        rejected = self._folder.file(REJECTED)
        if self.published:
            self._source = len(self._sources)
            self._rejected = stack.enter_context(open(os.devnull, "rb"))  # noqa: SIM115
            self._writers = {
                key: _Published(prefix, **state["writers"][key])
                for key, prefix in self._prefixes().items()
            }
            return
        dtype = dtype_for_vocab(self._tokenizer.vocab_size)
        self._writers = {
            key: IndexedWriter(prefix, dtype, self._folder, state["writers"].get(key))
            for key, prefix in self._prefixes().items()
        }
        for writer in self._writers.values():
            stack.callback(writer.discard)
        self._rejected = stack.enter_context(open(rejected, "ab"))  # noqa: SIM115
        self._rejected.truncate(state["rejected"])
        self._rejected.seek(0, os.SEEK_END)

    def _prefixes(self) -> dict[str, str]:
        kind = "sentence" if self.job.recipe.split_sentences else "document"
        return {key: f"{self.job.output_prefix}_{key}_{kind}" for key in self.job.recipe.keys}

    def _chunks(self) -> Iterator[Chunk]:
        position = self._position
        for source in self._sources[self._source :]:
            yield from source.chunks(self.job.recipe.keys, position, self._chunk_bytes)
            position = 0

    def _at_end(self) -> bool:
        enough = self.job.max_documents and self.documents >= self.job.max_documents
        return bool(enough) or self._source >= len(self._sources)

    def _move_to(self, chunk: Chunk, position: int) -> None:
        if chunk.source != self._source:
            self._require_unchanged()
            self._source, self._line = chunk.source, 0
        self._position = position

    def _take(self, encoded: EncodedChunk) -> None:
        """Write what came of one chunk."""
        self._move_to(encoded.chunk, encoded.chunk.start)
        room = (
            self.job.max_documents - self.documents
            if self.job.max_documents
            else encoded.documents
        )
        for rejected in encoded.rejected:
            if rejected.before < room or not self.job.max_documents:
                self._reject(encoded.chunk, rejected)
        for key, tokens in encoded.keys.items():
            tokens = tokens.first(room)
            self._writers[key].add_documents(tokens.ids, tokens.lengths, tokens.counts)
            self._bytes[key] += int(tokens.sizes.sum())
        self.read += encoded.chunk.read
        self._line += encoded.lines
        self._move_to(encoded.chunk, encoded.chunk.end)

    def _reject(self, chunk: Chunk, rejected: RejectedRecord) -> None:
        number = self._line + rejected.line
        if not self.job.skip_errors:
            raise chunk.refusal(rejected, number)
        self.skipped += 1
        if self.skipped <= SHOWN_REJECTIONS:
            LOGGER.warning("skipped %s: %s", chunk.place(number), rejected.reason)
        record = {
            "file": chunk.path,
            chunk.unit: number,
            "reason": rejected.reason,
            "record": rejected.raw.decode(errors="backslashreplace"),
        }
        with errors_with_path(self._rejected.name):
            self._rejected.write(
                json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
            )

    def _sidecar(self, key: str) -> dict[str, Any]:
        recipe, tokenizer = self.job.recipe, self._tokenizer
        return {
            "tool": "preprocess_data",
            "tokenizer": tokenizer.name,
            "vocab_hash": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "append_eod": recipe.append_eod,
            "split_sentences": recipe.split_sentences,
            "skipped": self.skipped,
            "sources": [source.identity()[0] for source in self._sources],
            "key": key,
        }

    def _publish_rejected(self) -> None:
        self._rejected.close()
        final, here = self._rejected_name(), self._folder.file(REJECTED)
        if self.skipped:
            with suppress(FileNotFoundError):  # an interrupted run has published it already
                os.replace(here, final)
        else:
            with suppress(FileNotFoundError):  # of an earlier run on this prefix
                os.remove(final)

    def _rejected_name(self) -> str:
        return f"{self.job.output_prefix}.rejected.jsonl"

    def _sync_rejected(self) -> None:
        with errors_with_path(self._rejected.name):
            self._rejected.flush()
            os.fsync(self._rejected.fileno())

    def _save(self, state: dict[str, Any]) -> None:
        self._state = state
        write_text(self._folder.file(STATE), json.dumps({"job": self._identity, **state}))


@dataclass(frozen=True)
class _Published:
    """In place of a writer whose files have been written by an earlier run."""

    prefix: str
    num_documents: int
    num_tokens: int
    file: list
    """its .bin, as `_file` names it"""


def _file(path: str) -> list[int]:
    """What tells a file from others and from its earlier self: device, inode, bytes, time of change in ns; empty when
    it is not there."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return []
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]


def digest_of_files(tokenizer: TokenizerConfig) -> str:
    """Of the tokenizer's files: its fingerprint is that of the vocabulary, and leaves out how text is split."""
    folder = Path(tokenizer.tokenizer_model)
    files = [
        tokenizer.vocab_file,
        tokenizer.merge_file,
        folder,
        folder / "tokenizer.json",
        folder / "tokenizer_config.json",
    ]
    return hashlib.sha256(
        b"".join(
            hashlib.sha256(Path(file).read_bytes()).digest()
            for file in files
            if os.path.isfile(file)
        )
    ).hexdigest()


def preprocess(job: PreprocessConfig, **options) -> list[OutputStats]:
    """Do a job from beginning, or where an earlier run stopped, to end. Takes and raises what `Preprocessing` does."""
    with PreprocessRun(job, **options) as work:
        for _ in work:
            pass
        return work.finish()
