"""Which validation and test sets a run has, and what it logs about those it has not."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest

from megatron.config.schema import DataConfig
from megatron.data.indexed.writer import IndexedWriter
from megatron.data.splits import build_splits

SEQ_LENGTH = 8
NUM_SAMPLES = 12


def write(prefix: Path, documents: int, length: int = 10, first: int = 0) -> str:
    """Write documents of `length` tokens that are all the number of the document, from `first`."""
    with IndexedWriter(prefix, np.int32) as writer:
        numbers = np.repeat(np.arange(first, first + documents), length)
        writer.add_documents(numbers, [length] * documents)
    return str(prefix)


def splits(data: DataConfig, train: int = 0, evaluated: int = NUM_SAMPLES) -> dict:
    return build_splits(
        data,
        seq_length=SEQ_LENGTH,
        train_samples=train,
        valid_samples=evaluated,
        test_samples=evaluated,
        seed=1,
    )


def documents_in(samples) -> set[int]:
    return {int(token) for i in range(len(samples)) for token in samples[i]}


def missing(made: dict) -> set[str]:
    return {name for name, samples in made.items() if samples is None}


@pytest.fixture
def log(caplog, monkeypatch):
    """The log lines of rank 0 as (level, text)."""
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    caplog.set_level(logging.INFO, logger="megatron")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.mark.parametrize("split, none", [("95,5,0", {"test"}), ("1", {"valid", "test"})])
def test_share_of_zero_is_no_set(split, none, tmp_path, log):
    made = splits(DataConfig(data_path=(write(tmp_path / "d", 40),), split=split))
    assert missing(made) - {"train"} == none
    names = {"valid": "validation set", "test": "test set"}
    assert log() == [
        ("INFO", f"no {names[name]}: its share of --split {split} is 0")
        for name in ("valid", "test")
        if name in none
    ]


def test_too_few_documents_are_no_set(tmp_path, log):
    """60 documents have 2 to validate on by the default --split, and none to test on."""
    d = write(tmp_path / "d", 60)
    made = splits(DataConfig(data_path=(d,)), train=5)
    assert missing(made) == {"test"}
    assert documents_in(made["valid"]) == {58, 59}
    assert log() == [
        (
            "WARNING",
            "no test set: the share by --split 969,30,1 is less than one sample of 9 tokens in "
            f"{d} (0 of 60 documents, 0 tokens). Give it a larger share, or its own "
            "--test-data-path",
        )
    ]


@pytest.mark.parametrize("length, found", [(8, False), (9, True)])
def test_share_needs_tokens_of_a_sample(length, found, tmp_path, log):
    """One document is too little if its tokens, 8, are fewer than the 9 of a sample."""
    d = write(tmp_path / "d", 10, length)
    made = splits(DataConfig(data_path=(d,), split="8,1,1"))
    for name, document in (("valid", 8), ("test", 9)):
        if found:
            assert documents_in(made[name]) == {document}
            assert len(made[name]) == NUM_SAMPLES
        else:
            assert made[name] is None
    warned = [text for level, text in log() if level == "WARNING"]
    assert len(warned) == (0 if found else 2)
    assert all("(1 of 10 documents, 8 tokens)" in text for text in warned)


@pytest.mark.parametrize("weights", [(), ("1", "2", "3")])
def test_blend_leaves_out_small_shares(weights, tmp_path, log):
    """Two of three datasets have a share to test on; their weights keep their proportion."""
    a, b, c = (
        write(tmp_path / name, number, first=1000 * i)
        for i, (name, number) in enumerate((("a", 40), ("b", 4), ("c", 120)))
    )
    words = (a, b, c)
    if weights:
        words = tuple(word for pair in zip(weights, words) for word in pair)
    data = DataConfig(data_path=words, split="8,1,1", data_cache_path=str(tmp_path))
    made = splits(data, train=90)
    assert not missing(made)
    assert documents_in(made["test"]) <= {*range(36, 40), *range(2108, 2120)}
    from_a = sum(made["test"].source(i) == a for i in range(NUM_SAMPLES))
    assert from_a == 3, "1 of 1 + 3 by weight, 4 of 4 + 12 documents by size"
    assert {made["train"].source(i) for i in range(90)} == {a, b, c}
    warned = [text for level, text in log() if level == "WARNING"]
    assert len(warned) == 1, "one of four documents is left to validate on"
    assert re.fullmatch(
        rf"datasets left out of the test set: .* in {b} \(0 of 4 documents, 0 tokens\)\. Give .*",
        warned[0],
    )


def test_long_list_of_small_shares_is_short(tmp_path, log):
    prefixes = tuple(write(tmp_path / f"d{i}", 3) for i in range(7))
    made = splits(DataConfig(data_path=prefixes), train=3)
    assert missing(made) == {"valid", "test"}
    texts = [text for _, text in log() if "same content" not in text]
    assert len(texts) == 2
    for text in texts:
        assert text.count("(0 of 3 documents, 0 tokens)") == 5
        assert "2 more. Give it" in text


def test_valid_path_without_test_path(tmp_path, log):
    d = write(tmp_path / "d", 20)
    made = splits(DataConfig(train_data_path=(d,), valid_data_path=(d,)), train=5)
    assert missing(made) == {"test"}
    assert log() == [("INFO", "no test set: neither --test-data-path nor --data-path is set")]


def test_streaming_without_evaluation_data(tmp_path, log):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    data = DataConfig(streaming_data_path=(str(tmp_path / "a.jsonl"),))
    assert missing(splits(data)) == {"train", "valid", "test"}
    assert log() == [
        ("INFO", "no validation set: neither --valid-data-path nor --data-path is set"),
        ("INFO", "no test set: neither --test-data-path nor --data-path is set"),
    ]


def test_no_evaluation_logs_nothing(tmp_path, log):
    """--eval-iters 0 requests no samples."""
    data = DataConfig(
        data_path=(write(tmp_path / "d", 3),), valid_sets=(f"x={tmp_path / 'nowhere'}",)
    )
    assert missing(splits(data, train=2, evaluated=0)) == {"valid", "valid/x", "test"}
    assert log() == []


def test_own_path_with_too_few_tokens_is_an_error(tmp_path):
    """It was requested by name, unlike a share."""
    d = write(tmp_path / "d", 20)
    empty = write(tmp_path / "empty", 0)
    with pytest.raises(ValueError, match="documents 0 to 0 of .*empty .* hold 0 tokens; one"):
        splits(DataConfig(data_path=(d,), valid_data_path=(empty,)))
    with pytest.raises(ValueError, match="documents 0 to 0 of .*empty .* hold 0 tokens; one"):
        splits(DataConfig(data_path=(d,), valid_sets=(f"a={d}", f"b={empty}")))


def test_named_sets_use_all_their_documents(tmp_path, log):
    a, b, c = (write(tmp_path / name, 10, first=100 * n) for n, name in enumerate("abc"))
    sets = (f"wiki={b}", "code=1", b, "3", c)
    data = DataConfig(train_data_path=(a,), valid_sets=sets, data_cache_path=str(tmp_path))
    made = splits(data, evaluated=80)
    assert list(made) == ["train", "valid", "valid/wiki", "valid/code", "test"]
    assert missing(made) == {"train", "valid", "test"}
    assert documents_in(made["valid/wiki"]) == set(range(100, 110))
    assert documents_in(made["valid/code"]) == {*range(100, 110), *range(200, 210)}
    assert sum(made["valid/code"].source(i) == c for i in range(80)) == 60
    assert [text for _, text in log()] == [
        "no test set: neither --test-data-path nor --data-path is set"
    ]


def test_wrong_blend_names_its_flag(tmp_path):
    d = write(tmp_path / "d", 10)
    for field, words, flag in (
        ("valid_data_path", ("1", d, d), "--valid-data-path"),
        ("train_data_path", ("-1", d), "a weight of --train-data-path"),
        ("valid_sets", (f"x={d}", "2"), "--valid-sets x="),
    ):
        with pytest.raises(ValueError, match=f"^{flag} is "):
            splits(DataConfig(**{"train_data_path": (d,), field: words}), train=1)
