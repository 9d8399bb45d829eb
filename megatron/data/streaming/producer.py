"""Training on raw text: processes of their own tokenise it while the run goes, and keep what they made as token shards.

What one source becomes, in the cache folder; NAME contains a hash of everything the tokens depend on:

    NAME.partial/              the unfinished work, see preprocess.py: `state.json` says how many tokens are durable,
                               and readers believe nothing else (so it works across nodes, too)
    NAME_<key>_document.*      the pair, once the source came to its end; the work folder is gone then
    NAME.wanted                how many tokens a reader has asked for: the producer commits at that, and stays ahead
    NAME.<run>.error           one for each run and node: the line its readers stop with

Shape suffixes: S sequence length, T tokens of one epoch, N samples, W samples of a shuffle window.

The stream of a source is its documents in their order, again and again. Its sample k is tokens k*S to k*S+S, and of
each W samples, one window, the order is drawn from the seed and the window's number. So the order depends on nothing
that can change from one start of a run to the next, and a sample needs no token beyond its window.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron import log
from megatron.config.schema import DataConfig, TokenizerConfig, require
from megatron.data.indexed.reader import IndexedDataset, dtype_for_vocab
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import (
    LAYOUT,
    STATE,
    PreprocessConfig,
    PreprocessRun,
    digest_of_files,
)
from megatron.data.ingest.sources import open_sources
from megatron.io.atomic_write import errors_with_path
from megatron.io.staging_dir import StagingDir, StagingDirLocked, lock_holder, same_file
from megatron.tokenizer.base import Tokenizer, digest

LOGGER = logging.getLogger("megatron")
CHUNK_BYTES = 1 << 20  # small: the first samples come soon
LOOKAHEAD_TOKENS = (
    64 << 20
)  # made before anybody asks; bounds what a run that is ended early has done in vain
MOST_SOURCES = 32  # each takes a process
POLL_SECONDS, PAUSE_SECONDS, RETRY_SECONDS, GRACE_SECONDS = 0.02, 0.1, 1.0, 10.0
SAY_AFTER_SECONDS, SAY_EVERY_SECONDS = 5.0, 60.0
ERROR_BYTES, ERROR_KEPT_SECONDS = 4096, 86400.0
FLAGS = (
    ("--input", "--streaming-data-path"),
    ("--json-keys", "--streaming-json-key"),
    ("choose another output prefix", "set another --data-cache-path"),
    ("--output-prefix", "--data-cache-path"),
    (
        "leave such records out: --on-error skip",
        "leave such records out with tools/preprocess_data.py",
    ),
)
"""what messages of preprocessing name, and what there is instead"""


@dataclass(frozen=True)
class StreamingContext:
    """What streaming needs to know of a run."""

    tokenizer: TokenizerConfig
    run: str
    """the same in all processes of the run, and in no other run of the same time"""
    starts: bool
    """whether this process starts the producers: one process of each node does, before the others open the data"""


@dataclass(frozen=True)
class TokenStream:
    """One source, and the files through which its tokens come. Equal in all processes of a node."""

    entry: str
    """as `open_sources` takes it"""
    inputs: str
    """digest of what its files are"""
    size: int
    """their bytes; 0: unknown"""
    prefix: str
    """of the cache"""
    key: str
    tokenizer: TokenizerConfig
    run: str

    @property
    def job(self) -> PreprocessConfig:
        return PreprocessConfig(
            [self.entry],
            self.prefix,
            EncodeConfig(self.tokenizer, (self.key,), append_eod=True),
        )

    @property
    def pair(self) -> str:
        """Prefix of the finished pair."""
        return f"{self.prefix}_{self.key}_document"

    @property
    def is_complete(self) -> bool:
        return os.path.exists(self.pair + ".idx")

    @property
    def error_file(self) -> str:
        return f"{self.prefix}.{digest(self.run, socket.gethostname())[:8]}.error"

    def error(self) -> str:
        """Why the producer of this run and node stopped; empty: it did not, or it had done its work."""
        with suppress(FileNotFoundError), open(self.error_file, "rb") as file:
            return file.read().rstrip(b"\0").decode(errors="replace")
        return ""

    def wanted(self) -> int:
        """Tokens that readers have asked for."""
        with suppress(FileNotFoundError), open(self.prefix + ".wanted", "rb") as file:
            return int.from_bytes(file.read(8), "little")
        return 0

    def want(self, tokens: int) -> None:
        """Ask for so many. Another reader's larger number may get lost in it; who waits, asks again."""
        if self.is_complete:
            return
        with open(
            os.open(self.prefix + ".wanted", os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0
        ) as file:
            written = file.read(8)
            if not written or int.from_bytes(written, "little") < tokens:
                file.seek(0)
                file.write(tokens.to_bytes(8, "little"))


def cache_folder(path: str, entries: Sequence[str]) -> str:
    """Where tokens are kept: `--data-cache-path`, or else `stream_cache` beside the first source.

    Raises:
        ValueError: there is nothing to put it beside, or a source would read its own cache as text.
    """
    require(
        bool(path) or not entries[0].startswith("hf:"),
        "--data-cache-path",
        path,
        f"a folder for the tokens, because there is none beside {entries[0]}",
    )
    cache = path or str(
        Path(os.path.abspath(_searched(entries[0]) or entries[0])).parent / "stream_cache"
    )
    for entry in entries:
        if (root := _searched(entry)) and Path(cache).resolve().is_relative_to(
            Path(root).resolve()
        ):
            raise ValueError(
                f"the tokens of {entry} would be kept in {cache}, which is searched for text itself. Set "
                f"--data-cache-path to a folder elsewhere"
            )
    return cache


def _searched(entry: str) -> str:
    """The folder below which `open_sources` looks for files of an entry; empty: it takes one file, or one folder's."""
    if os.path.isdir(entry):
        return entry
    if entry.startswith("hf:") or os.path.exists(entry):
        return ""
    folder = Path(entry).parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return "" if folder == Path(entry).parent and "**" not in entry else str(folder)


def find_stream(
    entry: str, cache: str, key: str, tokenizer: Tokenizer, production: StreamingContext
) -> TokenStream:
    """Where the tokens of a source are, or will be. Writes nothing.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be read, or not twice.
    """
    try:
        sources = open_sources([entry])
    except (ValueError, OSError) as error:
        raise type(error)(_translate(error)) from None
    for source in sources:
        require(
            source.resumable,
            "--streaming-data-path",
            entry,
            "files, patterns, folders and hf:NAME; a pipe can only be read once",
        )
    inputs = _identify(sources)
    place = entry if entry.startswith("hf:") else os.path.abspath(entry)
    told = digest(
        LAYOUT,
        place,
        inputs,
        tokenizer.name,
        tokenizer.fingerprint,
        digest_of_files(production.tokenizer),
        key,
    )
    name = re.sub(r"[^\w.-]+", "_", os.path.basename(place))[-40:]
    sizes = [source.size for source in sources]
    return TokenStream(
        entry,
        inputs,
        sum(sizes) if all(sizes) else 0,
        os.path.join(cache, f"{name}-{told[:16]}"),
        key,
        production.tokenizer,
        production.run,
    )


def open_streams(
    data: DataConfig,
    entries: Sequence[str],
    tokenizer: Tokenizer,
    production: StreamingContext,
) -> tuple[str, list[TokenStream]]:
    """(folder of the cache, the stream of each source). Raises as `find_stream` and `cache_folder` do."""
    require(
        len(entries) <= MOST_SOURCES,
        "number of sources in --streaming-data-path",
        len(entries),
        f"up to {MOST_SOURCES}, because each is tokenised by a process of its own",
        "Quote a pattern, or give the folder: all its files are one source",
    )
    cache = cache_folder(data.data_cache_path, entries)
    return cache, [
        find_stream(entry, cache, data.streaming_json_key, tokenizer, production)
        for entry in entries
    ]


def _identify(sources: Sequence) -> str:
    return digest([source.identity() for source in sources])


def _translate(error: BaseException) -> str:
    message = str(error)
    for old, new in FLAGS:
        message = message.replace(old, new)
    return message


# Reading


class StreamSamples:
    """Samples of a stream: `samples[i]` is int64 [S + 1], and waits until its tokens have been made.

    Args:
        stream: the source.
        vocab_size: the tokenizer's.
        seq_length: S.
        num_samples: N.
        seed: of the windows' orders.
        window: W; 1 keeps the order of the files.

    Raises:
        ValueError: from `[i]`: the producer stopped before it had made the tokens, or the text is shorter than S + 1.
    """

    def __init__(
        self,
        stream: TokenStream,
        vocab_size: int,
        seq_length: int,
        num_samples: int,
        seed: int,
        window: int,
    ):
        for name, value in (
            ("seq_length", seq_length),
            ("num_samples", num_samples),
            ("window", window),
        ):
            require(value > 0, name, value, "a positive integer")
        self._arguments = (stream, vocab_size, seq_length, num_samples, seed, window)
        self._stream, _, self._seq_length, self._size, self._seed, self._window_size = (
            self._arguments
        )
        self._tokens = GrowingTokens(stream, dtype_for_vocab(vocab_size))
        self._window, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> np.ndarray:
        """int64 [S + 1]: sample i. IndexError beyond the end."""
        if not 0 <= i < len(self):
            raise IndexError(
                f"sample {i} of {self._stream.entry}: allowed 0 to {len(self) - 1}"
            )
        size, length = self._window_size, self._seq_length + 1
        window, place = divmod(i, size)
        if window != self._window:  # numpy's RandomState, because its streams are frozen
            self._order = np.random.RandomState([self._seed % 2**32, window]).permutation(size)
            self._window = window
        start = (window * size + int(self._order[place])) * self._seq_length
        sample = self._tokens.read(
            start, start + length, (window + 1) * size * self._seq_length + 1
        )
        if (total := self._tokens.total) is not None and total < length:
            raise ValueError(
                f"{self._stream.entry} has {total} tokens; one sample takes {length}. Give more text or a "
                f"smaller --seq-length"
            )
        return sample

    def __reduce__(self) -> tuple:
        return StreamSamples, self._arguments  # a worker process only reads

    def source(self, i: int) -> str:
        """What sample i comes from, for messages."""
        return self._stream.entry

    @property
    def tokens_needed(self) -> int:
        """Up to the end of the last window, in which the last samples may come from anywhere."""
        return -(-self._size // self._window_size) * self._window_size * self._seq_length + 1

    def start(self, lookahead: int = LOOKAHEAD_TOKENS) -> None:
        """Have a process make the tokens that are not there yet; it ends when it is done, or when this object goes.

        Raises:
            OSError: the cache cannot be written.
        """
        stream, needed, cached = self._stream, self.tokens_needed, self._tokens.refresh()
        if self._tokens.total is not None:
            LOGGER.info("%s: all its %d tokens are in %s", stream.entry, cached, stream.pair)
            return
        LOGGER.info(
            "%s: %d of the %d tokens for this run are in %s.partial%s",
            stream.entry,
            cached,
            needed,
            stream.prefix,
            ""
            if cached >= needed
            else "; a process of its own makes the others, or as many as there are",
        )
        if cached >= needed:
            return
        lookahead = max(lookahead, 2 * self._window_size * self._seq_length)
        process = start_producer(stream, needed, lookahead)
        weakref.finalize(self, _stop, process, os.getpid())


class GrowingTokens:
    """The tokens of a stream as far as they are durable, mapped; more and more of them.

    Attributes:
        total: T, once the source has come to its end.
    """

    def __init__(self, stream: TokenStream, dtype: np.dtype):
        self._stream, self._dtype = stream, dtype.newbyteorder("<")
        self._tokens = np.empty(0, dtype)
        self._state: tuple[int, int] | None = None
        """which `state.json` was read last: inode, time of change"""
        self._asked = 0
        self._produced = os.path.exists(stream.error_file)
        """whether a producer of this run has been seen"""
        self.total: int | None = None

    def read(self, start: int, stop: int, ahead: int) -> np.ndarray:
        """int64 tokens [start, stop) of the endless repetition, when they are there; asks for the first `ahead`."""
        if self.total is None and ahead > self._asked:
            self._asked = ahead
            if self.refresh() < ahead and self.total is None:
                self._stream.want(ahead)
        if self.total is None and len(self._tokens) < stop:
            self._wait(stop, ahead)
        if not len(self._tokens):
            return np.empty(0, np.int64)
        return self._tokens.take(np.arange(start, stop), mode="wrap").astype(np.int64)

    def refresh(self) -> int:
        """Map what has been added. Returns how many tokens there are."""
        if self._stream.is_complete:
            self._tokens = IndexedDataset(self._stream.pair).tokens
            self.total = len(self._tokens)
            return self.total
        folder = f"{self._stream.prefix}.partial"
        # A state without its file, or with a shorter one, is about to be replaced: by the finished pair or a new begin.
        with (
            suppress(FileNotFoundError, ValueError),
            open(os.path.join(folder, STATE), encoding="utf-8") as file,
        ):
            stat = os.fstat(file.fileno())
            if self._state == (stat.st_ino, stat.st_mtime_ns):
                return len(self._tokens)
            self._state = stat.st_ino, stat.st_mtime_ns
            tokens = json.load(file)["writers"][self._stream.key].get("tokens", 0)
            if tokens > len(self._tokens):
                path = os.path.join(folder, os.path.basename(self._stream.pair) + ".bin")
                self._tokens = np.memmap(path, self._dtype, "r", shape=tokens).view(np.ndarray)
        return len(self._tokens)

    def _wait(self, stop: int, ahead: int) -> None:
        """Until there are `stop` tokens, or all. Raises ValueError when nobody makes them any more."""
        say_at = time.monotonic() + SAY_AFTER_SECONDS
        trainer = (
            multiprocessing.parent_process()
        )  # of a worker that reads ahead: the training process
        while True:
            produced = os.path.exists(
                self._stream.error_file
            )  # looked at first: it goes when all is there
            if self.refresh() >= stop or self.total is not None:
                return
            if error := self._stream.error():
                raise ValueError(error)
            if (self._produced and not produced) or (trainer and not trainer.is_alive()):
                raise ValueError(f"the process that had {self._stream.entry} tokenised ended")
            self._produced = produced
            self._stream.want(ahead)
            if time.monotonic() >= say_at:
                say_at += SAY_EVERY_SECONDS
                LOGGER.info(
                    "waiting for %s: %d tokens are made, the next sample ends with the %dth; the others are "
                    "made by %s",
                    self._stream.entry,
                    len(self._tokens),
                    stop,
                    lock_holder(self._stream.prefix) or "nobody yet",
                )
            time.sleep(POLL_SECONDS)


# The producer, seen from the training process that started it


def start_producer(stream: TokenStream, needed: int, lookahead: int) -> subprocess.Popen:
    """Start the process that makes the first `needed` tokens of a stream, never `lookahead` more than wanted.

    It is no `multiprocessing` one, which daemonic processes may not start and which would import the training program
    again; and it has a session of its own, so that Ctrl-C is for the training process, with which it ends.

    Raises:
        OSError: the cache cannot be written.
    """
    with errors_with_path(os.path.dirname(stream.prefix)):
        os.makedirs(os.path.dirname(stream.prefix), exist_ok=True)
    stream.want(0)
    errors = _create_error_file(stream)
    order = json.dumps(
        {
            "stream": dataclasses.asdict(stream),
            "needed": needed,
            "lookahead": lookahead,
            "errors": errors,
        }
    )
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r}); "
        f"from megatron.data.streaming.producer import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, order],
        stdin=subprocess.PIPE,
        pass_fds=[errors],
        start_new_session=True,
    )
    os.register_at_fork(
        after_in_child=process.stdin.close
    )  # a worker that holds it would keep the producer alive
    threading.Thread(target=_watch, args=(process, stream, errors), daemon=True).start()
    return process


def _create_error_file(stream: TokenStream) -> int:
    """Descriptor of a new file, with room for a message: the disk may be full by then. The producer of an earlier
    start keeps the file it was given, so that its last words do not end this run. Old messages of others are removed;
    a file without one may be that of a run that still goes on."""
    for path in map(Path, glob.glob(f"{glob.escape(stream.prefix)}.*.error")):
        with suppress(FileNotFoundError):
            old = time.time() - path.stat().st_mtime > ERROR_KEPT_SECONDS
            if str(path) == stream.error_file or (old and path.read_bytes().strip(b"\0")):
                path.unlink()
    with errors_with_path(stream.error_file):
        errors = os.open(stream.error_file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.write(errors, bytes(ERROR_BYTES))
    return errors


def _watch(process: subprocess.Popen, stream: TokenStream, errors: int) -> None:
    """Wait for the producer's end, and say why where it could not."""
    code = process.wait()
    if code and os.pread(errors, 1, 0) == b"\0":
        how = (
            f"by signal {-code} (killed, or out of memory?)"
            if code < 0
            else f"with exit code {code}"
        )
        _report(
            errors,
            f"the process that tokenises {stream.entry} ended {how}. Run the program again: it goes on "
            f"where that process stopped",
        )
    os.close(errors)


def _report(errors: int, message: str) -> None:
    os.pwrite(
        errors,
        message.encode(errors="backslashreplace")[:ERROR_BYTES].ljust(ERROR_BYTES, b"\0"),
        0,
    )


def _stop(process: subprocess.Popen, owner: int) -> None:
    """Let a producer commit and end. Not from a forked worker process, which also has this object."""
    if os.getpid() == lock_holder:
        with suppress(OSError):  # it has ended
            process.stdin.write(b"q")
            process.stdin.close()


# The producer


def main() -> None:
    """The producer process: makes what its argument says, and ends with the process that started it."""
    log.setup()
    order = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stream = TokenStream(
        **{**order["stream"], "tokenizer": TokenizerConfig(**order["stream"]["tokenizer"])}
    )
    stop, errors, code = threading.Event(), order["errors"], 0
    threading.Thread(target=_listen, args=(stream, errors, stop), daemon=True).start()
    try:
        produce(stream, order["needed"], order["lookahead"], stop)
        _leave(stream, errors)
    except (ValueError, OSError) as error:
        _report(errors, _translate(error))
        code = 2
    sys.stdout.flush()
    os._exit(
        code
    )  # threads of libraries that read hf: sources abort the process in the interpreter's teardown


def _leave(stream: TokenStream, errors: int) -> None:
    """Tell those who still wait that no more will come, if nothing worse has been told."""
    if same_file(errors, stream.error_file) and os.pread(errors, 1, 0) == b"\0":
        os.remove(stream.error_file)


def _listen(stream: TokenStream, errors: int, stop: threading.Event) -> None:
    """Wait until told to stop, or until the training process is gone, which other ranks may have to be told."""
    if not (told := os.read(0, 1)):
        _report(errors, f"the process that had {stream.entry} tokenised ended")
    stop.set()
    time.sleep(
        GRACE_SECONDS
    )  # for the chunk at hand and the commit; then it hangs in a read from a network
    _leave(stream, errors)
    os._exit(0 if told else 1)


def produce(stream: TokenStream, needed: int, lookahead: int, stop: threading.Event) -> None:
    """Tokenise a stream, as far as it is needed, when no other process does.

    Raises:
        ValueError: a record cannot be used, there is no text at all, or the files are not those that the run started
            with.
        OSError: something cannot be read or written.
    """
    while not (stop.is_set() or stream.is_complete):
        try:
            StagingDir(
                stream.prefix
            ).release()  # whether it is free: cheaper than building a tokenizer to find out
            if _identify(open_sources([stream.entry])) != stream.inputs:
                raise ValueError(
                    f"{stream.entry} has changed since this run started. Start the run again"
                )
            with PreprocessRun(stream.job, chunk_bytes=CHUNK_BYTES) as work:
                # Another process may have been at it while this one prepared.
                if not stream.is_complete and (work.tokens < needed or work.published):
                    _tokenise(work, stream, needed, lookahead, stop)
            return
        except StagingDirLocked:
            stop.wait(RETRY_SECONDS)


def _tokenise(
    work: PreprocessRun, stream: TokenStream, needed: int, lookahead: int, stop: threading.Event
) -> None:
    committed = work.tokens
    for _ in work:
        while True:
            wanted, made = stream.wanted(), work.tokens
            ends, ahead = stop.is_set() or made >= needed, made >= wanted + lookahead
            if committed < made and (ends or ahead or committed < wanted <= made):
                work.commit()
                committed = made
            if ends:
                return
            if not ahead:
                break
            stop.wait(PAUSE_SECONDS)
    work.finish()
    with suppress(FileNotFoundError):
        os.remove(stream.prefix + ".wanted")
