"""The global order of samples: independent of restarts, ranks, batches and workers.

Also that the options of the data reach the model of a run.
"""

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
NUM_SAMPLES = 640
# (ranks, micro-batch size)
LAYOUTS = [(1, 1), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]
FLAGS = ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss")


def write_dataset(prefix: Path, documents: int, first: int) -> str:
    """Write documents of 2 to 11 bytes with the document's own number, and an end."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for n in range(first, first + documents):
            writer.add_document([*[n] * (2 + n * n % 10), ByteTokenizer.eod])
    return str(prefix)


@pytest.fixture(scope="module", params=["single", "cyclic", "single blend", "cyclic blend"])
def samples(request, tmp_path_factory) -> Samples:
    """The training samples of a run of several epochs."""
    folder = tmp_path_factory.mktemp("d")
    a = write_dataset(folder / "a", 60, 0)
    b = write_dataset(folder / "b", 100, 100)
    kind, *blend = request.param.split()
    data = DataConfig(
        data_path=("1", a, "2.5", b) if blend else (b,), split="9,1", dataloader_type=kind
    )
    return build_splits(
        data,
        seq_length=7,
        train_samples=NUM_SAMPLES,
        valid_samples=0,
        test_samples=0,
        seed=11,
    )["train"]


def take_steps(
    samples: Samples, ranks: int, micro: int, consumed: int, count: int, workers: int
) -> tuple[list, int]:
    """Take the batches of `count` optimizer steps on all ranks.

    Returns:
        (their samples in global order, number of samples consumed after them).
    """
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
            for row, last in zip(batch.tokens_BS.tolist(), batch.labels_BS):
                taken.append([*row, int(last[-1])])
    (consumed,) = {loader.consumed_samples for loader in loaders}
    return taken, consumed


@settings(max_examples=15, deadline=None)
@given(
    plan=st.lists(
        st.tuples(st.sampled_from(LAYOUTS), st.integers(1, 25)), min_size=2, max_size=6
    )
)
def test_layouts_read_one_order(samples, plan):
    """A run may be resumed with another layout any number of times."""
    order = [samples[i].tolist() for i in range(NUM_SAMPLES)]
    assert len({str(row) for row in order}) < NUM_SAMPLES, "more than one epoch"
    consumed = 0
    for (ranks, micro), count in plan:
        count = min(count, (NUM_SAMPLES - consumed) // GLOBAL_BATCH)
        taken, after = take_steps(samples, ranks, micro, consumed, count, workers=0)
        assert taken == order[consumed:after] and after == consumed + count * GLOBAL_BATCH
        consumed = after


def test_prefetched_batches_are_not_consumed(samples):
    """A run stops while its workers hold batches that they have read ahead."""
    order = [samples[i].tolist() for i in range(NUM_SAMPLES)]
    consumed = 0
    for (ranks, micro), count in [((1, 4), 30), ((2, 2), 7), ((4, 1), 6), ((2, 1), 9)]:
        taken, after = take_steps(samples, ranks, micro, consumed, count, workers=1)
        assert taken == order[consumed:after] and len(taken) == count * GLOBAL_BATCH
        consumed = after


def record_samples(argv: list[str]) -> list[list[list[int]]]:
    """Train in a rank of the pool, and return the samples of each micro-batch."""
    from megatron.data import loader

    taken = []
    make_batch = loader.make_batch

    def record(samples, *arguments):
        taken.append(samples.tolist())
        return make_batch(samples, *arguments)

    loader.make_batch = record
    try:
        runs.train(argv)
    finally:
        loader.make_batch = make_batch
    return taken


def in_global_order(answers: list[list[list[list[int]]]]) -> list[list[int]]:
    """Merge the micro-batches of all ranks."""
    rows = []
    for micro_batches in zip(*answers):
        for micro_batch in micro_batches:
            rows += micro_batch
    return rows


@pytest.mark.parametrize("kind", ["single", "cyclic"])
def test_complete_runs_read_that_order(kind, tmp_path, ranks1, ranks2):
    """With all options: on one rank; on two; and stopped in the second epoch and resumed with
    another micro-batch size."""
    path = write_dataset(tmp_path / "d", 120, 0)  # 28 samples of 32 tokens
    options = ("--dataloader-type", kind, "--split", "1", "--eval-iters", "0")
    argv = [*runs.flags(path, tmp_path, 6, *FLAGS, *options)]
    data = DataConfig(data_path=(path,), split="1", dataloader_type=kind)
    order = build_splits(
        data, seq_length=32, train_samples=48, valid_samples=0, test_samples=0, seed=1234
    )["train"]
    expected = [order[i].tolist() for i in range(48)]
    micro_4 = [*argv, "--micro-batch-size", "4"]
    micro_2 = [*argv, "--micro-batch-size", "2"]
    taken = in_global_order(ranks1.run(record_samples, [*micro_4, "--save", ""]))
    assert taken == expected
    uninterrupted = runs.metrics(tmp_path)
    taken = in_global_order(ranks2.run(record_samples, [*micro_2, "--save", ""]))
    assert taken == expected
    taken = in_global_order(ranks1.run(record_samples, [*micro_4, "--exit-interval", "4"]))
    resume = ["--load", str(tmp_path / "checkpoints")]
    taken += in_global_order(ranks1.run(record_samples, [*micro_2, *resume]))
    assert taken == expected
    losses = [m["loss"] for m in runs.metrics(tmp_path)]
    assert [m["loss"] for m in uninterrupted[:4]] == losses[12:16]


def record_model_inputs(argv: list[str]) -> list[list]:
    """Train in a rank of the pool, and return what each forward pass was given."""
    from megatron.model.gpt import GPT

    calls = []
    original = GPT.forward

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
        return original(
            self, tokens_BS, labels_BS, loss_mask_BS, position_ids_BS, segments_BS, **rest
        )

    GPT.forward = forward
    try:
        runs.train(argv)
    finally:
        GPT.forward = original
    return calls


def first_document(call: int) -> int:
    """Number of the first document of the split that a forward pass reads."""
    if 4 <= call < 8:
        return 0  # training
    return 200 if call >= 12 else 100  # test, validation


def check_document_boundaries(tokens, mask, positions, segments) -> None:
    """Positions, segments and the loss mask of one sample must respect its documents."""
    position = 0
    segment = 0
    for t, token in enumerate(tokens):
        is_eod = token == ByteTokenizer.eod
        assert (mask[t], positions[t], segments[t]) == (not is_eod, position, segment)
        position += 1
        if is_eod:
            position = 0
            segment += 1


def test_data_options_reach_the_model(tmp_path, ranks1):
    """In training and in evaluation; the splits come from their own paths."""
    paths = []
    for split, first in (("train", 0), ("valid", 100), ("test", 200)):
        paths += [f"--{split}-data-path", write_dataset(tmp_path / split, 40, first)]
    argv = runs.flags("", tmp_path, 1, "--save", "", "--eval-iters", "1", "--load", "", *paths)
    argv += ["--routing-probe-samples", "0"]
    at = argv.index("--data-path")
    del argv[at : at + 4]  # --split has no effect without it
    (calls,) = ranks1.run(record_model_inputs, [*argv, *FLAGS])
    assert [training for training, *_ in calls] == [False] * 4 + [True] * 4 + [False] * 8
    for number, (_, *arguments) in enumerate(calls):
        first = first_document(number)
        for tokens, mask, positions, segments in zip(*arguments, strict=True):
            bytes_found = {t for t in tokens if t != ByteTokenizer.eod}
            assert bytes_found <= set(range(first, first + 40))
            check_document_boundaries(tokens, mask, positions, segments)
    (calls,) = ranks1.run(record_model_inputs, [*argv, "--eval-iters", "0"])
    for _, _, mask, positions, segments in calls:
        assert positions is None and segments is None and np.all(mask)
