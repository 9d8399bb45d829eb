"""The process that tokenizes a stream in the background.

The training process starts it with `start_producer` and ends it with `stop_producer`. It
also ends when the training process does, and when its work is done.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import megatron
from megatron import log
from megatron.config.schema import TokenizerConfig
from megatron.data.ingest.preprocess import PreprocessRun
from megatron.data.ingest.sources import open_sources
from megatron.data.streaming.stream import STREAMING_FLAGS, TokenStream, digest_of_sources
from megatron.io.atomic_write import errors_with_path
from megatron.io.staging_dir import StagingDir, StagingDirLocked, same_file

_CHUNK_BYTES = 1 << 20  # small, so that the first samples are available soon
_PAUSE_SECONDS = 0.1  # between two looks at the requests of the readers
_RETRY_SECONDS = 1.0  # between two attempts to lock the staging directory
_GRACE_SECONDS = 10.0  # for the current chunk and the commit, after a request to stop
_ERROR_FILE_BYTES = 4096
_ERROR_FILE_SECONDS = 86400.0  # age at which error messages of other runs are removed


# In the training process


def start_producer(stream: TokenStream, needed: int, lookahead: int) -> subprocess.Popen:
    """Start the process that produces the first `needed` tokens of a stream.

    It is not a `multiprocessing` one, which daemonic processes may not start and which
    would import the training program again. It has its own session, so that Ctrl-C reaches
    the training process only.

    Args:
        lookahead: tokens to produce beyond those that readers have requested.

    Raises:
        OSError: the cache cannot be written.
    """
    folder = os.path.dirname(stream.prefix)
    with errors_with_path(folder):
        os.makedirs(folder, exist_ok=True)
    stream.request(0)
    error_descriptor = _create_error_file(stream)
    order = json.dumps(
        {
            "stream": dataclasses.asdict(stream),
            "needed": needed,
            "lookahead": lookahead,
            "error_descriptor": error_descriptor,
        }
    )
    root = str(Path(megatron.__file__).resolve().parents[1])
    program = (
        f"import sys; sys.path.insert(0, {root!r}); "
        f"from megatron.data.streaming.producer import producer_main; producer_main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, order],
        stdin=subprocess.PIPE,
        pass_fds=[error_descriptor],
        start_new_session=True,
    )
    # A forked worker with a copy of the pipe would keep the producer alive.
    os.register_at_fork(after_in_child=process.stdin.close)
    watcher = threading.Thread(
        target=_watch, args=(process, stream, error_descriptor), daemon=True
    )
    watcher.start()
    return process


def stop_producer(process: subprocess.Popen, started_by: int) -> None:
    """Let a producer commit its work and end.

    Args:
        started_by: process that started it; in others, which are forks of it, this does
            nothing.
    """
    if os.getpid() != started_by:
        return
    with suppress(OSError):  # it has ended
        process.stdin.write(b"q")
        process.stdin.close()


def _create_error_file(stream: TokenStream) -> int:
    """Create the file for the producer's error message, and return its descriptor.

    It is filled with zeros, since the disk may be full when a message has to be written. A
    producer of an earlier start keeps its own file, so that its message does not end this
    run. Old messages of other runs are removed; a file without a message may belong to a
    run that is still active.
    """
    for path in map(Path, glob.glob(f"{glob.escape(stream.prefix)}.*.error")):
        with suppress(FileNotFoundError):
            is_old = time.time() - path.stat().st_mtime > _ERROR_FILE_SECONDS
            if str(path) == stream.error_file or (is_old and path.read_bytes().strip(b"\0")):
                path.unlink()
    with errors_with_path(stream.error_file):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        descriptor = os.open(stream.error_file, flags, 0o666)
        os.write(descriptor, bytes(_ERROR_FILE_BYTES))
    return descriptor


def _watch(process: subprocess.Popen, stream: TokenStream, error_descriptor: int) -> None:
    """Wait for the producer to end, and write an error message if it could not."""
    code = process.wait()
    if code and not _has_message(error_descriptor):
        how = f"with exit code {code}"
        if code < 0:
            how = f"by signal {-code} (killed, or out of memory?)"
        _write_error(
            error_descriptor,
            f"the process that tokenizes {stream.entry} ended {how}. Run the program again: it "
            f"continues where that process stopped",
        )
    os.close(error_descriptor)


# In both processes


def _has_message(error_descriptor: int) -> bool:
    return os.pread(error_descriptor, 1, 0) != b"\0"


def _write_error(error_descriptor: int, message: str) -> None:
    """Fill the error file with a message of one line."""
    content = message.encode(errors="backslashreplace")[:_ERROR_FILE_BYTES]
    os.pwrite(error_descriptor, content.ljust(_ERROR_FILE_BYTES, b"\0"), 0)


# In the producer process


def producer_main() -> None:
    """Run the producer process: do what its argument, a JSON object, says."""
    log.setup()
    order = json.loads(sys.argv[1])
    fields = order["stream"]
    stream = TokenStream(**{**fields, "tokenizer": TokenizerConfig(**fields["tokenizer"])})
    error_descriptor = order["error_descriptor"]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    listener = threading.Thread(
        target=_listen, args=(stream, error_descriptor, stop), daemon=True
    )
    listener.start()
    code = 0
    try:
        produce(stream, order["needed"], order["lookahead"], stop)
        _remove_error_file(stream, error_descriptor)
    except (ValueError, OSError) as error:
        _write_error(error_descriptor, str(error))
        code = 2
    sys.stdout.flush()
    # A regular exit could abort: threads of the libraries that read hf: sources still run.
    os._exit(code)


def _remove_error_file(stream: TokenStream, error_descriptor: int) -> None:
    """Show readers that this producer has ended, unless there is an error to show."""
    if same_file(error_descriptor, stream.error_file) and not _has_message(error_descriptor):
        os.remove(stream.error_file)


def _listen(stream: TokenStream, error_descriptor: int, stop: threading.Event) -> None:
    """Wait for the training process to send a stop request or to end; then stop, too."""
    is_request = bool(os.read(0, 1))
    if not is_request:
        # Other ranks of the run may still be waiting for tokens.
        _write_error(
            error_descriptor,
            f"the training process that had {stream.entry} tokenized has ended",
        )
    stop.set()
    time.sleep(_GRACE_SECONDS)
    # The main thread hangs, for example in a read from the network.
    _remove_error_file(stream, error_descriptor)
    os._exit(0 if is_request else 1)


def produce(stream: TokenStream, needed: int, lookahead: int, stop: threading.Event) -> None:
    """Tokenize a stream as far as needed, once no other process does.

    Args:
        needed: number of tokens to produce.
        lookahead: tokens to produce beyond those that readers have requested.
        stop: set to end early.

    Raises:
        ValueError: a record cannot be used, there is no text, or the files have changed
            since the run started.
        OSError: a file cannot be read or written.
    """
    while not (stop.is_set() or stream.check_complete()):
        try:
            # Test the lock first: this is cheaper than building a tokenizer to find out.
            StagingDir(stream.prefix).release()
            sources = open_sources([stream.entry], STREAMING_FLAGS)
            if digest_of_sources(sources) != stream.inputs_digest:
                raise ValueError(
                    f"{stream.entry} has changed since this run started. Start the run again"
                )
            with PreprocessRun(stream.preprocess_config, chunk_bytes=_CHUNK_BYTES) as run:
                # Another process may have done the work in between.
                has_work = not stream.is_published and run.tokens < needed
                if has_work or run.published:
                    _tokenize(run, stream, needed, lookahead, stop)
            return
        except StagingDirLocked:
            stop.wait(_RETRY_SECONDS)


def _tokenize(
    run: PreprocessRun, stream: TokenStream, needed: int, lookahead: int, stop: threading.Event
) -> None:
    """Do the work of a run, committing at requests, and pause when far enough ahead."""
    committed = run.tokens
    for _ in run:
        while True:
            requested = stream.requested()
            produced = run.tokens
            ends = stop.is_set() or produced >= needed
            is_ahead = produced >= requested + lookahead
            reached_request = committed < requested <= produced
            if committed < produced and (ends or is_ahead or reached_request):
                run.commit()
                committed = produced
            if ends:
                return
            if not is_ahead:
                break
            stop.wait(_PAUSE_SECONDS)
    run.finish()
    stream.remove_request()
