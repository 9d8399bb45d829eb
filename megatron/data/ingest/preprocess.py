"""Text files -> token shards: the work behind tools/preprocess_data.py and streaming.

Everything is first written to the staging directory `<output prefix>.partial/`. At regular
intervals the work is committed: the data is made durable, then `state.json` is replaced
atomically, which records how far the inputs are done and how long the files are. A later
run of the same job truncates the files to that state and continues. So an interrupted run
ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.fields import require
from megatron.data.indexed.reader import dtype_for_vocab
from megatron.data.indexed.recorded_tokenizer import FLAGS_ENTRY, recorded_flags
from megatron.data.indexed.writer import PUBLISHED, IndexedWriter, is_resumable, publish
from megatron.data.ingest.encode import EncodeConfig, EncodedChunk
from megatron.data.ingest.encoder_pool import EncoderPool
from megatron.data.ingest.records import (
    DEFAULT_CHUNK_BYTES,
    TOOL_FLAGS,
    Chunk,
    FlagNames,
    no_documents_error,
)
from megatron.data.ingest.rejected_log import RejectedLog, publish_rejected
from megatron.data.ingest.run_state import (
    STATE_FILE,
    PreparedOutput,
    RunState,
    file_identity,
    identity_differences,
    job_identity,
)
from megatron.data.ingest.sources import open_sources
from megatron.io.staging_dir import StagingDir
from megatron.io.untrusted import parse_json
from megatron.log import get_logger

_COMMIT_SECONDS = 10.0
_REJECTED_FILE = "rejected.jsonl"


@dataclass(frozen=True)
class PreprocessConfig:
    """What to preprocess, how, and where to write it."""

    inputs: Sequence[str]
    """inputs as `open_sources` takes them"""
    output_prefix: str
    """path and first part of the names of the outputs"""
    encoding: EncodeConfig
    skip_errors: bool = False
    """write records that cannot be used to `<output prefix>.rejected.jsonl`, instead of
    stopping at the first"""
    max_documents: int = 0
    """number of documents to take; 0: all"""
    workers: int = 1
    """processes that encode; the result does not depend on their number"""
    flags: FlagNames = TOOL_FLAGS
    """flags that error messages refer to"""

    def __post_init__(self):
        require(self.workers >= 1, "--workers", self.workers, "1 or more")
        require(
            self.max_documents >= 0, "--max-documents", self.max_documents, "0 (all) or more"
        )
        require(
            os.path.basename(self.output_prefix) not in ("", ".", ".."),
            self.flags.output,
            self.output_prefix,
            "a path whose last part begins the names of the files, such as data/corpus",
        )
        for key in self.encoding.keys:
            require(
                key and not {"/", "\0"} & {*key},
                self.flags.keys,
                key,
                "keys without a slash, since they become part of file names",
            )

    @property
    def prefixes(self) -> dict[str, str]:
        """The prefix of the .bin/.idx pair of each key."""
        kind = "sentence" if self.encoding.split_sentences else "document"
        return {key: f"{self.output_prefix}_{key}_{kind}" for key in self.encoding.keys}

    @property
    def rejected_path(self) -> str:
        """Final path of the records that cannot be used."""
        return f"{self.output_prefix}.rejected.jsonl"


@dataclass
class OutputStats:
    """Size of the output of one key."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """bytes of the texts in UTF-8"""


class PreprocessRun:
    """One preprocessing job, continued from where an earlier run of it stopped.

    A context manager that locks the output prefix. Iterating it does the work: each step
    yields a chunk whose tokens have been written. `finish` then publishes the outputs.
    Leaving it earlier keeps what was committed.

    Args:
        config: the job.
        commit_seconds: time between commits; does not affect what is written.
        chunk_bytes: bytes of text per chunk; affects what is written only if the fast
            encoder has a fault that the comparisons (one per chunk) find late.

    Attributes:
        total_bytes: bytes of the inputs; sources of unknown size count 0.
        resumed: whether this continues an earlier run.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: a record cannot be used (and is not to be skipped), there are no
            documents, or another process writes the same output.
        OSError: a file cannot be read or written, or a worker process ended.
    """

    def __init__(
        self,
        config: PreprocessConfig,
        commit_seconds: float = _COMMIT_SECONDS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ):
        self.config = config
        self._chunk_bytes = chunk_bytes
        self._commit_seconds = commit_seconds
        self._committed_at = time.monotonic()
        self._sources = open_sources(config.inputs, config.flags)
        self.total_bytes = sum(source.size for source in self._sources)
        with ExitStack() as stack:
            self._encoders = stack.enter_context(EncoderPool(config.encoding, config.workers))
            self._tokenizer = self._encoders.tokenizer
            self._check_inputs_are_not_outputs()
            self._staging = stack.enter_context(StagingDir(config.output_prefix))
            # Merging, or a run with another output prefix, may write the same pair.
            for prefix in config.prefixes.values():
                stack.enter_context(StagingDir(prefix))
            self._identity = job_identity(
                config.encoding, self._sources, self._tokenizer, config.max_documents
            )
            state = self._load_state()
            self.resumed = state is not None
            if state is None:
                self._staging.clear()
                state = RunState(bytes=dict.fromkeys(config.encoding.keys, 0))
            self._restore(state, stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> PreprocessRun:
        return self

    def __exit__(self, *_: object) -> None:
        if not os.path.exists(self._staging.file(STATE_FILE)):
            self._staging.clear()
        self._stack.close()

    def __iter__(self) -> Iterator[EncodedChunk]:
        if self._is_done():
            return
        for encoded in self._encoders.map(self._chunks(), self.total_bytes - self.bytes_read):
            self._write(encoded)
            if time.monotonic() - self._committed_at >= self._commit_seconds:
                self.commit()
            yield encoded
            if self._is_done():
                return
        self._check_source_unchanged()
        self._state.source = len(self._sources)

    @property
    def documents(self) -> int:
        """Documents written so far, for each key."""
        return next(iter(self._outputs.values())).num_documents

    @property
    def tokens(self) -> int:
        """Tokens written so far, for all keys together."""
        return sum(output.num_tokens for output in self._outputs.values())

    @property
    def skipped(self) -> int:
        """Records that could not be used so far."""
        return self._state.skipped

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs that are done."""
        return self._state.read

    @property
    def published(self) -> bool:
        """Whether publishing has begun, so that only `finish` is left to do."""
        return self._state.published

    def commit(self) -> None:
        """Make the work so far durable, so that a later run can continue from here."""
        self._check_source_unchanged()
        self._state.writers = {key: output.commit() for key, output in self._outputs.items()}
        self._save_state()
        self._committed_at = time.monotonic()

    def finish(self) -> list[OutputStats]:
        """Publish the outputs of all keys, and the rejected records if there are any."""
        if not self.documents:
            raise no_documents_error(self.config.inputs, self.skipped, self.config.flags)
        stats = []
        for key, output in self._outputs.items():
            size = self._state.bytes[key]
            stats.append(
                OutputStats(output.prefix, output.num_documents, output.num_tokens, size)
            )
        if not self.published:
            self._prepare()
        for prefix in self.config.prefixes.values():
            publish(prefix, self._staging)
        if self._rejected_log is not None:
            self._rejected_log.close()
        publish_rejected(
            self._staging.file(_REJECTED_FILE), self.config.rejected_path, self.skipped
        )
        self._staging.clear()
        return stats

    def _prepare(self) -> None:
        """Complete the output files and record in the state that publishing begins."""
        self._check_source_unchanged()
        writers = {}
        for key, output in self._outputs.items():
            prepared_prefix = output.prepare(self._sidecar(key))
            writers[key] = {
                "num_documents": output.num_documents,
                "num_tokens": output.num_tokens,
                "file": file_identity(prepared_prefix + ".bin"),
            }
        self._state.writers = writers
        self._state.published = True
        self._save_state()

    def _save_state(self) -> None:
        self._rejected_log.sync()
        self._state.rejected = self._rejected_log.size
        self._state.use_reference = self._encoders.use_reference
        self._state.save(self._staging.file(STATE_FILE), self._identity)

    def _check_inputs_are_not_outputs(self) -> None:
        outputs = {os.path.realpath(self.config.rejected_path)}
        for prefix in self.config.prefixes.values():
            outputs.update(os.path.realpath(f"{prefix}{suffix}") for suffix in PUBLISHED)
        flags = self.config.flags
        for source in self._sources:
            if os.path.realpath(source.path) in outputs:
                raise ValueError(
                    f"{flags.input} names {source.path}, which this run would write. Choose "
                    f"another {flags.output}, or name the inputs one by one"
                )

    def _check_source_unchanged(self) -> None:
        """Raise ValueError if the source that is being read changed since it was opened."""
        if self._state.source >= len(self._sources):
            return
        path, *opened = self._sources[self._state.source].identity()[:3]
        is_file = any(opened)
        if is_file and file_identity(path)[2:] != opened:
            raise ValueError(
                f"{path} changed while it was read. Start again when nothing writes to it"
            )

    def _load_state(self) -> RunState | None:
        """Return the committed state of an earlier run of this job, if it can be continued."""
        path = Path(self._staging.file(STATE_FILE))
        if not path.exists():
            return None
        state = None
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            reasons = identity_differences(self._identity, content.pop("job"))
            if reasons != ["layout"]:
                state = RunState(**content)
                reasons += self._obstacles(state)
                if not reasons and not self._files_match(state):
                    reasons = ["files that were cut off or replaced"]
        except (ValueError, TypeError, KeyError, AttributeError):
            reasons = ["its state, which cannot be read"]
        if reasons:
            get_logger().warning(
                "%s holds an unfinished run that differs in: %s. Starting again",
                self._staging.path,
                ", ".join(reasons),
            )
            return None
        get_logger().info("continuing the unfinished run in %s", self._staging.path)
        return state

    def _obstacles(self, state: RunState) -> list[str]:
        """Explain why this run cannot continue a state of its job; empty when it can."""
        reasons = []
        if not all(source.resumable for source in self._sources):
            reasons.append("standard input, which cannot be read again")
        if state.skipped and not self.config.skip_errors:
            reasons.append("--on-error, and records were skipped")
        return reasons

    def _files_match(self, state: RunState) -> bool:
        """Whether the staged (or partly published) files are those that the state describes."""
        prefixes = self.config.prefixes
        if state.published:
            for key, prefix in prefixes.items():
                staged = self._staging.file(f"{Path(prefix).name}.bin")
                found = (file_identity(f"{prefix}.bin"), file_identity(staged))
                if state.writers[key]["file"] not in found:
                    return False
            return True
        rejected = self._staging.file(_REJECTED_FILE)
        if not os.path.exists(rejected) or os.path.getsize(rejected) < state.rejected:
            return False
        return all(
            is_resumable(prefix, self._staging, state.writers[key])
            for key, prefix in prefixes.items()
        )

    def _restore(self, state: RunState, stack: ExitStack) -> None:
        """Open the outputs at the position that a state describes."""
        self._state = state
        self._encoders.use_reference = state.use_reference
        self._rejected_log: RejectedLog | None = None
        self._outputs: dict[str, IndexedWriter | PreparedOutput] = {}
        if state.published:
            state.source = len(self._sources)
            for key, prefix in self.config.prefixes.items():
                self._outputs[key] = PreparedOutput(prefix, **state.writers[key])
            return
        dtype = dtype_for_vocab(self._tokenizer.vocab_size)
        for key, prefix in self.config.prefixes.items():
            writer = IndexedWriter(prefix, dtype, self._staging, state.writers.get(key))
            stack.callback(writer.discard)
            self._outputs[key] = writer
        self._rejected_log = RejectedLog(
            self._staging.file(_REJECTED_FILE), state.rejected, state.skipped
        )
        stack.callback(self._rejected_log.close)

    def _chunks(self) -> Iterator[Chunk]:
        position = self._state.position
        for source in self._sources[self._state.source :]:
            yield from source.chunks(self.config.encoding.keys, position, self._chunk_bytes)
            position = 0

    def _is_done(self) -> bool:
        limit = self.config.max_documents
        if limit and self.documents >= limit:
            return True
        return self._state.source >= len(self._sources)

    def _write(self, encoded: EncodedChunk) -> None:
        """Write the tokens and the rejected records of one chunk."""
        chunk = encoded.chunk
        state = self._state
        if chunk.source != state.source:
            self._check_source_unchanged()
            state.source = chunk.source
            state.line = 0
        state.position = chunk.start
        limit = self.config.max_documents
        remaining = limit - self.documents if limit else encoded.num_documents
        for rejected in encoded.rejected:
            if limit and rejected.documents_before >= remaining:
                continue
            number = state.line + rejected.line
            if not self.config.skip_errors:
                raise chunk.rejection_error(rejected, number)
            self._rejected_log.add(chunk, rejected, number)
            state.skipped = self._rejected_log.skipped
        for key, documents in encoded.by_key.items():
            documents = documents.first(remaining)
            self._outputs[key].add_documents(
                documents.ids, documents.sequence_lengths, documents.sequence_counts
            )
            state.bytes[key] += int(documents.text_bytes.sum())
        state.read += chunk.disk_bytes
        state.line += encoded.lines
        state.position = chunk.end

    def _sidecar(self, key: str) -> dict[str, Any]:
        """Build the record that is stored next to the .bin/.idx pair of a key."""
        encoding = self.config.encoding
        tokenizer = self._tokenizer
        return {
            "tool": "preprocess_data",
            "tokenizer": tokenizer.name,
            FLAGS_ENTRY: recorded_flags(encoding.tokenizer),
            "vocab_hash": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "append_eod": encoding.append_eod,
            "split_sentences": encoding.split_sentences,
            "skipped": self.skipped,
            "sources": [source.identity()[0] for source in self._sources],
            "key": key,
        }


def preprocess(config: PreprocessConfig, **options) -> list[OutputStats]:
    """Run a job to its end, from the start or from where an earlier run stopped.

    Takes the arguments of `PreprocessRun` and raises what it raises.
    """
    with PreprocessRun(config, **options) as run:
        for _ in run:
            pass
        return run.finish()
