"""Preprocessing: the same bytes as a reference loop, however the work is divided."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.corpora import (
    BYTE_TOKENIZER,
    PAIR_SUFFIXES,
    output_bytes,
    preprocess_config,
    reference_documents,
    rejected_bytes,
    write_corpus,
)
from helpers.programs import documents, jsonl
from megatron.config.schema import TokenizerConfig
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.ingest import encode as encode_module
from megatron.data.ingest import encoder_pool
from megatron.data.ingest.encode import ChunkEncoder, EncodeConfig, append_eod, build_splitter
from megatron.data.ingest.encoder_pool import EncoderPool, usable_cores
from megatron.data.ingest.preprocess import PreprocessConfig, PreprocessRun, preprocess
from megatron.data.ingest.sources import open_sources
from megatron.tokenizer.base import flatten
from megatron.tokenizer.byte import ByteTokenizer
from megatron.tokenizer.fast_bpe import FastBPE


def config_of(path: Path, prefix: Path, **changes) -> PreprocessConfig:
    """The job of preprocessing the key "text" of one file."""
    return PreprocessConfig([str(path)], str(prefix), EncodeConfig(BYTE_TOKENIZER), **changes)


# The result


def test_output_equals_reference_loop(bad_corpus):
    names, prefix = bad_corpus
    for key in ("text", "title"):
        assert documents(f"{prefix}_{key}_document") == reference_documents(names, key)
    rejected = [json.loads(line) for line in rejected_bytes(prefix).splitlines()]
    lines = {name: Path(name).read_bytes().split(b"\n") for name in names}
    assert len(rejected) == 14
    for record in rejected:
        line = lines[record["file"]][record["line"] - 1]
        assert record["record"].encode() == line.decode(errors="backslashreplace").encode()
    assert IndexedDataset(f"{prefix}_text_document").sidecar["skipped"] == 14
    pairs = [f"reference_{key}_document{s}" for key in ("text", "title") for s in PAIR_SUFFIXES]
    expected = ["in", "reference.rejected.jsonl", *pairs]
    assert sorted(os.listdir(prefix.parent)) == sorted(expected)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 3000, 10**7])
def test_chunk_size_does_not_matter(bad_corpus, tmp_path, chunk_bytes):
    names, reference = bad_corpus
    config = preprocess_config(names, tmp_path / "x", skip_errors=True)
    preprocess(config, chunk_bytes=chunk_bytes)
    assert output_bytes(tmp_path / "x") == output_bytes(reference)
    assert rejected_bytes(tmp_path / "x") == rejected_bytes(reference)


@pytest.mark.parametrize("workers", [2, 3])
def test_number_of_workers_does_not_matter(bad_corpus, tmp_path, workers, start_workers_first):
    names, reference = bad_corpus
    config = preprocess_config(names, tmp_path / "x", skip_errors=True, workers=workers)
    with PreprocessRun(config, chunk_bytes=500) as run:
        assert len([*run]) > 20 and run.bytes_read == run.total_bytes
        run.finish()
    assert output_bytes(tmp_path / "x") == output_bytes(reference)
    assert rejected_bytes(tmp_path / "x") == rejected_bytes(reference)


@pytest.mark.parametrize("limit", [1, 57, 180, 250, 399, 400, 1000])
def test_max_documents_takes_the_first(bad_corpus, tmp_path, limit):
    names, _ = bad_corpus
    for n, chunk_bytes in enumerate((200, 10**7)):
        config = preprocess_config(
            names, tmp_path / f"{n}", skip_errors=True, max_documents=limit
        )
        preprocess(config, chunk_bytes=chunk_bytes)
        for key in ("text", "title"):
            found = documents(tmp_path / f"{n}_{key}_document")
            assert found == reference_documents(names, key, limit)
    assert output_bytes(tmp_path / "0") == output_bytes(tmp_path / "1")
    assert (tmp_path / "0.rejected.jsonl").exists() == (limit > 11)
    if limit > 1:
        assert rejected_bytes(tmp_path / "0") == rejected_bytes(tmp_path / "1")


def test_error_after_max_documents_is_ignored(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{\n')
    (stats,) = preprocess(config_of(path, tmp_path / "x", max_documents=2))
    assert stats.documents == 2 and (stats.tokens, stats.bytes) == (2, 2)
    with pytest.raises(ValueError, match="a.jsonl:3: not a JSON object"):
        preprocess(config_of(path, tmp_path / "y", max_documents=3))
    assert not list(tmp_path.glob("y*"))


def test_only_unusable_records_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n[\n")
    with pytest.raises(ValueError, match="has no documents: all 2 records were skipped"):
        preprocess(config_of(tmp_path / "a.jsonl", tmp_path / "x", skip_errors=True))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_rejections_are_logged_and_replaced(bad_corpus, tmp_path, caplog):
    """The first five are logged. A later run without any removes the file of an earlier run."""
    names, _ = bad_corpus
    caplog.set_level(logging.WARNING, "megatron")
    preprocess(preprocess_config(names, tmp_path / "x", skip_errors=True))
    logged = [r.message for r in caplog.records if r.message.startswith("skipped ")]
    assert len(logged) == 5 and all(m.startswith(f"skipped {names[0]}:") for m in logged)
    assert (tmp_path / "x.rejected.jsonl").exists()
    good = write_corpus(tmp_path / "good")
    preprocess(preprocess_config(good, tmp_path / "x", skip_errors=True))
    assert not (tmp_path / "x.rejected.jsonl").exists()


# The configuration

BAD_PREFIXES = ("", ".", "a/", "a/..")
BAD_KEYS = ("", "a/b", "/../../c", "a\0")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"workers": 0}, "--workers is 0"),
        ({"max_documents": -1}, "--max-documents is -1"),
        *(
            ({"output_prefix": prefix}, "--output-prefix is '.*'; allowed: a path")
            for prefix in BAD_PREFIXES
        ),
        *(
            (
                {"encoding": EncodeConfig(BYTE_TOKENIZER, (key,))},
                "--json-keys is '.*'; allowed: .* without a slash",
            )
            for key in BAD_KEYS
        ),
    ],
)
def test_invalid_configurations_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        replace(preprocess_config(["a"], Path("x")), **changes)


def test_inputs_that_are_outputs_are_refused(tmp_path):
    preprocess(preprocess_config(write_corpus(tmp_path / "in"), tmp_path / "in/x"))
    (tmp_path / "in/x.rejected.jsonl").write_text("{}")
    match = "--input names .*in/x.*, which this run would write"
    for inputs in ([str(tmp_path / "in")], [str(tmp_path / "in/x.rejected.jsonl")]):
        with pytest.raises(ValueError, match=match):
            preprocess(preprocess_config(inputs, tmp_path / "in/x"))
    assert len(documents(tmp_path / "in/x_text_document")) == 400


# The fast encoder and its reference


class FaultyTokenizer(FastBPE):
    """A tokenizer of bytes whose fast encoder encodes texts with an é incorrectly."""

    name = "Faulty"
    vocab_size = 257
    eod = 256
    fingerprint = "f"

    def __init__(self):
        self._fast = self

    def encode_batch_list(self, texts):
        return [[*t.replace("é", "e").encode()] for t in texts]

    def encode_batch(self, texts):
        if self._fast is not None and texts and self._to_compare:
            self._compare(texts)
        if self._fast is None:
            return flatten(self._reference(texts))
        return flatten(self.encode_batch_list(texts))

    def _reference(self, texts):
        return [[*t.encode()] for t in texts]

    def _decode(self, ids):
        return bytes(ids).decode()


@pytest.fixture
def faulty_tokenizer(monkeypatch) -> None:
    monkeypatch.setattr(
        encode_module, "build_tokenizer", lambda config, threads: FaultyTokenizer()
    )


def decoded(prefix: Path) -> list[str]:
    return [bytes(ids).decode() for ids in documents(prefix)]


def test_faulty_encoder_is_replaced_per_file(tmp_path, faulty_tokenizer, caplog):
    """Each file is compared: the first does not show the fault, the second does at its start."""
    a = jsonl(tmp_path / "a.jsonl", ["plain"] * 20 + ["é"])
    b = jsonl(tmp_path / "b.jsonl", ["plain", "é", "éé"] * 9)
    encoding = EncodeConfig(BYTE_TOKENIZER)
    preprocess(PreprocessConfig([str(a), str(b)], str(tmp_path / "x"), encoding))
    expected = ["plain"] * 20 + ["e"] + ["plain", "é", "éé"] * 9
    assert decoded(tmp_path / "x_text_document") == expected
    logged = [r.message for r in caplog.records if r.name == "megatron"]
    start = f"{b}: gigatoken encodes a document differently"
    assert sum(m.startswith(start) for m in logged) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_late_fault_in_pipe_loses_nothing(
    tmp_path, monkeypatch, faulty_tokenizer, start_workers_first, workers
):
    """Each chunk's first document is compared. Chunks that are being encoded when a fault is
    found are encoded again, without reading them again."""
    monkeypatch.setattr(encoder_pool, "ProcessPoolExecutor", InProcess)
    os.mkfifo(tmp_path / "pipe")
    texts = ["plain"] * 40 + ["é"] * 300
    lines = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(lines,))
    writer.start()
    config = config_of(tmp_path / "pipe", tmp_path / "x", workers=workers)
    preprocess(config, chunk_bytes=60)
    writer.join()
    assert decoded(tmp_path / "x_text_document") == texts


class InProcess(concurrent.futures.ThreadPoolExecutor):
    """A pool whose worker runs in this process, so that it sees what the test replaced."""

    def __init__(self, workers, context, initializer, initargs):
        (config,) = initargs
        encoder_pool._worker_encoder = ChunkEncoder(config, FaultyTokenizer())
        super().__init__(1)


def test_every_key_is_compared(tmp_path, faulty_tokenizer):
    path = jsonl(tmp_path / "a.jsonl", ["plain"] * 30, title="é")
    preprocess(preprocess_config([str(path)], tmp_path / "x"))
    assert documents(tmp_path / "x_title_document") == [[*"é".encode(), 256]] * 30


def test_token_outside_vocabulary_is_refused(tmp_path, monkeypatch):
    class OutOfRange(ByteTokenizer):
        def encode_batch(self, texts):
            return np.array([70000], np.uint32), np.array([1])

    monkeypatch.setattr(encode_module, "build_tokenizer", lambda config, threads: OutOfRange())
    path = jsonl(tmp_path / "a.jsonl", ["x"])
    match = "a.jsonl.*gives the token id 70000, outside its vocabulary of 257"
    with pytest.raises(ValueError, match=match):
        preprocess(config_of(path, tmp_path / "x"))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_tokenizer_errors_name_the_file(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["1 2", "3 x"])
    null = TokenizerConfig("NullTokenizer", tokenizer_model="5")
    with pytest.raises(ValueError, match="a.jsonl.*'x' is no token id for NullTokenizer"):
        preprocess(PreprocessConfig([str(path)], str(tmp_path / "x"), EncodeConfig(null)))


@given(st.lists(st.lists(st.lists(st.integers(1, 9), max_size=3), max_size=3), max_size=5))
def test_append_eod_equals_reference_loop(rows):
    """The token is appended to the last sequence of each document that has tokens."""
    ids, lengths = flatten([s for row in rows for s in row])
    counts = np.array([*map(len, rows)], np.int64)
    out, new_lengths = append_eod(ids, lengths, counts, 0, np.uint16)
    expected = []
    for row in rows:
        row = [list(s) for s in row]
        for s in reversed(row):
            if s:
                s.append(0)
                break
        expected += row
    assert out.tolist() == [t for s in expected for t in s]
    assert new_lengths.tolist() == [*map(len, expected)]
    assert out.dtype == np.uint16


def test_usable_cores_respect_the_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, cores in (
        ("max 100000", 8),
        ("300000 100000", 3),
        ("50000 100000", 1),
        ("1600000 100000", 8),
    ):
        monkeypatch.setattr(Path, "read_text", lambda self, quota=quota: quota)
        assert usable_cores() == cores


# Sentences


@pytest.fixture
def punkt(tmp_path, monkeypatch) -> None:
    """A Punkt model trained here, so that the tests need none of the published ones."""
    nltk = pytest.importorskip("nltk")
    from nltk.tokenize import punkt

    folder = tmp_path / "nltk/tokenizers/punkt_tab/english"
    folder.mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    trainer = punkt.PunktTrainer("Dr. Smith went. Dr. Jones came. He said so. " * 20)
    punkt.save_punkt_params(trainer.get_params(), str(folder))


def test_sentences_become_sequences(tmp_path, punkt):
    texts = ["Dr. Smith is here. How are you?  Fine.\n\nYes. ", "", "One", " \n"]
    path = jsonl(tmp_path / "a.jsonl", texts)
    encoding = EncodeConfig(BYTE_TOKENIZER, append_eod=True, split_sentences="english")
    (stats,) = preprocess(PreprocessConfig([str(path)], str(tmp_path / "x"), encoding))
    assert stats.prefix == str(tmp_path / "x_text_sentence") and stats.documents == 4
    dataset = IndexedDataset(stats.prefix)
    assert [bytes(s[s < 256].tolist()).decode() for s in dataset] == [
        "Dr. Smith is here.",
        " How are you?",
        "  Fine.",
        "\n\nYes. ",
        "One",
        " \n",
    ]
    assert dataset.document_index.tolist() == [0, 4, 4, 5, 6]
    assert [256 in s for s in dataset] == [False, False, False, True, True, True]
    for i in (0, 2):
        text = np.frombuffer(texts[i].encode(), np.uint8).astype(np.uint16)
        assert dataset.read(i)[:-1].tobytes() == text.tobytes()
    assert dataset.sidecar["split_sentences"] == "english"


def test_each_document_has_one_bos(tmp_path, punkt):
    """Also when its sentences are encoded separately."""

    class WithBos(ByteTokenizer):
        bos = 255

        def encode_batch(self, texts):
            return flatten([[255, *t.encode()] for t in texts])

    path = jsonl(tmp_path / "a.jsonl", ["A cat. A dog. It", "One. Two"])
    (chunk,) = open_sources([str(path)])[0].chunks(["text"])
    config = EncodeConfig(BYTE_TOKENIZER, split_sentences="english")
    encoded = ChunkEncoder(config, WithBos()).encode(chunk).by_key["text"]
    assert encoded.ids.tolist() == [255, *b"A cat. A dog. It", 255, *b"One. Two"]
    assert encoded.sequence_lengths.tolist() == [7, 7, 3, 5, 4]
    assert encoded.sequence_counts.tolist() == [3, 2]


def test_missing_sentence_splitters_are_refused(monkeypatch, punkt):
    with pytest.raises(ValueError, match="--lang is 'klingon', .*nltk.downloader punkt_tab"):
        build_splitter("klingon")
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    with pytest.raises(ValueError, match="needs the package nltk, which is not installed"):
        EncoderPool(EncodeConfig(BYTE_TOKENIZER, split_sentences="english"), 1)
