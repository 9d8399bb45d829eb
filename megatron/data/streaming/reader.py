"""Reading samples from streams whose tokens are still being produced.

Shape suffixes: S sequence length, T tokens of one epoch, N samples, W samples of a shuffle
window.

Sample k of a stream, before shuffling, is its tokens k*S to k*S+S. The order of the W
samples of a window is drawn from the seed and the number of the window. So the order
depends on nothing that can change when a run is restarted, and a sample needs no token
beyond its window.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import weakref
from contextlib import suppress

import numpy as np

from megatron.config.fields import require
from megatron.data.indexed.reader import IndexedDataset, dtype_for_vocab
from megatron.data.ingest.run_state import STATE_FILE
from megatron.data.streaming.producer import start_producer, stop_producer
from megatron.data.streaming.stream import TokenStream
from megatron.io.mapped_file import map_file
from megatron.io.staging_dir import lock_holder
from megatron.log import get_logger

_LOOKAHEAD_TOKENS = 64 << 20
"""tokens produced before a reader requests them: limits the wasted work of a run that ends
early"""
_POLL_SECONDS = 0.02
_FIRST_MESSAGE_SECONDS = 5.0  # a reader waits this long before it logs what it waits for
_NEXT_MESSAGE_SECONDS = 60.0


class StreamSamples:
    """Samples of a stream: `samples[i]` is int64 [S + 1], and waits until it can be read.

    Args:
        stream: the source.
        vocab_size: vocabulary size of the tokenizer.
        seq_length: S.
        num_samples: N.
        seed: seed of the order within the windows.
        window: W; 1 keeps the order of the files.

    Raises:
        ValueError: from `[i]`: the producer stopped before the tokens were available, or
            the text is shorter than S + 1 tokens.
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
        sizes = {"seq_length": seq_length, "num_samples": num_samples, "window": window}
        for name, value in sizes.items():
            require(value > 0, name, value, "a positive integer")
        self._arguments = (stream, vocab_size, seq_length, num_samples, seed, window)
        self._stream = stream
        self._seq_length = seq_length
        self._num_samples = num_samples
        self._seed = seed
        self._window_size = window
        self._tokens = GrowingTokens(stream, dtype_for_vocab(vocab_size))
        self._window = -1
        """number of the window that `_order` belongs to"""
        self._order = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int) -> np.ndarray:
        """Read sample i, int64 [S + 1]. Raises IndexError beyond the end."""
        if not 0 <= i < len(self):
            raise IndexError(
                f"sample {i} of {self._stream.entry}: allowed 0 to {len(self) - 1}"
            )
        window, position = divmod(i, self._window_size)
        if window != self._window:
            # RandomState, because numpy guarantees that its streams do not change.
            random = np.random.RandomState([self._seed % 2**32, window])
            self._order = random.permutation(self._window_size)
            self._window = window
        number = window * self._window_size + int(self._order[position])
        start = number * self._seq_length
        length = self._seq_length + 1
        sample = self._tokens.read(start, start + length, self._window_end(window))
        total = self._tokens.total
        if total is not None and total < length:
            raise ValueError(
                f"{self._stream.entry} has {total} tokens; one sample takes {length}. Give "
                f"more text or a smaller --seq-length"
            )
        return sample

    def __reduce__(self) -> tuple:
        """Pickle the arguments only: a copy in another process starts no producer."""
        return StreamSamples, self._arguments

    def source(self, i: int) -> str:
        """Return the source of sample i, for messages."""
        return self._stream.entry

    @property
    def tokens_needed(self) -> int:
        """Tokens up to the end of the last window, any of which its samples may need."""
        return self._window_end((self._num_samples - 1) // self._window_size)

    def start(self, lookahead: int = _LOOKAHEAD_TOKENS) -> None:
        """Start a process that produces the missing tokens, if there are any.

        It ends when its work is done, or when this object is garbage collected.

        Args:
            lookahead: tokens to produce beyond those that readers have requested.

        Raises:
            OSError: the cache cannot be written.
        """
        stream = self._stream
        needed = self.tokens_needed
        cached = self._tokens.refresh()
        logger = get_logger()
        if self._tokens.total is not None:
            logger.info(
                "%s: all its %d tokens are in %s", stream.entry, cached, stream.pair_prefix
            )
            return
        if cached >= needed:
            logger.info(
                "%s: %d tokens are in %s; this run needs %d",
                stream.entry,
                cached,
                stream.staging_path,
                needed,
            )
            return
        logger.info(
            "%s: %d tokens are in %s; this run needs %d. A background process produces the "
            "others, or as many as there are",
            stream.entry,
            cached,
            stream.staging_path,
            needed,
        )
        lookahead = max(lookahead, 2 * self._window_size * self._seq_length)
        process = start_producer(stream, needed, lookahead)
        weakref.finalize(self, stop_producer, process, os.getpid())

    def _window_end(self, window: int) -> int:
        """Number of tokens that the samples of the windows up to this one need."""
        return (window + 1) * self._window_size * self._seq_length + 1


class GrowingTokens:
    """The durable tokens of a stream, memory-mapped. Their number grows.

    Args:
        stream: the source.
        dtype: integer type of the stored tokens.

    Attributes:
        total: T, once the source has been read to its end; None before that.
    """

    def __init__(self, stream: TokenStream, dtype: np.dtype):
        self.total: int | None = None
        self._stream = stream
        self._dtype = dtype.newbyteorder("<")
        self._tokens = np.empty(0, dtype)
        self._state_version: tuple[int, int] | None = None
        """inode and modification time of the `state.json` that was read last"""
        self._requested = 0
        self._producer_seen = os.path.exists(stream.error_file)
        """whether a producer of this run has been running"""

    def read(self, start: int, stop: int, needed: int) -> np.ndarray:
        """Read int64 tokens [start, stop) of the repeated stream; wait until they exist.

        Args:
            needed: number of tokens to request from the producer.

        Raises:
            ValueError: the producer stopped before they were available.
        """
        if self.total is None and needed > self._requested:
            self._requested = needed
            if self.refresh() < needed and self.total is None:
                self._stream.request(needed)
        if self.total is None and len(self._tokens) < stop:
            self._wait(stop, needed)
        if not len(self._tokens):
            return np.empty(0, np.int64)
        return self._tokens.take(np.arange(start, stop), mode="wrap").astype(np.int64)

    def refresh(self) -> int:
        """Map tokens that have been added, and return the number of tokens."""
        if self._stream.check_complete():
            self._tokens = IndexedDataset(self._stream.pair_prefix).tokens
            self.total = len(self._tokens)
            return self.total
        # A state that is corrupt, or whose data file is missing or too short, is about to be
        # replaced, by the finished pair or by a new start.
        with suppress(FileNotFoundError, ValueError):
            self._map_committed()
        return len(self._tokens)

    def _map_committed(self) -> None:
        folder = self._stream.staging_path
        with open(os.path.join(folder, STATE_FILE), encoding="utf-8") as file:
            stat = os.fstat(file.fileno())
            version = (stat.st_ino, stat.st_mtime_ns)
            if version == self._state_version:
                return
            self._state_version = version
            tokens = self._committed_tokens(file.read())
        if tokens > len(self._tokens):
            name = os.path.basename(self._stream.pair_prefix) + ".bin"
            mapped = map_file(os.path.join(folder, name))
            size = tokens * self._dtype.itemsize
            if len(mapped) < size:
                raise ValueError(f"{name} has {len(mapped)} bytes; its state counts {size}")
            self._tokens = mapped[:size].view(self._dtype)

    def _committed_tokens(self, state: str) -> int:
        """Return the number of durable tokens; ValueError if the state is corrupt."""
        try:
            # A state that is being published has no such entry.
            tokens = json.loads(state)["writers"][self._stream.key].get("tokens", 0)
        except (KeyError, TypeError, AttributeError, RecursionError):
            tokens = None
        if type(tokens) is not int:
            raise ValueError(f"the state of {self._stream.staging_path} is corrupt")
        return tokens

    def _wait(self, stop: int, needed: int) -> None:
        """Wait until there are `stop` tokens, or all.

        Raises:
            ValueError: the producer stopped before that.
        """
        stream = self._stream
        message_at = time.monotonic() + _FIRST_MESSAGE_SECONDS
        # In a worker process that reads ahead: the training process.
        trainer = multiprocessing.parent_process()
        while True:
            # Checked before the tokens: it is removed after the last of them is published.
            producer_exists = os.path.exists(stream.error_file)
            if self.refresh() >= stop or self.total is not None:
                return
            error = stream.read_error()
            if error:
                raise ValueError(error)
            producer_left = self._producer_seen and not producer_exists
            trainer_died = trainer is not None and not trainer.is_alive()
            if trainer_died or (producer_left and not stream.is_published):
                raise ValueError(
                    f"the training process that had {stream.entry} tokenized has ended"
                )
            self._producer_seen = producer_exists
            stream.request(needed)
            if time.monotonic() >= message_at:
                message_at += _NEXT_MESSAGE_SECONDS
                get_logger().info(
                    "waiting for %s: %d tokens are available, the next sample ends with token "
                    "%d; the others are produced by %s",
                    stream.entry,
                    len(self._tokens),
                    stop,
                    lock_holder(stream.prefix) or "no process yet",
                )
            time.sleep(_POLL_SECONDS)
