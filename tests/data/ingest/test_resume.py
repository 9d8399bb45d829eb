"""The global order of samples: the same however often a run is continued, on however many ranks, in whatever batches;
and that the options of the data reach the model of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import runs
from megatron.config.schema import DataConfig
from megatron.data.indexed.writer import IndexedWriter
from megatron.data.loader import BatchLoader, DataParallelShard
from megatron.data.sampling.blend import Samples
from megatron.data.splits import build_splits
from megatron.tokenizer.byte import ByteTokenizer

GLOBAL_BATCH = 8
LAYOUTS = [
    (1, 1),
    (1, 4),
    (1, 8),
    (2, 1),
    (2, 2),
    (2, 4),
    (4, 1),
    (4, 2),
    (8, 1),
]  # ranks, micro-batch
FLAGS = ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss")


def write(prefix: Path, documents: int, first: int) -> str:
    """Documents of 3 to 12 bytes, each of its own number, and an end."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for n in range(first, first + documents):
            writer.add_document([*[n] * (2 + n * n % 10), ByteTokenizer.eod])
    return str(prefix)


@pytest.fixture(scope="module", params=["single", "cyclic", "single blend", "cyclic blend"])
def samples(request, tmp_path_factory) -> Samples:
    """A run's 640 training samples, which take several epochs."""
    folder = tmp_path_factory.mktemp("d")
    a, b = write(folder / "a", 60, 0), write(folder / "b", 100, 100)
    kind, *blend = request.param.split()
    data = DataConfig(
        data_path=("1", a, "2.5", b) if blend else (b,), split="9,1", dataloader_type=kind
    )
    return build_splits(
        data, seq_length=7, train_samples=640, valid_samples=0, test_samples=0, seed=11
    )["train"]


def steps(
    samples: Samples, ranks: int, micro: int, consumed: int, count: int, workers: int
) -> tuple[list, int]:
    """Samples of `count` optimizer steps in global order, and how many are consumed after them."""
    loaders = [
        BatchLoader(
            samples,
            DataParallelShard(micro, GLOBAL_BATCH, rank, ranks),
            consumed_samples=consumed,
            data=DataConfig(num_workers=workers),
            eod=None,
            vocab_size=257,
        )
        for rank in range(ranks)
    ]
    taken = []
    for _ in range(count * GLOBAL_BATCH // (ranks * micro)):
        for batch in [next(loader) for loader in loaders]:
            taken += [
                [*row, int(last[-1])]
                for row, last in zip(batch.tokens_BS.tolist(), batch.labels_BS)
            ]
    (consumed,) = {loader.consumed_samples for loader in loaders}
    return taken, consumed


@settings(max_examples=15, deadline=None)
@given(
    plan=st.lists(
        st.tuples(st.sampled_from(LAYOUTS), st.integers(1, 25)), min_size=2, max_size=6
    )
)
def test_any_sequence_of_layouts_sees_the_one_order(samples, plan):
    order, consumed = [samples[i].tolist() for i in range(640)], 0
    assert len({str(row) for row in order}) < 640, "more than one epoch"
    for (ranks, micro), count in plan:
        count = min(count, (640 - consumed) // GLOBAL_BATCH)
        taken, after = steps(samples, ranks, micro, consumed, count, 0)
        assert taken == order[consumed:after] and after == consumed + count * GLOBAL_BATCH
        consumed = after


def test_the_layouts_of_one_run_with_workers_that_read_ahead(samples):
    """Stopped while workers hold batches read ahead: what was not handed out is not consumed."""
    order, consumed = [samples[i].tolist() for i in range(640)], 0
    for (ranks, micro), count in [((1, 4), 30), ((2, 2), 7), ((4, 1), 6), ((2, 1), 9)]:
        taken, after = steps(samples, ranks, micro, consumed, count, workers=1)
        assert taken == order[consumed:after] and len(taken) == count * GLOBAL_BATCH
        consumed = after


def record(argv: list[str]) -> list[list[list[int]]]:
    """In a rank of the pool: a run, and the samples of each of its micro-batches."""
    from megatron.data import loader

    taken, real = [], loader.make_batch
    loader.make_batch = lambda samples, *args: (
        taken.append(samples.tolist()) or real(samples, *args)
    )
    try:
        runs.train(argv)
    finally:
        loader.make_batch = real
    return taken


def in_order(answers: list[list[list[list[int]]]]) -> list[list[int]]:
    return [
        row
        for of_all_ranks in zip(*answers)
        for micro_batch in of_all_ranks
        for row in micro_batch
    ]


@pytest.mark.parametrize("kind", ["single", "cyclic"])
def test_whole_runs_take_that_order(kind, tmp_path, ranks1, ranks2):
    """On one rank, on two, and stopped in the second epoch and continued with another micro-batch; with all options."""
    path = write(tmp_path / "d", 120, 0)  # 28 samples of 32
    argv = [
        *runs.flags(
            path,
            tmp_path,
            6,
            *FLAGS,
            "--dataloader-type",
            kind,
            "--split",
            "1",
            "--eval-iters",
            "0",
        )
    ]
    data = DataConfig(data_path=(path,), split="1", dataloader_type=kind)
    order = build_splits(
        data, seq_length=32, train_samples=48, valid_samples=0, test_samples=0, seed=1234
    )["train"]
    expected = [order[i].tolist() for i in range(48)]
    assert (
        in_order(ranks1.run(record, [*argv, "--micro-batch-size", "4", "--save", ""]))
        == expected
    )
    whole = runs.metrics(tmp_path)
    assert (
        in_order(ranks2.run(record, [*argv, "--micro-batch-size", "2", "--save", ""]))
        == expected
    )
    taken = in_order(
        ranks1.run(record, [*argv, "--micro-batch-size", "4", "--exit-interval", "4"])
    )
    taken += in_order(
        ranks1.run(
            record, [*argv, "--micro-batch-size", "2", "--load", str(tmp_path / "checkpoints")]
        )
    )
    assert taken == expected
    assert [m["loss"] for m in whole[:4]] == [m["loss"] for m in runs.metrics(tmp_path)[12:16]]


def seen(argv: list[str]) -> list[list]:
    """In a rank of the pool: a run, and what each forward pass was given."""
    from megatron.model.gpt import GPT

    calls, real = [], GPT.forward

    def forward(
        self,
        tokens_BS,
        labels_BS=None,
        loss_mask_BS=None,
        position_ids_BS=None,
        segments_BS=None,
        **rest,
    ):
        tensors = (tokens_BS, loss_mask_BS, position_ids_BS, segments_BS)
        calls.append([self.training, *(None if t is None else t.tolist() for t in tensors)])
        return real(
            self, tokens_BS, labels_BS, loss_mask_BS, position_ids_BS, segments_BS, **rest
        )

    GPT.forward = forward
    try:
        runs.train(argv)
    finally:
        GPT.forward = real
    return calls


def test_the_options_reach_the_model(tmp_path, ranks1):
    """In training and in evaluation; the splits come from paths of their own."""
    paths = [
        word
        for which, first in (("train", 0), ("valid", 100), ("test", 200))
        for word in (f"--{which}-data-path", write(tmp_path / which, 40, first))
    ]
    argv = runs.flags("", tmp_path, 1, "--save", "", "--eval-iters", "1", "--load", "", *paths)
    at = argv.index("--data-path")
    del argv[at : at + 2]
    (calls,) = ranks1.run(seen, [*argv, *FLAGS])
    assert [training for training, *_ in calls] == [False] * 4 + [True] * 4 + [False] * 8
    for number, (_, *arguments) in enumerate(calls):
        first = 0 if 4 <= number < 8 else 200 if number >= 12 else 100
        for tokens, mask, positions, segments in zip(*arguments, strict=True):
            assert {t for t in tokens if t != ByteTokenizer.eod} <= set(
                range(first, first + 40)
            )
            position = segment = 0
            for t, token in enumerate(tokens):
                assert (mask[t], positions[t], segments[t]) == (
                    token != ByteTokenizer.eod,
                    position,
                    segment,
                )
                position, segment = (
                    (0, segment + 1) if token == ByteTokenizer.eod else (position + 1, segment)
                )
    (calls,) = ranks1.run(seen, [*argv, "--eval-iters", "0"])
    assert all(
        positions is None and segments is None and np.all(mask)
        for _, _, mask, positions, segments in calls
    )
