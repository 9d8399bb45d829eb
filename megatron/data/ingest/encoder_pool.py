"""Encoding chunks in several processes, in order.

The result does not depend on the number of processes: the reader cuts the chunks, each
document is encoded independently, and a fast encoder that fails a comparison with its
reference is not used from that chunk on, whichever process found out.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron.data.ingest.encode import ChunkEncoder, EncodeConfig, EncodedChunk
from megatron.data.ingest.records import Chunk
from megatron.log import get_logger

_CHUNKS_PER_WORKER = 2  # encoded or waiting for their turn; bounds the memory
# Workers are started when this much input is left, or this much time has passed.
_START_WORKERS_BYTES = 64 << 20
_START_WORKERS_SECONDS = 2.0
_CGROUP_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Count the cores that this process may use: its CPU set, limited by its cgroup's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or "max", which means no quota
        quota, period = _CGROUP_CPU_QUOTA.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


class EncoderPool:
    """Encodes chunks in worker processes, and in this one while those start.

    Starting a worker takes half a second of a core, in which 80 MB of text could be encoded,
    so none is started for little input. The workers end when this context manager is left,
    and also when this process is killed.

    Args:
        config: how texts become tokens.
        workers: number of worker processes; 1: encode in this process only.

    Attributes:
        tokenizer: the tokenizer of this process.
        use_reference: whether the tokenizer's fast encoder is out of use.

    Raises:
        ValueError: files of the tokenizer or of the sentence splitter are missing or wrong.
    """

    def __init__(self, config: EncodeConfig, workers: int):
        self.config = config
        self.workers = workers
        self.use_reference = False
        self._encoder = ChunkEncoder(config)
        self.tokenizer = self._encoder.tokenizer
        self._executor: ProcessPoolExecutor | None = None
        self._first_worker: Future | None = None
        """done as soon as a worker is ready"""

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def map(self, chunks: Iterable[Chunk], total_bytes: int = 0) -> Iterator[EncodedChunk]:
        """Yield the result of each chunk, in order.

        Args:
            total_bytes: bytes of all chunks, which decide whether workers are worth
                starting; 0: unknown.

        Raises:
            ValueError: a chunk cannot be read, or a token id is outside the vocabulary.
            OSError: a worker process ended.
        """
        running: deque[tuple[Chunk, Future]] = deque()
        begin = time.monotonic()
        try:
            for chunk in chunks:
                elapsed = time.monotonic() - begin
                is_long = (
                    total_bytes >= _START_WORKERS_BYTES or elapsed >= _START_WORKERS_SECONDS
                )
                if is_long and self._first_worker is None and self.workers > 1:
                    self._first_worker = self._submit(None)
                if self._first_worker is None or not self._first_worker.done():
                    encoded = self._encoder.encode(chunk, self.use_reference)
                    yield self._check_difference(chunk, encoded)
                    continue
                running.append((chunk, self._submit(chunk)))
                if len(running) >= _CHUNKS_PER_WORKER * self.workers:
                    yield self._next_result(running)
            while running:
                yield self._next_result(running)
        finally:
            for _, future in running:
                future.cancel()

    def _submit(self, chunk: Chunk | None) -> Future:
        """Have a worker encode a chunk; None only waits until a worker is ready."""
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self.workers,
                multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self.config,),
            )
        # Workers inherit the blocked signal: Ctrl-C interrupts this process, which ends them.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _explain_broken_pool():
                return self._executor.submit(_encode_in_worker, chunk, self.use_reference)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _next_result(self, running: deque[tuple[Chunk, Future]]) -> EncodedChunk:
        chunk, future = running.popleft()
        with _explain_broken_pool():
            encoded = future.result()
        used_reference = self.use_reference
        encoded = self._check_difference(chunk, encoded)
        if self.use_reference and not used_reference:
            # Chunks that are being encoded were submitted with the faulty encoder.
            for i, (later_chunk, later_future) in enumerate(running):
                later_future.cancel()
                running[i] = (later_chunk, self._submit(later_chunk))
        return encoded

    def _check_difference(self, chunk: Chunk, encoded: EncodedChunk) -> EncodedChunk:
        """Return a chunk's result, redone with the reference if the fast encoder failed.

        After a failure the reference stays in use.
        """
        if not encoded.difference or self.use_reference:
            return encoded
        get_logger().warning("%s: %s", chunk.path, encoded.difference)
        self.use_reference = True
        return self._encoder.encode(chunk, use_reference=True)


@contextmanager
def _explain_broken_pool() -> Iterator[None]:
    """Turn the error of a pool that lost a worker into one that says what to do."""
    try:
        yield
    except BrokenProcessPool:
        raise OSError(
            "a worker process ended before its work was done (killed, or out of memory?). Run "
            "the program again, with fewer --workers if memory is short"
        ) from None


# Functions that run in a worker process

_worker_encoder: ChunkEncoder | None = None
"""the encoder of this worker process, which `_start_worker` builds"""


def _start_worker(config: EncodeConfig) -> None:
    global _worker_encoder
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    get_logger().setLevel(logging.ERROR)  # the parent process logs the warnings, once
    _worker_encoder = ChunkEncoder(config)


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk | None, use_reference: bool) -> EncodedChunk | None:
    if chunk is None:
        return None
    return _worker_encoder.encode(chunk, use_reference)
