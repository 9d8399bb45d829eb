"""Text files -> token shards: the work behind tools/preprocess_data.py and streaming training.

Everything is written to `<output prefix>.partial/` first. Now and then the work is committed: data made durable, then
`state.json` renamed into place, which says how far the inputs are done and how long the files are. A later run of the
same job cuts the files back to that and goes on: an interrupted run ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.cli import write_text
from megatron.config.schema import require
from megatron.data.encode import Encoded, Encoders, Recipe
from megatron.data.indexed import dtype_for_vocab
from megatron.data.indexed_writer import IndexedWriter, is_resumable, publish
from megatron.data.sources import CHUNK_BYTES, Chunk, open_sources
from megatron.data.work import WorkFolder, named_errors

LOGGER = logging.getLogger("megatron")
COMMIT_SECONDS = 10.0
SHOWN_REJECTIONS = 5
STATE, REJECTED = "state.json", "rejected.jsonl"
LAYOUT = 1  # of the work folder; part of a job's identity: raise it when a change would give other bytes


@dataclass(frozen=True)
class Job:
    """What to preprocess, and where to."""

    inputs: Sequence[str]
    """as `open_sources` takes them"""
    output_prefix: str
    recipe: Recipe
    skip_errors: bool = False
    """records that cannot be used are written to `<output prefix>.rejected.jsonl` instead of ending the work"""
    max_documents: int = 0
    """0: all"""
    workers: int = 1
    """processes that encode; the result does not depend on it"""

    def __post_init__(self):
        require(self.workers >= 1, "--workers", self.workers, "1 or more")
        require(self.max_documents >= 0, "--max-documents", self.max_documents, "0 (all) or more")


@dataclass
class Totals:
    """What became of one key of the input."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """of the texts in UTF-8"""


class Preprocessing:
    """One job, from wherever an earlier run of it stopped. A context manager, which holds the output prefix.

    Iterating it does the work: every step is a chunk, already written; `finish` then publishes. Leaving it early keeps
    what was committed.

    Args:
        commit_seconds: time from one commit to the next.
        chunk_bytes: text taken at once. Neither changes what is written.

    Attributes:
        skipped: records that could not be used.
        read: bytes of the inputs that are done.
        size: bytes of the inputs; 0 where that is not known.
        resumed: whether an earlier run is continued.

    Raises:
        FileNotFoundError: an input is not there.
        ValueError: a record cannot be used (and is not to be skipped), there are no documents at all, or another
            process writes the same output.
        OSError: something cannot be read or written.
    """

    def __init__(self, job: Job, commit_seconds: float = COMMIT_SECONDS, chunk_bytes: int = CHUNK_BYTES):
        self.job, self._chunk_bytes = job, chunk_bytes
        self._commit_seconds, self._committed = commit_seconds, time.monotonic()
        self._sources = open_sources(job.inputs)
        self.size = sum(source.size for source in self._sources)
        with ExitStack() as stack:
            self._encoders = stack.enter_context(Encoders(job.recipe, job.workers))
            self._tokenizer = self._encoders.tokenizer
            self._folder = stack.enter_context(WorkFolder(job.output_prefix))
            self._identity = self._describe()
            state = self._earlier_state()
            self.resumed = state is not None
            if state is None:
                self._folder.clear()
                state = {"source": 0, "position": 0, "line": 0, "skipped": 0, "rejected": 0, "read": 0,
                         "use_reference": False, "published": False, "writers": {}, "bytes": {}}
            self._restore(state, stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> Preprocessing:
        return self

    def __exit__(self, *_: object) -> None:
        if not os.path.exists(self._folder.file(STATE)):
            self._folder.clear()
        self._stack.close()

    def __iter__(self) -> Iterator[Encoded]:
        while not self._at_end():
            for encoded in self._encoders.map(self._chunks(), self.size - self.read):
                if self._falls_back(encoded):
                    break  # and take this file's chunks again
                self._take(encoded)
                if time.monotonic() - self._committed >= self._commit_seconds:
                    self.commit()
                yield encoded
                if self._at_end():
                    break
            else:
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
        writers = {key: writer.commit() for key, writer in self._writers.items()}
        with named_errors(self._rejected.name):
            self._rejected.flush()
            os.fsync(self._rejected.fileno())
        self._save({"source": self._source, "position": self._position, "line": self._line, "skipped": self.skipped,
                    "rejected": self._rejected.tell(), "read": self.read, "published": False,
                    "use_reference": self._encoders.use_reference, "writers": writers, "bytes": self._bytes})
        self._committed = time.monotonic()

    def finish(self) -> list[Totals]:
        """Publish every key's pair, and the rejected records if there are any."""
        if not self.documents:
            raise ValueError(f"--input {' '.join(self.job.inputs)} has no documents" +
                             (f": all {self.skipped} records were skipped" if self.skipped else ""))
        totals = [Totals(writer.prefix, writer.num_documents, writer.num_tokens, self._bytes[key])
                  for key, writer in self._writers.items()]
        if not self._published:
            for key, writer in self._writers.items():
                writer.prepare(self._sidecar(key))
            self._save({**self._state, "published": True, "skipped": self.skipped, "read": self.read, "writers": {
                key: {"num_documents": w.num_documents, "num_tokens": w.num_tokens} for key, w in self._writers.items()},
                "bytes": self._bytes})
        for writer in self._writers.values():
            publish(writer.prefix, self._folder)
        self._publish_rejected()
        self._folder.clear()
        return totals

    def _describe(self) -> dict[str, Any]:
        """What makes two runs the same job."""
        recipe = self.job.recipe
        return {"layout": LAYOUT, "inputs": [source.identity() for source in self._sources],
                "tokenizer": [self._tokenizer.name, self._tokenizer.fingerprint], "keys": list(recipe.keys),
                "append_eod": recipe.append_eod, "split_sentences": recipe.split_sentences,
                "max_documents": self.job.max_documents}

    def _earlier_state(self) -> dict[str, Any] | None:
        """The committed state of an earlier run of this job, if its files are there."""
        path = self._folder.file(STATE)
        if not os.path.exists(path):
            return None
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        reasons = [name.replace("_", " ") for name, value in self._identity.items() if state["job"].get(name) != value]
        if not all(source.resumable for source in self._sources):
            reasons.append("standard input, which cannot be read again")
        if state["skipped"] and not self.job.skip_errors:
            reasons.append("--on-error, and records were skipped")
        if not state["published"] and not all(is_resumable(prefix, self._folder, state["writers"][key])
                                              for key, prefix in self._prefixes().items()):
            reasons.append("files that were cut off")
        if reasons:
            LOGGER.warning("%s holds an unfinished run that differs in: %s. Starting again", self._folder.path,
                           ", ".join(reasons))
            return None
        LOGGER.info("continuing the unfinished run in %s", self._folder.path)
        return state

    def _restore(self, state: dict[str, Any], stack: ExitStack) -> None:
        self._state = state
        self._source, self._position, self._line = state["source"], state["position"], state["line"]
        self.skipped, self.read, self._published = state["skipped"], state["read"], state["published"]
        self._encoders.use_reference = state["use_reference"]
        self._bytes = dict(state["bytes"]) or dict.fromkeys(self.job.recipe.keys, 0)
        rejected = self._folder.file(REJECTED)
        if self._published:
            self._source = len(self._sources)
            self._rejected = stack.enter_context(open(os.devnull, "rb"))  # noqa: SIM115
            self._writers = {key: _Published(prefix, **state["writers"][key])
                             for key, prefix in self._prefixes().items()}
            return
        dtype = dtype_for_vocab(self._tokenizer.vocab_size)
        self._writers = {key: IndexedWriter(prefix, dtype, self._folder, state["writers"].get(key))
                         for key, prefix in self._prefixes().items()}
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
        for source in self._sources[self._source:]:
            yield from source.chunks(self.job.recipe.keys, position, self._chunk_bytes)
            position = 0

    def _at_end(self) -> bool:
        enough = self.job.max_documents and self.documents >= self.job.max_documents
        return bool(enough) or self._source >= len(self._sources)

    def _falls_back(self, encoded: Encoded) -> bool:
        """Whether the fast encoder failed on this chunk: then it is not used from this chunk on."""
        if not encoded.difference or self._encoders.use_reference:
            return False
        LOGGER.warning("%s: %s", encoded.chunk.path, encoded.difference)
        self._encoders.use_reference = True
        self._move_to(encoded.chunk, encoded.chunk.start)
        return True

    def _move_to(self, chunk: Chunk, position: int) -> None:
        if chunk.source != self._source:
            self._source, self._line = chunk.source, 0
        self._position = position

    def _take(self, encoded: Encoded) -> None:
        """Write what came of one chunk."""
        self._move_to(encoded.chunk, encoded.chunk.start)
        room = self.job.max_documents - self.documents if self.job.max_documents else encoded.documents
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

    def _reject(self, chunk: Chunk, rejected) -> None:
        number = self._line + rejected.line
        where = chunk.place(number)
        if not self.job.skip_errors:
            raise ValueError(f"{where}: {rejected.reason}. Correct or remove it, or leave such records out: "
                             f"--on-error skip")
        self.skipped += 1
        if self.skipped <= SHOWN_REJECTIONS:
            LOGGER.warning("skipped %s: %s", where, rejected.reason)
        record = {"file": chunk.path, chunk.unit: number, "reason": rejected.reason,
                  "record": rejected.raw.decode(errors="backslashreplace")}
        with named_errors(self._rejected.name):
            self._rejected.write(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")

    def _sidecar(self, key: str) -> dict[str, Any]:
        recipe, tokenizer = self.job.recipe, self._tokenizer
        return {"tool": "preprocess_data", "tokenizer": tokenizer.name, "vocab_hash": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "append_eod": recipe.append_eod,
                "split_sentences": recipe.split_sentences, "skipped": self.skipped,
                "sources": [source.identity()[0] for source in self._sources], "key": key}

    def _publish_rejected(self) -> None:
        self._rejected.close()
        final, here = f"{self.job.output_prefix}.rejected.jsonl", self._folder.file(REJECTED)
        if self.skipped:
            with suppress(FileNotFoundError):  # an interrupted run has published it already
                os.replace(here, final)
        else:
            with suppress(FileNotFoundError):  # of an earlier run on this prefix
                os.remove(final)

    def _save(self, state: dict[str, Any]) -> None:
        self._state = state
        with named_errors(self._folder.file(STATE)):
            write_text(self._folder.file(STATE), json.dumps({"job": self._identity, **state}))


@dataclass(frozen=True)
class _Published:
    """In place of a writer whose files have been written by an earlier run."""

    prefix: str
    num_documents: int = 0
    num_tokens: int = 0


def preprocess(job: Job, **options) -> list[Totals]:
    """Do a job from beginning, or where an earlier run stopped, to end. Takes and raises what `Preprocessing` does."""
    with Preprocessing(job, **options) as work:
        for _ in work:
            pass
        return work.finish()
