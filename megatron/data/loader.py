"""Micro-batches of one data-parallel rank, in an order that does not depend on the number of ranks.

Shape suffixes: B micro-batch size, S sequence length, W ranks, G global batch size.

Micro-step m of the run takes samples m*B*W to (m+1)*B*W, and rank r takes the r-th slice of B of
them: an optimizer step of G samples sees the same samples for every B and W that divide it. The
order of the samples is the same for every G, too.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from megatron.config.batch_size import BatchSchedule
from megatron.config.fields import require
from megatron.config.schema import DataConfig
from megatron.data.sampling.blend import Samples

# Seconds until the exit code of a worker must be known after its connection was closed.
_EXIT_SECONDS = 30.0
_PARENT_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens_BS: Tensor
    """int64 input ids"""
    labels_BS: Tensor
    """int64 ids to predict: the tokens, shifted by one position"""
    loss_mask_BS: Tensor
    """float32, 0 where there is no loss"""
    position_ids_BS: Tensor | None = None
    """int64 positions that restart after each end of document; None: 0 to S-1"""
    segments_BS: Tensor | None = None
    """int64 number of the token's document within the sample; attention stays within a
    document. None: attention spans the sample"""
    padding_BS: Tensor | None = None
    """bool, True where a position is padding, which is neither routed nor a target. None: no
    padding, as in all samples of `make_batch`"""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: t.to(device) for name, t in tensors.items() if t is not None}
        return replace(self, **moved)


def make_batch(samples_BS1: np.ndarray, data: DataConfig, eod: int | None) -> Batch:
    """Cut samples, int64 [B, S+1], into inputs and labels, and apply the document options.

    The end-of-document token belongs to the document that it ends: it is the last of its
    segment, and `--eod-mask-loss` removes the loss of predicting from it the first token of the
    next document.

    Args:
        data: its options eod_mask_loss, reset_position_ids and reset_attention_mask are used.
        eod: the end-of-document id, which these options need.
    """
    tokens_BS = samples_BS1[:, :-1]
    labels_BS = samples_BS1[:, 1:]
    loss_mask_BS = np.ones(tokens_BS.shape, np.float32)
    if data.eod_mask_loss:
        loss_mask_BS[tokens_BS == eod] = 0.0
    positions_BS = None
    if data.reset_position_ids:
        index_S = np.arange(tokens_BS.shape[1])
        start_index_BS = _document_starts(tokens_BS, eod) * index_S
        positions_BS = index_S - np.maximum.accumulate(start_index_BS, axis=1)
    segments_BS = None
    if data.reset_attention_mask:
        segments_BS = np.cumsum(_document_starts(tokens_BS, eod), axis=1)
    return Batch(
        tokens_BS=_to_tensor(tokens_BS),
        labels_BS=_to_tensor(labels_BS),
        loss_mask_BS=_to_tensor(loss_mask_BS),
        position_ids_BS=_to_tensor(positions_BS),
        segments_BS=_to_tensor(segments_BS),
    )


def _document_starts(tokens_BS: np.ndarray, eod: int) -> np.ndarray:
    """Return int64 [B, S]: 1 where a document starts after another one within the sample."""
    starts_BS = np.zeros(tokens_BS.shape, np.int64)
    starts_BS[:, 1:] = tokens_BS[:, :-1] == eod
    return starts_BS


def _to_tensor(array: np.ndarray | None) -> Tensor | None:
    if array is None:
        return None
    return torch.from_numpy(np.ascontiguousarray(array))


@dataclass(frozen=True)
class DataParallelShard:
    """Share of one data-parallel rank in every global batch.

    Raises:
        ValueError: a size is not positive, the rank is out of range, or `global_batch_size` is
            not a multiple of `micro_batch_size * world_size`.
    """

    micro_batch_size: int
    """B, samples of a micro-batch on one rank"""
    global_batch_size: int
    """G, samples of an optimizer step over all ranks; the largest one during a ramp-up"""
    rank: int = 0
    """Number of this rank, from 0 on"""
    world_size: int = 1
    """W, number of ranks"""
    rampup: BatchSchedule | None = None
    """Samples of each optimizer step; None: always G"""

    def __post_init__(self):
        require(
            self.micro_batch_size > 0,
            "micro_batch_size",
            self.micro_batch_size,
            "a positive integer",
        )
        require(
            0 <= self.rank < self.world_size, "rank", self.rank, f"0 to {self.world_size - 1}"
        )
        require(
            self.global_batch_size > 0 and self.global_batch_size % self.micro_step_size == 0,
            "global_batch_size",
            self.global_batch_size,
            f"a multiple of micro-batch size {self.micro_batch_size} x {self.world_size} ranks",
        )

    @property
    def micro_step_size(self) -> int:
        """Samples that all ranks together take in one micro-step, B * W."""
        return self.micro_batch_size * self.world_size

    def step_size(self, consumed_samples: int) -> int:
        """Return the samples of the optimizer step that follows this many consumed samples."""
        if self.rampup is None:
            return self.global_batch_size
        return self.rampup.at(consumed_samples)


class BatchLoader:
    """Iterator over the micro-batches of one rank.

    Iteration ends with a ValueError when less than a global batch is left. A loader created with
    the `consumed_samples` of another one continues exactly where that one stopped.

    Args:
        dataset: the samples, int64 [S+1] each.
        shard: batch sizes and the rank.
        consumed_samples: number of samples that all ranks together have taken before.
        data: its options reset_position_ids, reset_attention_mask, eod_mask_loss and num_workers
            are used.
        eod: the end-of-document id; None: there is none, and options that need it are refused.
        vocab_size: token ids from here on are an error.

    Attributes:
        consumed_samples: number of samples that all ranks together have taken, the last batch
            returned included.

    Raises:
        ValueError: an argument is out of range; while iterating, less than a global batch is
            left or a token is outside the vocabulary.
        OSError: while iterating, a worker process ended.
    """

    def __init__(
        self,
        dataset: Samples,
        shard: DataParallelShard,
        *,
        consumed_samples: int = 0,
        data: DataConfig,
        eod: int | None,
        vocab_size: int,
    ):
        require(consumed_samples >= 0, "consumed_samples", consumed_samples, "0 or more")
        require(len(dataset) > 0, "length of the dataset", len(dataset), "1 or more")
        for flag in data.eod_flags:
            require(
                eod is not None,
                flag,
                True,
                "only with a tokenizer that has an end-of-document token",
            )
        self.consumed_samples = consumed_samples
        self._shard = shard
        self._num_samples = len(dataset)
        self._batches = _start_reading(
            _BatchDataset(dataset, data, eod, vocab_size),
            _MicroBatchSampler(shard, consumed_samples, len(dataset)),
            data.num_workers,
        )

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            workers = getattr(self._batches, "_workers", ())
            exited = worker_exited_error(error, workers)
            if exited is not None:
                raise exited from None
            raise
        if batch is None:
            left = max(0, self._num_samples - self.consumed_samples)
            raise ValueError(
                f"the data ends: {left} of {self._num_samples} samples are left, an optimizer "
                f"step takes {self._shard.step_size(self.consumed_samples)}. Train for fewer "
                f"steps, or build more samples"
            )
        if isinstance(batch, Exception):
            try:
                raise batch
            finally:
                # The cycle error -> this frame -> error would keep the worker processes alive.
                del batch
        self.consumed_samples += self._shard.micro_step_size
        return batch


def _start_reading(
    batches: _BatchDataset, sampler: _MicroBatchSampler, num_workers: int
) -> Iterator[Batch | Exception]:
    """Start torch's loader, and its worker processes if there are any."""
    if num_workers and not hasattr(sys.unraisablehook, "hides_ended_workers"):
        sys.unraisablehook = _hide_ended_workers(sys.unraisablehook)
    # Workers inherit the signal mask, in all threads that they start: see `_start_worker`.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            worker_init_fn=_start_worker,
            # Drawing seeds from the global generator would change the random state of the model.
            generator=torch.Generator(),
        )
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(frozen=True)
class _MicroBatchSampler:
    """Sampler that yields the sample numbers of each micro-batch of one rank."""

    shard: DataParallelShard
    consumed_samples: int
    num_samples: int

    def __iter__(self) -> Iterator[list[int]]:
        size = self.shard.micro_batch_size
        offset = self.shard.rank * size
        start = self.consumed_samples
        stop = start + self.shard.step_size(start)
        while stop <= self.num_samples:
            for first in range(start + offset, stop, self.shard.micro_step_size):
                yield list(range(first, first + size))
            start = stop
            stop = start + self.shard.step_size(start)


@dataclass(frozen=True)
class _BatchDataset:
    """Dataset whose items are micro-batches; runs in the worker processes if there are any."""

    dataset: Samples
    data: DataConfig
    eod: int | None
    vocab_size: int

    def __getitem__(self, numbers: list[int]) -> Batch | Exception:
        """Return the micro-batch of these samples.

        A worker returns a user's error as a value: if it was raised, torch would bury its
        message under the traceback of the worker.
        """
        try:
            samples_BS1 = np.stack([self.dataset[i] for i in numbers])
            self._check_ids(samples_BS1, numbers)
            return make_batch(samples_BS1, self.data, self.eod)
        except (ValueError, OSError) as error:
            if get_worker_info() is None:
                raise
            return error

    def _check_ids(self, samples_BS1: np.ndarray, numbers: list[int]) -> None:
        if samples_BS1.max() < self.vocab_size and samples_BS1.min() >= 0:
            return
        row, column = np.argwhere((samples_BS1 >= self.vocab_size) | (samples_BS1 < 0))[0]
        source = self.dataset.source(numbers[row])
        raise ValueError(
            f"{source} holds the token id {samples_BS1[row, column]}; allowed with this run's "
            f"vocabulary: 0 to {self.vocab_size - 1}. Use the tokenizer that the data was made "
            f"with, or preprocess the text again with this one"
        )


def _start_worker(number: int) -> None:
    """Make a worker survive the signals that stop the training, which still needs batches.

    These signals reach workers too: Ctrl-C is sent to all processes of a terminal, and
    DeepSpeed's launcher sends SIGTERM to all processes started by a rank and waits for them. So
    a worker ignores SIGINT, and exits after a SIGTERM of its rank, or after a SIGTERM of another
    process as soon as its rank has exited.
    """
    signal.set_wakeup_fd(-1)  # inherited from the training process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after_sigterm, args=(os.getppid(),), daemon=True).start()


def _exit_after_sigterm(rank_pid: int) -> None:
    received = signal.sigwaitinfo({signal.SIGTERM})
    while os.getppid() == rank_pid and (received is None or received.si_pid != rank_pid):
        received = signal.sigtimedwait({signal.SIGTERM}, _PARENT_POLL_SECONDS)
    os._exit(0)


# torch's messages about a worker that ended; the last one lacks the signal and the exit code.
_KILLED = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([^.]+)\.")
_EXITED = re.compile(
    r"DataLoader worker \(pid (\d+)\) exited unexpectedly with exit code (\d+)"
)
_ENDED = re.compile(r"DataLoader worker \(pid\(s\) ([\d, ]+)\) exited")


def _hide_ended_workers(report: Callable) -> Callable:
    """Return a `sys.unraisablehook` that does not report the end of a worker process.

    torch's SIGCHLD handler raises it wherever the main thread is. In a destructor Python prints
    it with a traceback and continues, although nothing is lost: reading the next batch raises
    it again.

    Args:
        report: the hook for all other errors.
    """

    def hook(unraisable: Any) -> None:
        text = str(unraisable.exc_value)
        if not (_KILLED.search(text) or _EXITED.search(text)):
            report(unraisable)

    hook.hides_ended_workers = True
    return hook


def worker_exited_error(
    error: BaseException, workers: Sequence[BaseProcess] = ()
) -> OSError | None:
    """Return a one-line error if `error` is a consequence of the end of a worker process.

    torch's SIGCHLD handler raises a RuntimeError with the signal or the exit code wherever the
    main thread is, also in the middle of a training step. While the main thread waits for a
    batch, torch may notice the end in other ways: an OSError of a closed connection, possibly
    before the process has an exit code, or a check for live processes, which reaps the process
    before the handler could read its status. The exit code then comes from `workers`.

    Args:
        workers: worker processes of the loader that raised `error`. If it does not name the
            signal or the exit code, this function waits for one of them to exit.

    Returns:
        None if no worker ended.
    """
    # torch makes the handler's error the cause of a later one without the exit code.
    text = f"{error.__cause__} {error}"
    if found := _KILLED.search(text):
        return _worker_error(found[1], f"was ended by signal {found[2]}")
    if found := _EXITED.search(text):
        return _worker_error(found[1], f"ended with exit code {found[2]}")
    ended = _ENDED.search(text)
    if ended or isinstance(error, (OSError, EOFError)):
        try:
            failed = _wait_for_failed_worker(workers)
        except RuntimeError as later:  # torch's SIGCHLD handler
            return worker_exited_error(later)
        if failed is not None:
            return _worker_error(failed.pid, _describe_exit(failed.exitcode))
    if ended:
        return _worker_error(ended[1], "ended")
    return None


def _wait_for_failed_worker(workers: Sequence[BaseProcess]) -> BaseProcess | None:
    """Wait until a worker exits. Return one with a non-zero exit code, if there is any."""
    if not workers:
        return None
    exited = connection.wait([worker.sentinel for worker in workers], _EXIT_SECONDS)
    for worker in workers:
        if worker.sentinel in exited:
            worker.join(_EXIT_SECONDS)
    return next((worker for worker in workers if worker.exitcode), None)


def _describe_exit(exit_code: int) -> str:
    if exit_code < 0:
        return f"was ended by signal {signal.strsignal(-exit_code)}"
    return f"ended with exit code {exit_code}"


def _worker_error(pid: int | str, outcome: str) -> OSError:
    return OSError(
        f"process {pid}, which reads data for rank {os.environ.get('RANK', 0)}, {outcome}. If "
        f"memory ran out, lower --num-workers; then resume from the last checkpoint"
    )
