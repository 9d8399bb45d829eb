"""Sample index against a loop over an explicit stream of tokens; splits; the index cache."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import IndexedWriter
from megatron.data.sampling import sample_index
from megatron.data.sampling.sample_index import (
    RepeatedEpochs,
    SampleIndex,
    parse_split,
    split_documents,
)


def dataset(prefix: Path, lengths: list[int]) -> IndexedDataset:
    """Write documents whose tokens count up through the dataset: 0, 1, 2, ..."""
    with IndexedWriter(prefix, np.int32) as writer:
        writer.add_documents(np.arange(sum(lengths)), lengths)
    return IndexedDataset(prefix)


def reference_samples(d: IndexedDataset, order: list[int], seq_length: int) -> list[list[int]]:
    """Cut one list of all tokens into slices."""
    stream = [int(t) for doc in order for t in d.read(doc)]
    return [
        stream[i : i + seq_length + 1] for i in range(0, len(stream) - seq_length, seq_length)
    ]


def rows(index: SampleIndex | RepeatedEpochs) -> list[list[int]]:
    return [index[i].tolist() for i in range(len(index))]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=10),
    seq_length=st.integers(1, 7),
    data=st.data(),
)
def test_unshuffled_samples_slice_the_stream(tmp_path_factory, lengths, seq_length, data):
    d = dataset(tmp_path_factory.mktemp("d") / "d", lengths)
    start = data.draw(st.integers(0, len(lengths)))
    stop = data.draw(st.integers(start, len(lengths)))
    count = data.draw(st.none() | st.integers(1, 40))
    if sum(lengths[start:stop]) < seq_length + 1:
        with pytest.raises(ValueError, match="one sample takes"):
            SampleIndex(d, (start, stop), seq_length, count, 0, shuffle=False)
        return
    index = SampleIndex(d, (start, stop), seq_length, count, 0, shuffle=False)
    epochs = 1 if count is None else 60
    expected = reference_samples(d, [*range(start, stop)] * epochs, seq_length)
    assert rows(index) == expected[: len(expected) if count is None else count]
    assert index[0].dtype == np.int64 and index.source(0) == d.prefix


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=10),
    seq_length=st.integers(1, 7),
    count=st.none() | st.integers(1, 60),
    seed=st.integers(-5, 2**40),
)
def test_shuffled_samples_come_from_shuffled_epochs(
    tmp_path_factory, lengths, seq_length, count, seed
):
    d = dataset(tmp_path_factory.mktemp("d") / "d", [*lengths, 8])
    tokens, documents = sum(lengths) + 8, len(lengths) + 1
    index = SampleIndex(d, None, seq_length, count, seed)
    epochs = len(index._order) // documents
    order = index._order.reshape(epochs, documents)
    assert all(sorted(epoch) == [*range(documents)] for epoch in order.tolist())
    stream = reference_samples(d, index._order.tolist(), seq_length)
    assert rows(index) == [stream[i] for i in index._samples]
    assert (
        len(set(index._samples.tolist())) == len(index) == (count or (tokens - 1) // seq_length)
    )
    assert epochs == 1 or (epochs - 1) * tokens < len(index) * seq_length + 1 <= epochs * tokens


@pytest.mark.parametrize(
    ("needed", "apart"), [(1, True), (79, True), (80, False), (100, False)]
)
def test_last_epoch_is_shuffled_separately(tmp_path, needed, apart):
    """The last epoch is shuffled separately if less than 80 % of it is needed."""
    # 1010 tokens: 100 samples of 10 in an epoch, and 9 tokens left over
    d = dataset(tmp_path / "d", [101] * 10)
    before = (3 * 1010 - 1) // 10
    taken = SampleIndex(d, None, 10, before + needed, 1)._samples
    assert (set(taken[:before].tolist()) == set(range(before))) == apart
    assert apart == (min(taken[before:]) >= before)
    assert taken.tolist() != sorted(taken)


def test_partial_first_epoch_spans_all_samples(tmp_path):
    d = dataset(tmp_path / "d", [10] * 100)
    assert max(SampleIndex(d, None, 10, 10, 1)._samples) > 50


def test_epoch_shows_every_token_once(tmp_path):
    """Every token is an input about once per epoch."""
    d = dataset(tmp_path / "d", [7, 0, 30, 1, 12])
    index = SampleIndex(d, None, 5, 50, 3)  # 5 epochs of 50 tokens, and one more token
    counts = Counter(t for i in range(len(index)) for t in index[i][:-1].tolist())
    assert (
        sum(counts.values()) == 250 and min(counts.values()) >= 4 and max(counts.values()) <= 6
    )


def test_order_is_pinned_and_seeded(tmp_path):
    """A resumed run continues in this order: a change needs another _ORDER_VERSION."""
    d = dataset(tmp_path / "d", [3, 5, 4])
    assert rows(SampleIndex(d, None, 3, 4, 1234)) == [
        [6, 7, 8, 9],
        [3, 4, 5, 6],
        [0, 1, 2, 3],
        [9, 10, 11, 3],
    ]
    assert rows(SampleIndex(d, None, 3, 4, 1234)) == rows(
        SampleIndex(d, None, 3, 4, 1234 + 2**32)
    )
    assert len({str(rows(SampleIndex(d, None, 3, 4, seed))) for seed in range(8)}) > 4


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=10),
    seq_length=st.integers(1, 5),
    count=st.integers(1, 60),
    seed=st.integers(-5, 2**40),
)
def test_repeated_epochs_permute_each_pass(tmp_path_factory, lengths, seq_length, count, seed):
    d = dataset(tmp_path_factory.mktemp("d") / "d", [*lengths, 6])
    epoch = SampleIndex(d, None, seq_length, None, seed)
    cycle, n = RepeatedEpochs(epoch, count, seed), len(epoch)
    taken = rows(cycle)
    assert len(taken) == len(cycle) == count
    for start in range(0, count, n):
        part = taken[start : start + n]
        assert len(part) < n or sorted(part) == sorted(rows(epoch))
        assert len({str(row) for row in part}) == len(part)
    assert taken == [
        epoch[int(np.random.RandomState([seed % 2**32, i // n]).permutation(n)[i % n])].tolist()
        for i in range(count)
    ]


def test_repeated_epochs_keep_earlier_passes(tmp_path):
    """Passes differ from each other and do not change when the run gets longer."""
    d = dataset(tmp_path / "d", [10] * 30)
    epoch = SampleIndex(d, None, 4, None, 1)
    n = len(epoch)
    taken = rows(RepeatedEpochs(epoch, 4 * n, 1))
    passes = [taken[n * p : n * p + n] for p in range(4)]
    assert len({str(p) for p in passes}) == 4 and rows(epoch) not in passes
    assert rows(RepeatedEpochs(epoch, 4 * n, 2)) != taken
    assert rows(RepeatedEpochs(epoch, 2 * n + 5, 1)) == taken[: 2 * n + 5]
    # Another process, which starts in the second pass and continues with the third.
    middle = RepeatedEpochs(epoch, 4 * n, 1)
    assert [middle[i].tolist() for i in range(n + n // 2, 2 * n + 7)] == taken[
        n + n // 2 : 2 * n + 7
    ]
    assert middle[0].tolist() == taken[0] and middle.source(0) == d.prefix
    # Only the order of the current pass is in memory.
    assert [len(middle._order), middle._order.dtype] == [n, np.int32]
    data = pickle.dumps(middle)
    assert len(data) < 1000 and rows(pickle.loads(data)) == taken


def test_repeated_epochs_order_is_pinned(tmp_path):
    """A resumed run continues in this order."""
    cycle = RepeatedEpochs(
        SampleIndex(dataset(tmp_path / "d", [9] * 2), None, 3, None, 0, shuffle=False), 12, 1234
    )
    assert [row[0] // 3 for row in rows(cycle)] == [4, 3, 1, 2, 0, 3, 1, 4, 2, 0, 3, 2]


def test_repeated_epochs_refuse_invalid_arguments(tmp_path):
    epoch = SampleIndex(dataset(tmp_path / "d", [9]), None, 3, None, 0)
    with pytest.raises(ValueError, match="num_samples is 0; allowed: a positive integer"):
        RepeatedEpochs(epoch, 0, 1)
    for i in (-1, 5):
        with pytest.raises(IndexError, match=f"sample {i} of a cycle: allowed 0 to 4"):
            RepeatedEpochs(epoch, 5, 1)[i]


def test_sample_index_refuses_invalid_arguments(tmp_path):
    d = dataset(tmp_path / "d", [3, 5])
    for arguments, match in (
        ((None, 0, None, 0), "seq_length is 0"),
        ((None, 3, 0, 0), "num_samples is 0"),
        (((0, 3), 3, None, 0), "ranges within 0 to 2"),
        (((2, 1), 3, None, 0), "ranges within"),
        (
            (None, 8, None, 0),
            r"documents 0 to 2 of .*d \(2 documents, 8 tokens\) hold 8 tokens; "
            r"one sample takes 9",
        ),
        (((1, 1), 3, None, 0), "hold 0 tokens; one sample takes 4"),
    ):
        with pytest.raises(ValueError, match=match):
            SampleIndex(d, *arguments)
    index = SampleIndex(d, None, 7, None, 0)
    for i in (-1, 1):
        with pytest.raises(IndexError, match="allowed 0 to 0"):
            index[i]


def test_kernel_read_ahead_is_disabled(tmp_path):
    d = dataset(tmp_path / "d", [100] * 10)

    def advice() -> str:
        """Return the flags of the mapping of .bin; `rr` stands for random reading."""
        mappings = re.split(
            r"^(?=[0-9a-f]+-[0-9a-f]+ )",
            Path("/proc/self/smaps").read_text(),
            flags=re.MULTILINE,
        )
        (mine,) = [m for m in mappings if str(tmp_path / "d.bin") in m]
        return re.search("VmFlags: (.*)", mine)[1]

    assert " rr " not in advice()
    assert len(SampleIndex(d, None, 3, None, 0)) and " rr " in advice()


@pytest.mark.parametrize(
    ("split", "documents", "expected"),
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969,30,1", 10, [(0, 10), (10, 10), (10, 10)]),
        ("1", 7, [(0, 7), (7, 7), (7, 7)]),
        ("0.5, 0.5", 4, [(0, 2), (2, 4), (4, 4)]),
        ("0,0,3", 4, [(0, 0), (0, 0), (0, 4)]),
        ("1,1,1", 0, [(0, 0)] * 3),
    ],
)
def test_split_documents_rounds_cumulative_shares(split, documents, expected):
    assert split_documents(documents, split) == expected


@given(
    st.integers(0, 10**12), st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any)
)
def test_splits_cover_documents_in_proportion(documents, shares):
    ranges = split_documents(documents, ",".join(map(str, shares)))
    assert ranges[0][0] == 0 and ranges[2][1] == documents
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))
    for (start, stop), share in zip(ranges, shares):
        assert abs((stop - start) - documents * share / sum(shares)) <= 1.001


@pytest.mark.parametrize(
    "split", ["", "a", "1,2,3,4", "0,0", "-1,2", "1,,2", "nan", "1/0", "inf"]
)
def test_malformed_splits_are_refused(split):
    with pytest.raises(ValueError, match="--split is .*The usual one is 969,30,1"):
        parse_split(split)


def test_cached_index_is_used_unchanged(tmp_path, monkeypatch):
    d = dataset(tmp_path / "d", [7, 30, 1, 12])
    plain = SampleIndex(d, None, 5, 33, 3)
    assert rows(SampleIndex(d, None, 5, 33, 3, cache_dir=str(tmp_path / "a" / "b"))) == rows(
        plain
    )
    (file,) = (tmp_path / "a" / "b").glob("*.cache")
    monkeypatch.setattr(sample_index, "build_order", None)
    again = SampleIndex(d, None, 5, 33, 3, cache_dir=str(tmp_path / "a" / "b"))
    assert rows(again) == rows(plain) and not again._bounds.flags.writeable
    data = pickle.dumps(again)
    assert len(data) < 1000 and rows(pickle.loads(data)) == rows(plain)
    assert sorted(os.listdir(file.parent)) == [".lock", file.name]


def test_cache_key_covers_content_and_parameters(tmp_path):
    folder = str(tmp_path / "cache")
    d = dataset(tmp_path / "d", [7, 30, 1, 12])
    variants = [
        (None, 5, 33, 3),
        ((0, 2), 5, 33, 3),
        (None, 6, 33, 3),
        (None, 5, 34, 3),
        (None, 5, 33, 4),
        (None, 5, None, 3),
        (None, 5, 33, 3, False),
    ]
    for n, arguments in enumerate(variants, 1):
        assert rows(SampleIndex(d, *arguments, cache_dir=folder)) == rows(
            SampleIndex(d, *arguments)
        )
        assert len(list(Path(folder).glob("*.cache"))) == n
    os.utime(tmp_path / "d.bin", ns=(1, 1))
    SampleIndex(d, *variants[0], cache_dir=folder)
    assert len(list(Path(folder).glob("*.cache"))) == len(variants) + 1
    changed = dataset(tmp_path / "d", [30, 7, 1, 12])
    assert rows(SampleIndex(changed, *variants[0], cache_dir=folder)) == rows(
        SampleIndex(changed, *variants[0])
    )


def test_corrupt_cache_is_built_again(tmp_path, caplog):
    d = dataset(tmp_path / "d", [7, 30, 1, 12])
    right = rows(SampleIndex(d, None, 5, 33, 3, cache_dir=str(tmp_path)))
    (file,) = tmp_path.glob("*.cache")
    valid = file.read_bytes()
    for corrupt in (
        b"",
        valid[:5],
        valid[:-1],
        valid[:200],
        b"X" + valid[1:],
        valid[:100] + b"\xff" + valid[101:],
        valid[:12] + b"\xff\xff\xff\xff" + valid[16:],
        valid + b"\0",
        valid[: len(valid) // 2]
        + bytes([valid[len(valid) // 2] ^ 1])
        + valid[len(valid) // 2 + 1 :],
    ):
        caplog.clear()
        file.write_bytes(corrupt)
        with caplog.at_level(logging.WARNING, "megatron"):
            assert rows(SampleIndex(d, None, 5, 33, 3, cache_dir=str(tmp_path))) == right
        assert "is corrupt" in caplog.text and file.read_bytes() == valid


def test_unwritable_cache_folder_only_warns(tmp_path, caplog, monkeypatch):
    d = dataset(tmp_path / "d", [7, 30, 1, 12])
    right = rows(SampleIndex(d, None, 5, 33, 3))
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "megatron"):
        assert rows(SampleIndex(d, None, 5, 33, 3, cache_dir=str(tmp_path / "file"))) == right
        assert rows(SampleIndex(d, None, 5, 9, 3, cache_dir=str(tmp_path / "file")))
    assert caplog.text.count("cannot write the index cache") == 1, "once, not for each index"
    assert "--data-cache-path" in caplog.text

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert rows(SampleIndex(d, None, 5, 33, 3, cache_dir=str(tmp_path))) == right
    assert "No space left on device" in caplog.text and not list(tmp_path.glob(".*.tmp"))
