"""Micro-batches: the options against a loop per token, the order over ranks and sizes, workers, resuming, errors."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.schema import DataConfig
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import IndexedWriter
from megatron.data.loader import Batch, BatchLoader, DataParallelShard, make_batch
from megatron.data.sampling.sample_index import SampleIndex

EOD = 0
OPTIONS = DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
BOMB = 40  # a token that ends the process which reads it


class Numbers:
    """Sample i is i * 10 + [0, 1, 2, 3]."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> np.ndarray:
        if i == BOMB and multiprocessing.parent_process() is not None:
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
    dataset = Numbers(40) if dataset is None else dataset
    return BatchLoader(
        dataset,
        DataParallelShard(micro, size, rank, world),
        consumed_samples=consumed,
        data=data or DataConfig(),
        eod=eod,
        vocab_size=vocab,
        **options,
    )


def taken(batches: BatchLoader, count: int) -> list[int]:
    """Sample numbers of the next `count` micro-batches."""
    return [int(t) // 10 for _ in range(count) for t in next(batches).tokens_BS[:, 0]]


def steps(world: int, micro: int, count: int, **options) -> list[list[int]]:
    """Samples of each optimizer step over all ranks, in the order of micro-steps, then ranks."""
    ranks = [loader(rank=r, world=world, micro=micro, **options) for r in range(world)]
    return [
        [i for _ in range(8 // (world * micro)) for r in ranks for i in taken(r, 1)]
        for _ in range(count)
    ]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_options_against_a_loop_over_tokens(samples, positions, segments, mask):
    data = DataConfig(
        reset_position_ids=positions, reset_attention_mask=segments, eod_mask_loss=mask
    )
    b = make_batch(np.array(samples), data, EOD)
    assert b.tokens_BS.tolist() == [s[:-1] for s in samples] and b.labels_BS.tolist() == [
        s[1:] for s in samples
    ]
    for row, sample in enumerate(samples):
        position = segment = 0
        for i, token in enumerate(sample[:-1]):
            assert b.loss_mask_BS[row, i] == (0 if mask and token == EOD else 1)
            assert not positions or b.position_ids_BS[row, i] == position
            assert not segments or b.segments_BS[row, i] == segment
            position, segment = (0, segment + 1) if token == EOD else (position + 1, segment)
    assert (b.position_ids_BS is None) == (not positions) and (b.segments_BS is None) == (
        not segments
    )


def test_dtypes_and_moving_to_a_device():
    for data in (OPTIONS, DataConfig()):
        b = next(loader(data=data))
        moved = b.to("meta")
        for name in (
            "tokens_BS",
            "labels_BS",
            "position_ids_BS",
            "segments_BS",
            "loss_mask_BS",
        ):
            t = getattr(b, name)
            if t is None:
                assert data is not OPTIONS and getattr(moved, name) is None
                continue
            assert t.dtype == (
                torch.float32 if name == "loss_mask_BS" else torch.int64
            ) and t.shape == (2, 3)
            assert t.is_contiguous() and getattr(moved, name).device.type == "meta"
    assert isinstance(moved, Batch)


@pytest.mark.parametrize(
    ("world", "micro"), [(1, 1), (1, 2), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
)
def test_a_step_takes_the_same_samples_for_any_split_over_ranks(world, micro):
    assert steps(world, micro, 4) == [[*range(8 * n, 8 * n + 8)] for n in range(4)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 4), (4, 1)])
def test_resuming_continues_exactly(world, micro, workers):
    data = DataConfig(num_workers=workers)
    whole = steps(world, micro, 4)
    assert steps(world, micro, 2, consumed=16, data=data) == whole[2:]


def test_consumed_samples_counts_over_all_ranks():
    batches = loader(rank=1, world=2, consumed=8)
    assert batches.consumed_samples == 8
    taken(batches, 3)
    assert batches.consumed_samples == 8 + 3 * 4
    resumed = loader(rank=1, world=2, consumed=batches.consumed_samples)
    assert taken(resumed, 1) == taken(batches, 1) == [22, 23]


def test_workers_change_nothing(tmp_path):
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
            assert all(
                torch.equal(getattr(batches[0], name), getattr(b, name)) for b in batches[1:]
            )
        if several[0].consumed_samples == 40:
            break
    assert several[0].consumed_samples == 40 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_end_of_the_data(workers):
    batches = loader(Numbers(21), data=DataConfig(num_workers=workers))
    assert taken(batches, 8) == [*range(16)]
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match="the data ends: 5 of 21 samples are left, an optimizer step takes 8",
        ):
            next(batches)
    with pytest.raises(ValueError, match="the data ends: 0 of 21"):
        next(loader(Numbers(21), consumed=32))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_token_outside_the_vocabulary(workers):
    batches = loader(vocab=31, data=DataConfig(num_workers=workers))
    assert taken(batches, 1) == [0, 1]
    with pytest.raises(
        ValueError,
        match=r"^prefix1 holds the token id 31; allowed with this run's vocabulary: 0 "
        r"to 30\. Use the tokenizer[^\n]*$",
    ):
        next(batches)

    class Negative(Numbers):
        def __getitem__(self, i: int) -> np.ndarray:
            return np.array([1, -7, 2, 3])

    with pytest.raises(ValueError, match="prefix0 holds the token id -7"):
        next(loader(Negative(8)))


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
@pytest.mark.parametrize("workers", [0, 1])
def test_any_error_surfaces(kind, workers):
    class Broken(Numbers):
        def __getitem__(self, i: int) -> np.ndarray:
            raise kind("d.bin")

    with pytest.raises(kind, match="d.bin") as info:
        next(loader(Broken(8), data=DataConfig(num_workers=workers)))
    info.value.__traceback__ = (
        None  # torch leaves a cycle through it, which would delay the end of the workers
    )


def test_a_worker_that_dies_surfaces():
    batches = loader(Numbers(48), consumed=BOMB, data=DataConfig(num_workers=1))
    with pytest.raises(
        OSError,
        match=r"process \d+, which reads data for rank 0, ended with exit code 3\. If memory "
        "ran out, lower --num-workers",
    ):
        next(batches)


def test_the_traceback_of_a_worker_is_kept():
    class Broken(Numbers):
        def __getitem__(self, i: int) -> np.ndarray:
            raise KeyError("d.bin")

    with pytest.raises(KeyError, match="(?s)Original Traceback.*in __getitem__.*d.bin") as info:
        next(loader(Broken(8), data=DataConfig(num_workers=1)))
    info.value.__traceback__ = None


def from_outside(number: int, process: int) -> None:
    """Send a signal as somebody other than this process, as the launcher would."""
    subprocess.run(["kill", f"-{number}", str(process)], check=True)


def ends(handle: int) -> bool:
    """Whether a process has ended, or does within 3 seconds."""
    return bool(select.select([handle], [], [], 3)[0])


def test_a_worker_lives_through_the_signals_that_stop_the_training():
    batches = loader(Numbers(10000), consumed=48, data=DataConfig(num_workers=1))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), (
        "that is for the worker only"
    )
    worker = batches._batches._workers[0].pid
    taken(batches, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        from_outside(number, worker)
    assert taken(batches, 10) == list(range(50, 70))
    os.kill(worker, signal.SIGTERM)  # by the process that it works for
    assert ends(os.pidfd_open(worker))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_is_killed_is_named(number):
    batches = loader(Numbers(10000), consumed=48, data=DataConfig(num_workers=1))
    worker = batches._batches._workers[0].pid
    taken(batches, 1)
    os.kill(worker, number)
    with pytest.raises(
        OSError,
        match=rf"process {worker}, which reads data for rank 0, was ended by signal "
        r"(Killed|Segmentation)",
    ):
        taken(batches, 1000)


def _leave_a_worker(pipe) -> None:
    batches = loader(Numbers(10000), consumed=48, data=DataConfig(num_workers=1))
    taken(batches, 1)
    pipe.send(batches._batches._workers[0].pid)
    pipe.recv()
    os._exit(0)


def test_a_worker_that_got_a_signal_ends_with_its_rank():
    """Soon: torch's own workers look for their rank every five seconds, and the launcher waits for them."""
    ours, theirs = multiprocessing.Pipe()
    rank = multiprocessing.get_context("fork").Process(target=_leave_a_worker, args=(theirs,))
    rank.start()
    worker = ours.recv()
    handle = os.pidfd_open(worker)
    from_outside(signal.SIGTERM, worker)
    ours.send(None)
    assert ends(handle)
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
        ({"dataset": Numbers(0)}, "length of the dataset is 0"),
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
def test_loaders_that_make_no_sense(options, match):
    with pytest.raises(ValueError, match=match):
        loader(**options)
    assert loader(eod=None) is not None
