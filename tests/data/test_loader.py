"""Tests of the batch loader.

The document options against a loop per token; the order of samples over ranks and batch sizes;
worker processes, resuming and errors.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.batch_size import BatchSchedule
from megatron.config.schema import DataConfig
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import IndexedWriter
from megatron.data.loader import (
    Batch,
    BatchLoader,
    DataParallelShard,
    make_batch,
    worker_exited_error,
)
from megatron.data.sampling.sample_index import SampleIndex

EOD = 0
OPTIONS = DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
EXIT_SECONDS = 60.0
FATAL_SAMPLE = 40  # a worker process that reads this sample exits


class NumberedSamples:
    """Dataset whose sample i is i * 10 + [0, 1, 2, 3]."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> np.ndarray:
        if i == FATAL_SAMPLE and multiprocessing.parent_process() is not None:
            os._exit(3)
        if i >= self.size:
            raise IndexError(i)
        return np.arange(4) + 10 * i

    def source(self, i: int) -> str:
        return f"prefix{i % 2}"


def loader(
    dataset=None,
    *,
    micro: int = 2,
    size: int = 8,
    rank: int = 0,
    world: int = 1,
    consumed: int = 0,
    data: DataConfig | None = None,
    eod: int | None = EOD,
    vocab: int = 10**6,
    **options,
) -> BatchLoader:
    dataset = NumberedSamples(40) if dataset is None else dataset
    return BatchLoader(
        dataset,
        DataParallelShard(micro, size, rank, world),
        consumed_samples=consumed,
        data=data or DataConfig(),
        eod=eod,
        vocab_size=vocab,
        **options,
    )


def take(batches: BatchLoader, count: int) -> list[int]:
    """Return the sample numbers of the next `count` micro-batches."""
    return [int(t) // 10 for _ in range(count) for t in next(batches).tokens_BS[:, 0]]


def steps(world: int, micro: int, count: int, **options) -> list[list[int]]:
    """Return the samples of each optimizer step, ordered by micro-step, then by rank."""
    ranks = [loader(rank=r, world=world, micro=micro, **options) for r in range(world)]
    return [
        [i for _ in range(8 // (world * micro)) for r in ranks for i in take(r, 1)]
        for _ in range(count)
    ]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_document_options_match_token_loop(samples, positions, segments, mask):
    data = DataConfig(
        reset_position_ids=positions, reset_attention_mask=segments, eod_mask_loss=mask
    )
    b = make_batch(np.array(samples), data, EOD)
    assert b.tokens_BS.tolist() == [s[:-1] for s in samples]
    assert b.labels_BS.tolist() == [s[1:] for s in samples]
    for row, sample in enumerate(samples):
        position = segment = 0
        for i, token in enumerate(sample[:-1]):
            assert b.loss_mask_BS[row, i] == (0 if mask and token == EOD else 1)
            assert not positions or b.position_ids_BS[row, i] == position
            assert not segments or b.segments_BS[row, i] == segment
            position, segment = (0, segment + 1) if token == EOD else (position + 1, segment)
    assert (b.position_ids_BS is None) == (not positions)
    assert (b.segments_BS is None) == (not segments)


def test_batch_dtypes_and_device():
    for data in (OPTIONS, DataConfig()):
        b = next(loader(data=data))
        moved = b.to("meta")
        for name, t in vars(b).items():
            if t is None:
                assert data is not OPTIONS or name == "padding_BS"
                assert getattr(moved, name) is None
                continue
            assert t.dtype == (torch.float32 if name == "loss_mask_BS" else torch.int64)
            assert t.shape == (2, 3)
            assert t.is_contiguous()
            assert getattr(moved, name).device.type == "meta"
    assert isinstance(moved, Batch)


@pytest.mark.parametrize(
    ("world", "micro"), [(1, 1), (1, 2), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
)
def test_step_samples_independent_of_ranks(world, micro):
    """An optimizer step takes the same samples for any number of ranks and micro-batch size."""
    assert steps(world, micro, 4) == [[*range(8 * n, 8 * n + 8)] for n in range(4)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 4), (4, 1)])
def test_resume_continues_with_next_sample(world, micro, workers):
    data = DataConfig(num_workers=workers)
    uninterrupted = steps(world, micro, 4)
    assert steps(world, micro, 2, consumed=16, data=data) == uninterrupted[2:]


RAMPUP = BatchSchedule(final=8, start=4, increment=4, ramp_samples=10)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_rampup_keeps_order_of_samples(world, micro, workers):
    """Steps of 4, 4, 4, 8, ... samples take consecutive ones, also resumed within the ramp-up."""
    dataset = NumberedSamples(39)
    data = DataConfig(num_workers=workers)
    for start, expected in ((0, range(36)), (8, range(8, 36))):
        shards = [DataParallelShard(micro, 8, rank, world, RAMPUP) for rank in range(world)]
        ranks = [
            BatchLoader(
                dataset, shard, consumed_samples=start, data=data, eod=EOD, vocab_size=10**6
            )
            for shard in shards
        ]
        taken = []
        for _ in range(len(expected) // (world * micro)):
            taken += [i for rank in ranks for i in take(rank, 1)]
        assert taken == [*expected]
        with pytest.raises(
            ValueError, match="3 of 39 samples are left, an optimizer step takes 8"
        ):
            next(ranks[0])


def test_consumed_samples_counts_all_ranks():
    batches = loader(rank=1, world=2, consumed=8)
    assert batches.consumed_samples == 8
    take(batches, 3)
    assert batches.consumed_samples == 8 + 3 * 4
    resumed = loader(rank=1, world=2, consumed=batches.consumed_samples)
    assert take(resumed, 1) == take(batches, 1) == [22, 23]


def test_workers_return_the_same_batches(tmp_path):
    """Batches do not depend on the number of workers, and torch's random state is unchanged."""
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        for n in range(30):
            writer.add_document([*range(1, 3 + n % 7), EOD])
    samples = SampleIndex(
        IndexedDataset(tmp_path / "d"), None, 6, 40, 1, cache_dir=str(tmp_path)
    )
    torch.manual_seed(5)
    state = torch.get_rng_state()
    several = [
        loader(samples, data=DataConfig(**{**vars(OPTIONS), "num_workers": n}))
        for n in (0, 1, 2)
    ]
    for batches in zip(*several):
        for name in vars(batches[0]):
            first, *others = [getattr(batch, name) for batch in batches]
            if first is None:
                assert name == "padding_BS" and others == [None, None]
                continue
            assert all(torch.equal(first, other) for other in others)
        if several[0].consumed_samples == 40:
            break
    assert several[0].consumed_samples == 40
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_end_of_data_raises_value_error(workers):
    batches = loader(NumberedSamples(21), data=DataConfig(num_workers=workers))
    assert take(batches, 8) == [*range(16)]
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match="the data ends: 5 of 21 samples are left, an optimizer step takes 8",
        ):
            next(batches)
    with pytest.raises(ValueError, match="the data ends: 0 of 21"):
        next(loader(NumberedSamples(21), consumed=32))


@pytest.mark.parametrize("workers", [0, 2])
def test_token_outside_vocabulary_names_dataset(workers):
    batches = loader(vocab=31, data=DataConfig(num_workers=workers))
    assert take(batches, 1) == [0, 1]
    with pytest.raises(
        ValueError,
        match=r"^prefix1 holds the token id 31; allowed with this run's vocabulary: 0 "
        r"to 30\. Use the tokenizer[^\n]*$",
    ):
        next(batches)

    class Negative(NumberedSamples):
        def __getitem__(self, i: int) -> np.ndarray:
            return np.array([1, -7, 2, 3])

    with pytest.raises(ValueError, match="prefix0 holds the token id -7"):
        next(loader(Negative(8)))


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
@pytest.mark.parametrize("workers", [0, 1])
def test_dataset_error_reaches_caller(kind, workers):
    class Broken(NumberedSamples):
        def __getitem__(self, i: int) -> np.ndarray:
            raise kind("d.bin")

    with pytest.raises(kind, match="d.bin") as info:
        next(loader(Broken(8), data=DataConfig(num_workers=workers)))
    # torch leaves a cycle through the traceback, which would delay the exit of the workers.
    info.value.__traceback__ = None


def test_worker_exit_code_is_reported():
    batches = loader(NumberedSamples(48), consumed=FATAL_SAMPLE, data=DataConfig(num_workers=1))
    with pytest.raises(
        OSError,
        match=r"process \d+, which reads data for rank 0, ended with exit code 3\. If memory "
        "ran out, lower --num-workers",
    ):
        next(batches)


def test_worker_traceback_is_kept():
    """Errors other than a user's keep the traceback of the worker."""

    class Broken(NumberedSamples):
        def __getitem__(self, i: int) -> np.ndarray:
            raise KeyError("d.bin")

    with pytest.raises(KeyError, match="(?s)Original Traceback.*in __getitem__.*d.bin") as info:
        next(loader(Broken(8), data=DataConfig(num_workers=1)))
    info.value.__traceback__ = None


def send_from_other_process(number: int, process: int) -> None:
    """Send a signal from another process than this one, as the launcher does."""
    subprocess.run(["kill", f"-{number}", str(process)], check=True)


def wait_for_exit(pidfd: int) -> bool:
    """Return whether the process exits within a generous limit."""
    return bool(select.select([pidfd], [], [], EXIT_SECONDS)[0])


def test_worker_survives_stop_signals():
    """Signals that stop the training do not end a worker; SIGTERM of its own rank does."""
    batches = loader(NumberedSamples(10000), consumed=48, data=DataConfig(num_workers=1))
    # SIGTERM is blocked in the worker only.
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    worker = batches._batches._workers[0].pid
    take(batches, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        send_from_other_process(number, worker)
    assert take(batches, 10) == list(range(50, 70))
    os.kill(worker, signal.SIGTERM)
    assert wait_for_exit(os.pidfd_open(worker))


NAMED_SIGNAL = (
    r"process {}, which reads data for rank 0, was ended by signal (Killed|Segmentation)"
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_worker_names_its_signal(number):
    batches = loader(NumberedSamples(10000), consumed=48, data=DataConfig(num_workers=1))
    worker = batches._batches._workers[0].pid
    take(batches, 1)
    os.kill(worker, number)
    with pytest.raises(OSError, match=NAMED_SIGNAL.format(worker)):
        take(batches, 1000)


class FailingBatches:
    """Stand-in for torch's iterator, whose only worker kills itself when a batch is read.

    Args:
        error: raised to the reader.
        reaped: whether the worker's exit status is read before that.
    """

    def __init__(self, error: Exception, reaped: bool):
        self._error = error
        self._reaped = reaped
        self._start, child_end = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.worker = context.Process(target=_kill_itself, args=(child_end,))
        self.worker.start()
        self._workers = [self.worker]

    def __next__(self) -> Batch:
        self._start.send(None)
        if self._reaped:
            self.worker.join()
            assert not self.worker.is_alive()
        raise self._error


def _kill_itself(start) -> None:
    start.recv()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_late_exit_status_is_awaited(error):
    """The connection of a dying worker closes before the process has an exit status."""
    batches = loader()
    batches._batches = FailingBatches(error, reaped=False)
    with pytest.raises(OSError, match=NAMED_SIGNAL.format(batches._batches.worker.pid)):
        next(batches)


def test_reaped_worker_names_its_signal():
    """torch's check for live workers may read the exit status before its SIGCHLD handler does.

    Its message then names neither the signal nor the exit code.
    """
    batches = loader()
    batches._batches = FailingBatches(RuntimeError(), reaped=True)
    pid = batches._batches.worker.pid
    batches._batches._error = RuntimeError(
        f"DataLoader worker (pid(s) {pid}) exited unexpectedly"
    )
    with pytest.raises(OSError, match=NAMED_SIGNAL.format(pid)):
        next(batches)


def test_worker_error_of_other_loader():
    """torch's SIGCHLD handler raises for the workers of every loader, wherever a rank is."""
    killed = RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"
    )
    assert "process 7, which reads data for rank 0, was ended by signal Bus error. If" in str(
        worker_exited_error(killed)
    )
    exited = RuntimeError(
        "DataLoader worker (pid 7) exited unexpectedly with exit code 3. Details"
    )
    assert "process 7, which reads data for rank 0, ended with exit code 3. If" in str(
        worker_exited_error(exited)
    )
    unknown = RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")
    assert "process 7, 8, which reads data for rank 0, ended. If" in str(
        worker_exited_error(unknown)
    )
    for other in (RuntimeError("x"), OSError("x"), EOFError()):
        assert worker_exited_error(other) is None


def _exit_without_worker_shutdown(pipe) -> None:
    batches = loader(NumberedSamples(10000), consumed=48, data=DataConfig(num_workers=1))
    take(batches, 1)
    pipe.send(batches._batches._workers[0].pid)
    pipe.recv()
    os._exit(0)


def test_signalled_worker_exits_with_rank():
    """A worker that received SIGTERM from another process exits when its rank does.

    torch's own workers would notice only every five seconds, and the launcher waits for them.
    """
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    rank = context.Process(target=_exit_without_worker_shutdown, args=(theirs,))
    rank.start()
    worker = ours.recv()
    handle = os.pidfd_open(worker)
    send_from_other_process(signal.SIGTERM, worker)
    ours.send(None)
    assert wait_for_exit(handle)
    rank.join()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"micro": 0}, "micro_batch_size is 0"),
        (
            {"size": 7},
            "global_batch_size is 7; allowed: a multiple of micro-batch size 2 x 1 ranks",
        ),
        ({"size": 0}, "global_batch_size is 0"),
        ({"rank": 2, "world": 2}, "rank is 2; allowed: 0 to 1"),
        ({"consumed": -1}, "consumed_samples is -1"),
        ({"dataset": NumberedSamples(0)}, "length of the dataset is 0"),
        (
            {"eod": None, "data": DataConfig(reset_position_ids=True)},
            "--reset-position-ids is True",
        ),
        (
            {"eod": None, "data": DataConfig(reset_attention_mask=True)},
            "--reset-attention-mask is True",
        ),
        (
            {"eod": None, "data": DataConfig(eod_mask_loss=True)},
            "--eod-mask-loss is True; allowed: only with a tokenizer",
        ),
    ],
)
def test_invalid_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        loader(**options)
    assert loader(eod=None) is not None


def test_end_of_a_worker_is_not_reported_from_destructors(monkeypatch):
    """torch's signal handler may raise there; another error of a destructor is reported as ever."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable))
    batches = loader(data=DataConfig(num_workers=1))
    next(batches)

    class Raising:
        def __init__(self, text):
            self.text = text

        def __del__(self):
            raise RuntimeError(self.text)

    Raising("DataLoader worker (pid 7) is killed by signal: Killed. ")
    Raising("DataLoader worker (pid 7) exited unexpectedly with exit code 3. ")
    assert reported == []
    Raising("another error")
    (unraisable,) = reported
    assert str(unraisable.exc_value) == "another error"
