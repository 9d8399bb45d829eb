"""Training on raw text: each source is tokenized in the background while training runs.

The tokens are stored as token shards in the cache folder. Files of one source, where NAME
contains a hash of everything that the tokens depend on:

    NAME.partial/              unfinished work, see preprocess.py. `state.json` says how many
                               tokens are durable; readers rely on nothing else, so that
                               streaming works across nodes
    NAME_<key>_document.*      the finished .bin/.idx pair, once the source has been read
    NAME.wanted                the number of tokens that readers have requested; the producer
                               commits when it reaches that number, and works ahead
    NAME.<run>.error           one per run and node: the message its readers stop with

The stream of a source is its documents in order, repeated without end.
"""

from __future__ import annotations

import glob
import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron.config.fields import require
from megatron.config.schema import DataConfig, TokenizerConfig
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.formats import DocumentSource
from megatron.data.ingest.preprocess import PreprocessConfig
from megatron.data.ingest.records import FlagNames
from megatron.data.ingest.run_state import STAGING_LAYOUT, digest_of_files
from megatron.data.ingest.sources import expand_inputs, open_sources
from megatron.io.staging_dir import lock_holder
from megatron.tokenizer.base import Tokenizer, digest

STREAMING_FLAGS = FlagNames(
    input="--streaming-data-path",
    keys="--streaming-json-key",
    output="--data-cache-path",
    skip_advice="leave such records out with tools/preprocess_data.py",
)
_MAX_SOURCES = 32  # each takes a process


@dataclass(frozen=True)
class StreamingContext:
    """What streaming needs to know about a run."""

    tokenizer: TokenizerConfig
    run: str
    """identifies the run: equal in all its processes, and different in concurrent runs"""
    starts: bool
    """whether this process starts the producers: one process per node does, before the
    others open the data"""


@dataclass(frozen=True)
class TokenStream:
    """One source and the files that carry its tokens. Equal in all processes of a node."""

    entry: str
    """the source, as `open_sources` takes it"""
    inputs_digest: str
    """digest of the identity of its files"""
    size: int
    """bytes of its files; 0: unknown"""
    prefix: str
    """path and common first part of the names of its files in the cache"""
    key: str
    """key (column) of the texts"""
    tokenizer: TokenizerConfig
    run: str
    """identifies the run, see `StreamingContext`"""

    @property
    def preprocess_config(self) -> PreprocessConfig:
        """The job that produces the tokens."""
        encoding = EncodeConfig(
            self.tokenizer,
            (self.key,),
            append_eod=True,
            append_eod_flag="--streaming-data-path",
        )
        return PreprocessConfig([self.entry], self.prefix, encoding, flags=STREAMING_FLAGS)

    @property
    def pair_prefix(self) -> str:
        """Prefix of the finished .bin/.idx pair."""
        return f"{self.prefix}_{self.key}_document"

    @property
    def staging_path(self) -> str:
        """The folder of the unfinished work."""
        return f"{self.prefix}.partial"

    @property
    def request_file(self) -> str:
        """The file with the number of tokens that readers have requested."""
        return f"{self.prefix}.wanted"

    @property
    def error_file(self) -> str:
        """The file with the error message of the producer of this run and node."""
        return f"{self.prefix}.{digest(self.run, socket.gethostname())[:8]}.error"

    @property
    def is_published(self) -> bool:
        """Whether the finished pair exists. Its producer may still be cleaning up."""
        return os.path.exists(self.pair_prefix + ".idx")

    def check_complete(self) -> bool:
        """Return whether the pair is finished and the staging directory is gone.

        The producer empties the directory, then removes its lock file, then the directory.
        Once the lock file is gone, the caller removes the empty directory as well: whoever
        finds a stream complete finds no trace of the work.
        """
        if not self.is_published or lock_holder(self.prefix):
            return False
        with suppress(OSError):  # missing, as a rule
            os.rmdir(self.staging_path)
        return True

    def read_error(self) -> str:
        """Return why the producer of this run and node failed; empty if it did not."""
        with suppress(FileNotFoundError), open(self.error_file, "rb") as file:
            return file.read().rstrip(b"\0").decode(errors="replace")
        return ""

    def requested(self) -> int:
        """Return how many tokens readers have requested."""
        with suppress(FileNotFoundError), open(self.request_file, "rb") as file:
            return int.from_bytes(file.read(8), "little")
        return 0

    def request(self, tokens: int) -> None:
        """Request the first `tokens` tokens.

        A larger request by another reader at the same moment may be overwritten: readers
        repeat their requests while they wait.
        """
        if self.is_published:
            return
        descriptor = os.open(self.request_file, os.O_RDWR | os.O_CREAT, 0o666)
        with open(descriptor, "r+b", buffering=0) as file:
            written = file.read(8)
            if not written or int.from_bytes(written, "little") < tokens:
                file.seek(0)
                file.write(tokens.to_bytes(8, "little"))
        # The producer removes the file after publishing, perhaps before it was written here.
        if self.is_published:
            self.remove_request()

    def remove_request(self) -> None:
        """Remove the file of requests."""
        with suppress(FileNotFoundError):
            os.remove(self.request_file)


def cache_folder(path: str, entries: Sequence[str]) -> str:
    """Return the folder for the tokens: `path`, or `stream_cache` next to the first source.

    Args:
        path: `--data-cache-path`; may be empty.
        entries: sources, as `open_sources` takes them.

    Raises:
        ValueError: there is no place next to the first source, or a source would read the
            cache as text.
    """
    require(
        bool(path) or not entries[0].startswith("hf:"),
        "--data-cache-path",
        path,
        f"a folder for the tokens, because there is none next to {entries[0]}",
    )
    cache = path
    if not cache:
        first = os.path.abspath(_searched_folder(entries[0]) or entries[0])
        cache = str(Path(first).parent / "stream_cache")
    for entry in entries:
        root = _searched_folder(entry)
        if root and Path(cache).resolve().is_relative_to(Path(root).resolve()):
            raise ValueError(
                f"the tokens of {entry} would be stored in {cache}, which is searched for text "
                f"itself. Set --data-cache-path to a folder elsewhere"
            )
    return cache


def _searched_folder(entry: str) -> str:
    """Return the folder that `open_sources` searches recursively for an entry, or ""."""
    if os.path.isdir(entry):
        return entry
    if entry.startswith("hf:") or os.path.exists(entry):
        return ""
    parent = Path(entry).parent
    folder = parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    if folder == parent and "**" not in entry:
        return ""
    return str(folder)


def find_stream(
    entry: str, cache: str, key: str, tokenizer: Tokenizer, context: StreamingContext
) -> TokenStream:
    """Determine where the tokens of a source are, or will be. Writes nothing.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source cannot be read, or only once, or the tokenizer has no
            end-of-document token.
    """
    sources = open_sources([entry], STREAMING_FLAGS)
    for source in sources:
        require(
            source.resumable,
            "--streaming-data-path",
            entry,
            "files, patterns, folders and hf:NAME; a pipe can only be read once",
        )
    inputs_digest = digest_of_sources(sources)
    path = entry if entry.startswith("hf:") else os.path.abspath(entry)
    identity = digest(
        STAGING_LAYOUT,
        path,
        inputs_digest,
        tokenizer.name,
        tokenizer.fingerprint,
        digest_of_files(context.tokenizer),
        tokenizer.require_eod("--streaming-data-path"),
        key,
    )
    name = re.sub(r"[^\w.-]+", "_", os.path.basename(path))[-40:]
    sizes = [source.size for source in sources]
    return TokenStream(
        entry,
        inputs_digest,
        sum(sizes) if all(sizes) else 0,
        os.path.join(cache, f"{name}-{identity[:16]}"),
        key,
        context.tokenizer,
        context.run,
    )


def open_streams(
    data: DataConfig,
    entries: Sequence[str],
    tokenizer: Tokenizer,
    context: StreamingContext,
) -> tuple[str, list[TokenStream]]:
    """Return (cache folder, the stream of each source).

    Raises what `find_stream` and `cache_folder` raise.
    """
    require(
        len(entries) <= _MAX_SOURCES,
        "number of sources in --streaming-data-path",
        len(entries),
        f"up to {_MAX_SOURCES}, because each is tokenized by its own process",
        "Quote a pattern, or give the folder: all its files are one source",
    )
    expand_inputs(entries, STREAMING_FLAGS)  # no two entries may share a file
    cache = cache_folder(data.data_cache_path, entries)
    streams = [
        find_stream(entry, cache, data.streaming_json_key, tokenizer, context)
        for entry in entries
    ]
    return cache, streams


def digest_of_sources(sources: Sequence[DocumentSource]) -> str:
    """Compute a digest that changes when the content of the sources does."""
    return digest([source.identity() for source in sources])
