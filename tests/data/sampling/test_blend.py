"""Blends against their definition, and the three splits of a run."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.schema import DataConfig
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.validation import check_sidecar
from megatron.data.indexed.writer import IndexedWriter
from megatron.data.sampling import blend as module
from megatron.data.sampling.blend import Blend, interleave, parse_blend, quotas
from megatron.data.sampling.sample_index import SampleIndex
from megatron.data.splits import build_splits
from megatron.tokenizer.byte import ByteTokenizer
from megatron.tokenizer.null import NullTokenizer

SIDECAR = {
    "tokenizer": "ByteTokenizer",
    "vocab_hash": ByteTokenizer().fingerprint,
    "vocab_size": 257,
    "eod": 256,
}


class NumberedSamples:
    """Dataset whose sample i is [number of the dataset, i]."""

    def __init__(self, name: int, size: int):
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> np.ndarray:
        assert i < self.size
        return np.array([self.name, i])

    def source(self, i: int) -> str:
        return f"numbers{self.name}"


def write(
    prefix: Path, documents: int, length: int = 10, first: int = 0, sidecar: dict | None = None
) -> str:
    """Write documents of `length` tokens that are all the number of the document, from `first`."""
    with IndexedWriter(prefix, np.int32) as writer:
        numbers = np.repeat(np.arange(first, first + documents), length)
        writer.add_documents(numbers, [length] * documents)
        writer.finish(sidecar)
    return str(prefix)


def splits(data: DataConfig, train: int = 5, valid: int = 0, test: int = 0, **options):
    return build_splits(
        data,
        seq_length=8,
        train_samples=train,
        valid_samples=valid,
        test_samples=test,
        seed=1,
        **options,
    )


def rows(samples) -> list[list[int]]:
    return [samples[i].tolist() for i in range(len(samples))]


def documents_in(samples) -> set[int]:
    return {t for row in rows(samples) for t in row}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), []),
        (("a",), [(None, "a")]),
        (("a", "b", "c"), [(None, "a"), (None, "b"), (None, "c")]),
        (("0.7", "a", "3", "b"), [(0.7, "a"), (3.0, "b")]),
        (("1", "./7"), [(1.0, "./7")]),
    ],
)
def test_parse_blend_returns_weights_and_prefixes(words, expected):
    assert parse_blend(words) == expected


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("1",), "weight prefix weight prefix"),
        (("1", "a", "b"), "weight prefix"),
        (("a", "1"), "weight prefix"),
        (("1", "a", "b", "2"), "weight prefix"),
        (("1", "2"), "written as ./7"),
        (("1", "a", "b", "c"), "weight prefix"),
        (("0", "a"), "a weight of --data-path is 0.0"),
        (("-1", "a"), "is -1.0"),
        (("nan", "a"), "a positive number"),
        (("inf", "a"), "a positive number"),
    ],
)
def test_parse_blend_refuses_malformed_words(words, match):
    with pytest.raises(ValueError, match=match):
        parse_blend(words)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e3) | st.integers(1, 10**12), min_size=1, max_size=9),
    count=st.integers(1, 400),
    seed=st.integers(0, 2**33),
)
def test_blend_counts_stay_within_one(weights, count, seed):
    """At every point, the count of each dataset differs from its share by less than 1."""
    needed = quotas(weights, count)
    blend = Blend([NumberedSamples(k, n) for k, n in enumerate(needed)], weights, count, seed)
    counts = np.zeros(len(weights), int)
    shares = np.array(weights) / sum(weights)
    for t in range(count):
        k, position = blend[t].tolist()
        assert position == counts[k] and blend.source(t) == f"numbers{k}"
        counts[k] += 1
        assert np.abs(counts - shares * (t + 1)).max() < 1 + 1e-9
    assert len(blend) == count


def test_interleave_small_cases():
    assert interleave([1, 1], 6, [0, 1]).tolist() == [0, 1, 0, 1, 0, 1]
    assert interleave([1, 1], 6, [1, 0]).tolist() == [1, 0, 1, 0, 1, 0]
    assert interleave([3, 1], 8, [0, 1]).tolist().count(1) == 2
    assert interleave([1], 3, [0]).tolist() == [0, 0, 0]
    once = Blend([NumberedSamples(0, 5), NumberedSamples(1, 5)], [1, 1], 8, 3)
    again = Blend([NumberedSamples(0, 5), NumberedSamples(1, 5)], [0.5, 0.5], 8, 3)
    assert [once[i].tolist() for i in range(8)] == [again[i].tolist() for i in range(8)]


def test_blend_is_cached_and_pickled_small(tmp_path, monkeypatch):
    """A cached blend is not built again, neither by equal weights nor by a worker process."""
    d = IndexedDataset(write(tmp_path / "d", 20))
    parts = [
        SampleIndex(d, (0, 10), 4, 40, 1, cache_dir=str(tmp_path)),
        SampleIndex(d, (10, 20), 4, 20, 1),
    ]
    blend = Blend(parts, [2, 1], 60, 1, cache_dir=str(tmp_path))
    monkeypatch.setattr(module, "build_blend", None)
    for other in (
        Blend(parts, [4, 2], 60, 1, cache_dir=str(tmp_path)),
        pickle.loads(pickle.dumps(blend)),
    ):
        assert [other[i].tolist() for i in range(60)] == [blend[i].tolist() for i in range(60)]


def test_blend_refuses_invalid_arguments():
    one = NumberedSamples(0, 3)
    with pytest.raises(
        ValueError, match="dataset 1 of the blend has 3 samples; its weight 3 takes 6 of 8"
    ):
        Blend([NumberedSamples(0, 3), one], [1, 3], 8, 0)
    for weights in ([], [1, 2], [0], [-1], [float("inf")]):
        with pytest.raises(
            ValueError, match="weights of a blend is .*one positive number per dataset"
        ):
            Blend([one], weights, 1, 0)
    with pytest.raises(
        ValueError, match="datasets of a blend is 65537; allowed: up to 65536. Merge some"
    ):
        Blend([one] * 65537, [1] * 65537, 1, 0)
    blend = Blend([one], [1], 3, 0)
    for i in (-1, 3):
        with pytest.raises(IndexError, match="allowed 0 to 2"):
            blend[i]


def test_splits_take_disjoint_documents(tmp_path):
    data = DataConfig(data_path=(write(tmp_path / "d", 100),), split="80,15,5")
    made = splits(data, 200, 40, 10)
    assert {name: len(s) for name, s in made.items()} == {"train": 200, "valid": 40, "test": 10}
    assert documents_in(made["train"]) == set(range(80))
    assert documents_in(made["valid"]) == set(range(80, 95))
    assert documents_in(made["test"]) == set(range(95, 100))
    assert list((tmp_path / "index_cache").glob("samples-*.cache"))
    assert splits(data, 5, 0, 0) | {"train": None} == {
        "train": None,
        "valid": None,
        "test": None,
    }


def test_splits_of_weighted_blend(tmp_path):
    a, b = write(tmp_path / "a", 50), write(tmp_path / "b", 50, first=1000)
    data = DataConfig(
        data_path=("3", a, "1", b), split="8,2", data_cache_path=str(tmp_path / "cache")
    )
    made = splits(data, 80, 40)
    from_b = sum(made["train"].source(i) == b for i in range(80))
    assert from_b == 20 and not (tmp_path / "index_cache").exists()
    assert documents_in(made["train"]) <= {*range(40), *range(1000, 1040)}
    assert documents_in(made["valid"]) <= {*range(40, 50), *range(1040, 1050)}


def test_unweighted_blend_goes_by_size(tmp_path):
    a, b = write(tmp_path / "a", 30), write(tmp_path / "b", 30, length=20)
    made = splits(DataConfig(data_path=(a, b), split="1"), 90)
    assert sum(made["train"].source(i) == a for i in range(90)) == 30


def test_splits_from_separate_paths(tmp_path):
    a, b, c = (write(tmp_path / name, 30, first=100 * n) for n, name in enumerate("abc"))
    made = splits(
        DataConfig(train_data_path=(a,), valid_data_path=(b,), test_data_path=(c,)), 50, 50, 50
    )
    assert [documents_in(made[name]) for name in ("train", "valid", "test")] == [
        set(range(30)),
        set(range(100, 130)),
        set(range(200, 230)),
    ]
    made = splits(DataConfig(data_path=(a,), valid_data_path=(b,), split="1"), 50, 50)
    assert documents_in(made["train"]) == set(range(30)) and documents_in(made["valid"]) == set(
        range(100, 130)
    )


def test_single_and_cyclic_training_splits(tmp_path):
    """single: every epoch is cut and shuffled again. cyclic: every pass has the same samples.

    cyclic applies to the training split only.
    """
    d = write(tmp_path / "d", 40)  # 32 documents to train on: 320 tokens, 39 samples of 8
    options = {"data_path": (d,), "split": "8,1,1"}
    single = splits(DataConfig(**options), 3 * 39, 12, 12)
    cyclic = splits(DataConfig(**options, dataloader_type="cyclic"), 3 * 39, 12, 12)
    for which in ("valid", "test"):
        assert rows(cyclic[which]) == rows(single[which])
    passes = [sorted(rows(cyclic["train"])[39 * p : 39 * p + 39]) for p in range(3)]
    assert passes[0] == passes[1] == passes[2] and len(cyclic["train"]) == 3 * 39
    several = [sorted(rows(single["train"])[39 * p : 39 * p + 39]) for p in range(3)]
    assert several[0] != several[1] and documents_in(cyclic["train"]) == documents_in(
        single["train"]
    )
    longer = splits(DataConfig(**options, dataloader_type="cyclic"), 200)["train"]
    assert rows(longer)[:117] == rows(cyclic["train"])
    with pytest.raises(
        ValueError, match="--dataloader-type is 'random'; allowed: single cyclic"
    ):
        DataConfig(dataloader_type="random")


def test_cyclic_blend_repeats_each_dataset(tmp_path):
    """Each dataset is repeated on its own, and the weights hold at any point."""
    a, b = (
        write(tmp_path / "a", 10),
        write(tmp_path / "b", 50, first=1000),
    )  # 12 and 62 samples of 8
    data = DataConfig(
        data_path=("1", a, "1", b),
        split="1",
        dataloader_type="cyclic",
        data_cache_path=str(tmp_path),
    )
    blend = splits(data, 100)["train"]
    taken = {
        prefix: [row for i, row in enumerate(rows(blend)) if blend.source(i) == prefix]
        for prefix in (a, b)
    }
    assert {prefix: len(part) for prefix, part in taken.items()} == {a: 50, b: 50}
    passes = [taken[a][n : n + 12] for n in range(0, 48, 12)]
    assert (
        len({str(sorted(part)) for part in passes}) == 1
        and len({str(part) for part in passes}) == 4
    )
    assert (
        len({str(row) for row in passes[0]}) == 12 and len({str(row) for row in taken[b]}) == 50
    )
    counts = np.cumsum([blend.source(i) == a for i in range(100)])
    assert np.abs(counts - np.arange(1, 101) / 2).max() < 1
    longer = splits(data, 300)["train"]
    assert rows(longer)[:100] == rows(blend)
    assert rows(pickle.loads(pickle.dumps(blend))) == rows(blend)


@pytest.mark.parametrize(
    "flag", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"]
)
def test_eod_option_requires_eod_in_data(flag, tmp_path):
    eod, name = ByteTokenizer().eod, f"--{flag.replace('_', '-')}"
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_documents(np.repeat(np.array([1, eod, 2]), [9, 1, 90]), [10, 0, 90])
    data = {"train_data_path": (str(tmp_path / "d"),)}
    with pytest.raises(
        ValueError,
        match=rf"^{name} is set, but document 2 of .*d ends with token 2, not with the "
        rf"end-of-document token 256; .*--append-eod, or leave the flag out$",
    ):
        splits(DataConfig(**data, **{flag: True}), tokenizer=ByteTokenizer())
    assert splits(DataConfig(**data), tokenizer=ByteTokenizer())["train"] is not None
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        for n in range(100):
            writer.add_document([*range(n % 7), eod])
    assert (
        splits(DataConfig(**data, **{flag: True}), tokenizer=ByteTokenizer())["train"]
        is not None
    )


def test_impossible_splits_are_refused(tmp_path):
    d, empty = write(tmp_path / "d", 10), write(tmp_path / "empty", 0)
    with pytest.raises(
        ValueError,
        match=r"the train split of .*d is empty: --split 0,9,1 of 10 documents \(100 tokens\) "
        r"leaves none. Give it a larger share, or its own --train-data-path",
    ):
        splits(DataConfig(data_path=(d,), split="0,9,1"), 5, 5)
    with pytest.raises(ValueError, match="documents 0 to 0 of .*empty .* hold 0 tokens"):
        splits(DataConfig(train_data_path=(empty,)))
    with pytest.raises(
        ValueError,
        match="--train-data-path and --data-path are both empty, and 5 train samples",
    ):
        splits(DataConfig())
    with pytest.raises(ValueError, match="--split is 'x'"):
        splits(DataConfig(train_data_path=(d,), split="x"))
    with pytest.raises(FileNotFoundError, match="nowhere.idx does not exist"):
        splits(DataConfig(data_path=(str(tmp_path / "nowhere"),)))


@pytest.mark.parametrize("flag", ["data_path", "train_data_path"])
@pytest.mark.parametrize("weights", [(), ("0.5", "0.5"), ("9", "1")])
def test_dataset_named_twice_is_refused(tmp_path, monkeypatch, flag, weights):
    """By the same name, by another spelling, or by a link."""
    d = write(tmp_path / "d", 10)
    other = write(tmp_path / "other", 10)
    (tmp_path / "links").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / "links" / f"soft{suffix}").symlink_to(d + suffix)
        (tmp_path / "links" / f"hard{suffix}").hardlink_to(d + suffix)
    monkeypatch.chdir(tmp_path)
    for again in (d, "d", "./d", "links/../d", "links/soft", "links/hard"):
        words = (other, d, again) if not weights else (weights[0], d, weights[1], again)
        also = "" if again == d else rf" \(also as {d}\)"
        with pytest.raises(
            ValueError,
            match=rf"^--{flag.replace('_', '-')} names {again} twice{also}; allowed: each dataset "
            r"once, because each of its samples would come twice in a row. Name it once, with "
            r"the sum of its weights$",
        ):
            splits(DataConfig(**{flag: words}, split="1"))
    assert splits(DataConfig(**{flag: (d, other)}, split="1"))["train"] is not None
    with pytest.raises(ValueError, match="^--valid-data-path names .*d twice"):
        splits(DataConfig(train_data_path=(d,), valid_data_path=(other, d, d)), 5, 5)


def test_copy_of_a_dataset_is_logged(tmp_path, caplog):
    """Once, although training and validation share the blend."""
    d = write(tmp_path / "d", 40)
    copy = str(tmp_path / "copy")
    for suffix in (".bin", ".idx"):
        shutil.copy(d + suffix, copy + suffix)
    splits(DataConfig(data_path=("0.5", d, "0.5", copy), split="8,2"), 5, 5)
    (message,) = [m for m in caplog.messages if "same content" in m]
    assert message.startswith(f"--data-path: {copy} has the same content as {d}: each of its")
    caplog.clear()
    splits(DataConfig(data_path=(d, write(tmp_path / "other", 39)), split="8,2"), 5, 5)
    assert not [m for m in caplog.messages if "same content" in m]


def test_sidecar_must_match_tokenizer(tmp_path):
    prefix = write(tmp_path / "d", 10, sidecar=SIDECAR)
    data = DataConfig(data_path=(prefix,), split="1")
    assert len(splits(data, tokenizer=ByteTokenizer(), vocab_size=257)["train"]) == 5
    with pytest.raises(
        ValueError,
        match="d.json records vocab_hash .* of ByteTokenizer, this run's NullTokenizer has",
    ):
        splits(data, tokenizer=NullTokenizer(300))
    with pytest.raises(
        ValueError, match="records a vocabulary of 257 tokens; allowed in this run: 256"
    ):
        splits(data, vocab_size=256)
    write(tmp_path / "d", 10, sidecar={**SIDECAR, "vocab_size": "big"})
    with pytest.raises(ValueError, match="records a vocabulary of big tokens"):
        splits(data, vocab_size=256)
    write(tmp_path / "d", 10, sidecar={**SIDECAR, "eod": 0})
    with pytest.raises(
        ValueError, match="records eod 0 of ByteTokenizer, this run's ByteTokenizer has 256"
    ):
        splits(data, tokenizer=ByteTokenizer())
    (tmp_path / "d.json").unlink()
    check_sidecar(IndexedDataset(prefix), NullTokenizer(5), 5)
    assert splits(data, tokenizer=NullTokenizer(300))["train"] is not None
