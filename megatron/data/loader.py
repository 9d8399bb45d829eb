"""Micro-batches of one rank, in an order that does not depend on how many ranks there are.

Shape suffixes: B micro-batch size, S sequence length, W ranks, G global batch size.

Micro-step m of the run takes samples m*B*W to (m+1)*B*W, and rank r its r-th slice of B: an optimizer step of G
samples sees the same samples for any B and W that divide it.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from megatron.config.schema import DataConfig, require
from megatron.data.sampling.blend import Samples


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens_BS: Tensor
    """int64 input ids"""
    labels_BS: Tensor
    """int64 ids to predict: the tokens, one position on"""
    loss_mask_BS: Tensor
    """float32, 0 where there is no loss"""
    position_ids_BS: Tensor | None = None
    """int64 positions that start again after each end of document; None: 0 to S-1"""
    segments_BS: Tensor | None = None
    """int64 number of the token's document within the sample; no attention between documents. None: everywhere"""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: t.to(device) for name, t in tensors.items() if t is not None}
        )


def make_batch(samples_BS1: np.ndarray, data: DataConfig, eod: int | None) -> Batch:
    """Cut samples int64 [B, S+1] into inputs and labels, with what the options of `data` ask for.

    The end-of-document token belongs to the document it ends: it is the last of its segment, and the loss that
    `--eod-mask-loss` removes is that of predicting, from it, the first token of the next document.
    """
    tokens_BS, labels_BS = samples_BS1[:, :-1], samples_BS1[:, 1:]
    mask_BS = np.ones(tokens_BS.shape, np.float32)
    positions_BS = segments_BS = None
    if data.eod_mask_loss:
        mask_BS[tokens_BS == eod] = 0.0
    if data.reset_position_ids or data.reset_attention_mask:
        first_BS = np.zeros(
            tokens_BS.shape, np.int64
        )  # 1 where a document starts within the sample
        first_BS[:, 1:] = tokens_BS[:, :-1] == eod
        if data.reset_position_ids:
            index_S = np.arange(tokens_BS.shape[1])
            positions_BS = index_S - np.maximum.accumulate(first_BS * index_S, axis=1)
        if data.reset_attention_mask:
            segments_BS = np.cumsum(first_BS, axis=1)
    return Batch(
        *(
            None if a is None else torch.from_numpy(np.ascontiguousarray(a))
            for a in (tokens_BS, labels_BS, mask_BS, positions_BS, segments_BS)
        )
    )


class BatchLoader:
    """Iterator over this rank's micro-batches. Making one again with `consumed_samples` continues exactly there.

    Args:
        dataset: the samples: int64 [S+1] each.
        micro_batch_size: B.
        global_batch_size: G, a multiple of B * W.
        rank: this rank, among `world_size` = W.
        consumed_samples: samples that all ranks together have taken before.
        data: its options reset_position_ids, reset_attention_mask, eod_mask_loss and num_workers are used.
        eod: the end-of-document id; None: there is none, and the options that need it are refused.
        vocab_size: ids from here on are an error.

    Attributes:
        consumed_samples: samples that all ranks together have taken, counting the batch handed out last.

    Raises:
        ValueError: sizes do not divide; and, while iterating, less than a global batch is left or a token is outside
            the vocabulary.
        OSError: while iterating, a worker process ended.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        consumed_samples: int,
        data: DataConfig,
        eod: int | None,
        vocab_size: int,
    ):
        require(
            micro_batch_size > 0, "micro_batch_size", micro_batch_size, "a positive integer"
        )
        require(0 <= rank < world_size, "rank", rank, f"0 to {world_size - 1}")
        self._step = micro_batch_size * world_size
        require(
            global_batch_size > 0 and global_batch_size % self._step == 0,
            "global_batch_size",
            global_batch_size,
            f"a multiple of micro-batch size {micro_batch_size} x {world_size} ranks",
        )
        require(consumed_samples >= 0, "consumed_samples", consumed_samples, "0 or more")
        require(len(dataset) > 0, "length of the dataset", len(dataset), "1 or more")
        for flag in data.eod_flags:
            require(
                eod is not None,
                flag,
                True,
                "only with a tokenizer that has an end-of-document token",
            )
        self._size, self._global = len(dataset), global_batch_size
        self.consumed_samples = consumed_samples
        whole = max(0, self._size - consumed_samples) // global_batch_size * global_batch_size
        numbers = _Numbers(
            consumed_samples + rank * micro_batch_size,
            consumed_samples + whole,
            self._step,
            micro_batch_size,
        )
        # Workers inherit the mask, in all threads that they start: `_start_worker` says what for.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self._batches = iter(
                DataLoader(
                    _Reader(dataset, data, eod, vocab_size),
                    batch_size=None,
                    sampler=numbers,
                    num_workers=data.num_workers,
                    worker_init_fn=_start_worker,
                    generator=torch.Generator(),
                )
            )  # its own: drawing from the global one would change the model's run
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            self._check_workers(error)
            raise
        if batch is None:
            raise ValueError(
                f"the data ends: {max(0, self._size - self.consumed_samples)} of {self._size} samples "
                f"are left, an optimizer step takes {self._global}. Train for fewer steps, or build more "
                f"samples"
            )
        if isinstance(batch, Exception):
            try:
                raise batch
            finally:
                del (
                    batch
                )  # else error -> this frame -> error would keep the worker processes alive
        self.consumed_samples += self._step
        return batch

    def _check_workers(self, error: Exception) -> None:
        """Raise OSError if torch's error while it waited for a worker is that one has ended."""
        workers = getattr(self._batches, "_workers", ())
        try:
            if isinstance(
                error, (OSError, EOFError)
            ):  # a worker's end of a connection is closed before it is gone
                for worker in workers:
                    worker.join(1.0)
        except RuntimeError as later:  # torch's own, which comes at any time
            error = later
        if lost := worker_exited_error(error):
            raise lost from None
        for worker in workers:
            if code := worker.exitcode:
                how = (
                    f"was ended by signal {signal.strsignal(-code)}"
                    if code < 0
                    else f"ended with exit code {code}"
                )
                raise lost_process(worker.pid, how) from None


@dataclass(frozen=True)
class _Numbers:
    """The sampler that DataLoader asks for: lists of sample numbers, one per micro-batch of this rank."""

    start: int
    stop: int
    step: int
    micro: int

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.start, self.stop, self.step):
            yield [*range(first, first + self.micro)]


@dataclass(frozen=True)
class _Reader:
    """Sample numbers -> Batch; runs in the worker processes when there are any."""

    dataset: Samples
    data: DataConfig
    eod: int | None
    vocab_size: int

    def __getitem__(self, numbers: list[int]) -> Batch | Exception:
        """A worker hands back a user's error as a value: torch would bury its message under the worker's traceback."""
        try:
            samples_BS1 = np.stack([self.dataset[i] for i in numbers])
            self._check(samples_BS1, numbers)
            return make_batch(samples_BS1, self.data, self.eod)
        except (ValueError, OSError) as error:
            if get_worker_info() is None:
                raise
            return error

    def _check(self, samples_BS1: np.ndarray, numbers: list[int]) -> None:
        if samples_BS1.max() < self.vocab_size and samples_BS1.min() >= 0:
            return
        row, column = np.argwhere((samples_BS1 >= self.vocab_size) | (samples_BS1 < 0))[0]
        source = self.dataset.source(numbers[row])
        raise ValueError(
            f"{source} holds the token id {samples_BS1[row, column]}; allowed with this run's vocabulary: "
            f"0 to {self.vocab_size - 1}. Use the tokenizer that the data was made with, or preprocess "
            f"the text again with this one"
        )


def _start_worker(number: int) -> None:
    """In a worker: live through the signals that ask the training to stop, for it needs batches to end its step.

    They reach workers too: Ctrl-C is for all processes of a terminal, and DeepSpeed's launcher sends SIGTERM to all
    that a rank has started, and waits for all of them. So a worker ends when its rank says so, and after a SIGTERM of
    somebody else's as soon as its rank has ended.
    """
    signal.set_wakeup_fd(-1)  # the training's, if it had one when it forked this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_sigterm, args=(os.getppid(),), daemon=True).start()


def _wait_for_sigterm(rank: int) -> None:
    told = signal.sigwaitinfo({signal.SIGTERM})
    while os.getppid() == rank and (told is None or told.si_pid != rank):
        told = signal.sigtimedwait({signal.SIGTERM}, 0.05)
    os._exit(0)


def worker_exited_error(error: BaseException) -> OSError | None:
    """One line for torch's error when a worker process ended; None for any other error.

    torch raises it wherever the main thread is, in the middle of a step, too; while that waits for a batch, it makes
    the error the cause of another, which knows less.
    """
    text = f"{error.__cause__} {error}"
    if found := re.search(r"DataLoader worker \(pid (\d+)\) is killed by signal: (\w+)", text):
        return lost_process(found[1], f"was ended by signal {found[2]}")
    if found := re.search(
        r"DataLoader worker \(pid (\d+)\) exited unexpectedly with exit code (\d+)", text
    ):
        return lost_process(found[1], f"ended with exit code {found[2]}")
    if found := re.search(r"DataLoader worker \(pid\(s\) ([\d, ]+)\) exited", text):
        return lost_process(found[1], "ended")
    return None


def lost_process(process: int | str, how: str) -> OSError:
    return OSError(
        f"process {process}, which reads data for rank {os.environ.get('RANK', 0)}, {how}. If memory ran "
        "out, lower --num-workers; then resume from the last checkpoint"
    )
