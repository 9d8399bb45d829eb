"""Preprocessing against a dumb loop: the same bytes however it is cut, shared out, interrupted or killed."""

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

from helpers.corpora import BYTES, PAIR, content, corpus, job, loop
from helpers.programs import documents, jsonl
from megatron.config.schema import TokenizerConfig
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.ingest import encode as encode_module
from megatron.data.ingest.encode import (
    EncodeConfig,
    EncoderPool,
    build_splitter,
    encode,
    usable_cores,
    with_eod,
)
from megatron.data.ingest.preprocess import PreprocessConfig, PreprocessRun, preprocess
from megatron.data.ingest.sources import open_sources
from megatron.tokenizer.base import flatten
from megatron.tokenizer.byte import ByteTokenizer
from megatron.tokenizer.fast_bpe import FastBPE


def test_against_a_loop(bad):
    names, whole = bad
    for key in ("text", "title"):
        assert documents(f"{whole}_{key}_document") == loop(names, key)
    rejected = [
        json.loads(line) for line in Path(f"{whole}.rejected.jsonl").read_text().splitlines()
    ]
    lines = {name: Path(name).read_bytes().split(b"\n") for name in names}
    assert len(rejected) == 14 and all(
        r["record"].encode()
        == lines[r["file"]][r["line"] - 1].decode(errors="backslashreplace").encode()
        for r in rejected
    )
    assert IndexedDataset(f"{whole}_text_document").sidecar["skipped"] == 14
    assert sorted(os.listdir(whole.parent)) == sorted(
        [
            "in",
            "whole.rejected.jsonl",
            *(f"whole_{key}_document{s}" for key in ("text", "title") for s in PAIR),
        ]
    )


@pytest.mark.parametrize("chunk_bytes", [1, 100, 3000, 10**7])
def test_chunks_of_any_size_give_the_same(bad, tmp_path, chunk_bytes):
    names, whole = bad
    preprocess(job(names, tmp_path / "x", skip_errors=True), chunk_bytes=chunk_bytes)
    assert content(tmp_path / "x") == content(whole)
    assert (tmp_path / "x.rejected.jsonl").read_bytes() == Path(
        f"{whole}.rejected.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same(bad, tmp_path, workers, at_once):
    names, whole = bad
    with PreprocessRun(
        job(names, tmp_path / "x", skip_errors=True, workers=workers), chunk_bytes=500
    ) as work:
        assert len([*work]) > 20 and work.read == work.size
        work.finish()
    assert content(tmp_path / "x") == content(whole)
    assert (tmp_path / "x.rejected.jsonl").read_bytes() == Path(
        f"{whole}.rejected.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("limit", [1, 57, 180, 250, 399, 400, 1000])
def test_the_first_documents_only(bad, tmp_path, limit):
    names, _ = bad
    for n, chunk_bytes in enumerate((200, 10**7)):
        preprocess(
            job(names, tmp_path / f"{n}", skip_errors=True, max_documents=limit),
            chunk_bytes=chunk_bytes,
        )
        for key in ("text", "title"):
            assert documents(tmp_path / f"{n}_{key}_document") == loop(names, key, limit)
    rejected = tmp_path / "0.rejected.jsonl"
    assert content(tmp_path / "0") == content(tmp_path / "1")
    assert rejected.exists() == (limit > 11) and (
        limit == 1 or rejected.read_bytes() == (tmp_path / "1.rejected.jsonl").read_bytes()
    )


def test_an_error_behind_the_first_documents_is_not_reached(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{\n')
    recipe = EncodeConfig(BYTES)
    (totals,) = preprocess(
        PreprocessConfig([str(path)], str(tmp_path / "x"), recipe, max_documents=2)
    )
    assert totals.documents == 2 and (totals.tokens, totals.bytes) == (2, 2)
    with pytest.raises(ValueError, match="a.jsonl:3: not a JSON object"):
        preprocess(PreprocessConfig([str(path)], str(tmp_path / "y"), recipe, max_documents=3))
    assert not list(tmp_path.glob("y*"))


def test_all_records_unusable(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n[\n")
    with pytest.raises(ValueError, match="has no documents: all 2 records were skipped"):
        preprocess(
            PreprocessConfig(
                [str(tmp_path / "a.jsonl")],
                str(tmp_path / "x"),
                EncodeConfig(BYTES),
                skip_errors=True,
            )
        )
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_the_first_rejections_are_shown_and_old_ones_removed(bad, tmp_path, caplog):
    names, _ = bad
    caplog.set_level(logging.WARNING, "megatron")
    preprocess(job(names, tmp_path / "x", skip_errors=True))
    shown = [r.message for r in caplog.records if r.message.startswith("skipped ")]
    assert len(shown) == 5 and all(m.startswith(f"skipped {names[0]}:") for m in shown)
    assert (tmp_path / "x.rejected.jsonl").exists()
    preprocess(job(corpus(tmp_path / "good"), tmp_path / "x", skip_errors=True))
    assert not (tmp_path / "x.rejected.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"workers": 0}, "--workers is 0"),
        ({"max_documents": -1}, "--max-documents is -1"),
        *(
            ({"output_prefix": prefix}, "--output-prefix is '.*'; allowed: a path")
            for prefix in ("", ".", "a/", "a/..")
        ),
        *(
            (
                {"recipe": EncodeConfig(BYTES, (key,))},
                "--json-keys is '.*'; allowed: .* without a slash",
            )
            for key in ("", "a/b", "/../../c", "a\0")
        ),
    ],
)
def test_jobs_that_make_no_sense(arguments, match):
    with pytest.raises(ValueError, match=match):
        replace(job(["a"], Path("x")), **arguments)


def test_inputs_that_the_output_would_replace(tmp_path):
    preprocess(job(corpus(tmp_path / "in"), tmp_path / "in/x"))
    (tmp_path / "in/x.rejected.jsonl").write_text("{}")
    for inputs in ([str(tmp_path / "in")], [str(tmp_path / "in/x.rejected.jsonl")]):
        with pytest.raises(
            ValueError, match="--input names .*in/x.*, which this run would write"
        ):
            preprocess(job(inputs, tmp_path / "in/x"))
    assert len(documents(tmp_path / "in/x_text_document")) == 400


class Doubtful(FastBPE):
    """Bytes; its fast encoder errs on texts with an é."""

    name, vocab_size, eod, fingerprint = "Doubtful", 257, 256, "f"

    def __init__(self):
        self._fast = self

    def encode_batch_list(self, texts):
        return [[*t.replace("é", "e").encode()] for t in texts]

    def encode_batch(self, texts):
        if self._fast is not None and texts and self._to_compare:
            self._compare(texts)
        return flatten(
            self._reference(texts) if self._fast is None else self.encode_batch_list(texts)
        )

    def _reference(self, texts):
        return [[*t.encode()] for t in texts]

    def _decode(self, ids):
        return bytes(ids).decode()


def test_a_fast_encoder_that_errs_is_left_from_that_file_on(tmp_path, monkeypatch, caplog):
    """Files are compared one by one: the first does not show the fault, the second does at its beginning."""
    monkeypatch.setattr(encode_module, "build_tokenizer", lambda config, threads: Doubtful())
    a = jsonl(tmp_path / "a.jsonl", ["plain"] * 20 + ["é"])
    b = jsonl(tmp_path / "b.jsonl", ["plain", "é", "éé"] * 9)
    preprocess(PreprocessConfig([str(a), str(b)], str(tmp_path / "x"), EncodeConfig(BYTES)))
    texts = [bytes(ids).decode() for ids in documents(tmp_path / "x_text_document")]
    assert texts == ["plain"] * 20 + ["e"] + ["plain", "é", "éé"] * 9
    said = [r.message for r in caplog.records if r.name == "megatron"]
    assert (
        sum(m.startswith(f"{b}: gigatoken encodes a document differently") for m in said) == 1
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_found_late_in_a_pipe_loses_nothing(tmp_path, monkeypatch, at_once, workers):
    """Each chunk's first document is compared; what is under way then is encoded again, and not read again."""
    monkeypatch.setattr(encode_module, "build_tokenizer", lambda config, threads: Doubtful())
    monkeypatch.setattr(encode_module, "ProcessPoolExecutor", InProcess)
    os.mkfifo(tmp_path / "pipe")
    lines = b"".join(
        json.dumps({"text": t}).encode() + b"\n" for t in ["plain"] * 40 + ["é"] * 300
    )
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(lines,))
    writer.start()
    preprocess(
        PreprocessConfig(
            [str(tmp_path / "pipe")], str(tmp_path / "x"), EncodeConfig(BYTES), workers=workers
        ),
        chunk_bytes=60,
    )
    writer.join()
    texts = [bytes(ids).decode() for ids in documents(tmp_path / "x_text_document")]
    assert texts == ["plain"] * 40 + ["é"] * 300


class InProcess(concurrent.futures.ThreadPoolExecutor):
    """A pool whose worker sees what the test has patched."""

    def __init__(self, workers, context, initializer, initargs):
        (recipe,) = initargs
        encode_module._OWN.update(recipe=recipe, tokenizer=Doubtful(), split=None)
        super().__init__(1)


def test_every_key_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "build_tokenizer", lambda config, threads: Doubtful())
    path = jsonl(tmp_path / "a.jsonl", ["plain"] * 30, title="é")
    preprocess(job([str(path)], tmp_path / "x"))
    assert documents(tmp_path / "x_title_document") == [[*"é".encode(), 256]] * 30


def test_a_token_outside_the_vocabulary_is_not_written(tmp_path, monkeypatch):
    class Wild(ByteTokenizer):
        def encode_batch(self, texts):
            return np.array([70000], np.uint32), np.array([1])

    monkeypatch.setattr(encode_module, "build_tokenizer", lambda config, threads: Wild())
    path = jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(
        ValueError, match="a.jsonl.*gives the token id 70000, outside its vocabulary of 257"
    ):
        preprocess(PreprocessConfig([str(path)], str(tmp_path / "x"), EncodeConfig(BYTES)))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_text_that_the_tokenizer_refuses_is_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["1 2", "3 x"])
    null = TokenizerConfig("NullTokenizer", tokenizer_model="5")
    with pytest.raises(ValueError, match="a.jsonl.*'x' is no token id for NullTokenizer"):
        preprocess(PreprocessConfig([str(path)], str(tmp_path / "x"), EncodeConfig(null)))


@given(st.lists(st.lists(st.lists(st.integers(1, 9), max_size=3), max_size=3), max_size=5))
def test_with_eod_against_a_loop(rows):
    """Documents of sequences of ids: the id is added to the last sequence that has tokens."""
    sequences = [s for row in rows for s in row]
    ids, lengths = flatten(sequences)
    out, new = with_eod(ids, lengths, np.array([*map(len, rows)], np.int64), 0, np.uint16)
    expected = []
    for row in rows:
        row = [list(s) for s in row]
        for s in reversed(row):
            if s:
                s.append(0)
                break
        expected += row
    assert out.tolist() == [t for s in expected for t in s] and new.tolist() == [
        *map(len, expected)
    ]
    assert out.dtype == np.uint16


def test_usable_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, cores in (
        ("max 100000", 8),
        ("300000 100000", 3),
        ("50000 100000", 1),
        ("1600000 100000", 8),
    ):
        monkeypatch.setattr(Path, "read_text", lambda self, quota=quota: quota)
        assert usable_cores() == cores


@pytest.fixture
def punkt(tmp_path, monkeypatch) -> None:
    """A Punkt model in a folder of its own: the ones to download are not needed to show what is done with it."""
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
    recipe = EncodeConfig(BYTES, append_eod=True, split_sentences="english")
    (totals,) = preprocess(PreprocessConfig([str(path)], str(tmp_path / "x"), recipe))
    assert totals.prefix == str(tmp_path / "x_text_sentence") and totals.documents == 4
    d = IndexedDataset(totals.prefix)
    assert [bytes(s[s < 256].tolist()).decode() for s in d] == [
        "Dr. Smith is here.",
        " How are you?",
        "  Fine.",
        "\n\nYes. ",
        "One",
        " \n",
    ]
    assert d.document_index.tolist() == [0, 4, 4, 5, 6]
    assert [256 in s for s in d] == [False, False, False, True, True, True]
    assert [d.read(i)[:-1].tobytes() for i in (0, 2)] == [
        np.frombuffer(texts[i].encode(), np.uint8).astype(np.uint16).tobytes() for i in (0, 2)
    ]
    assert d.sidecar["split_sentences"] == "english"


def test_a_begin_token_comes_once_per_document_also_with_sentences(tmp_path, punkt):
    class WithBos(ByteTokenizer):
        bos = 255

        def encode_batch(self, texts):
            return flatten([[255, *t.encode()] for t in texts])

    (chunk,) = open_sources(
        [str(jsonl(tmp_path / "a.jsonl", ["A cat. A dog. It", "One. Two"]))]
    )[0].chunks(["text"])
    recipe = EncodeConfig(BYTES, split_sentences="english")
    tokens = encode(chunk, recipe, WithBos(), build_splitter("english")).keys["text"]
    assert tokens.ids.tolist() == [255, *b"A cat. A dog. It", 255, *b"One. Two"]
    assert tokens.lengths.tolist() == [7, 7, 3, 5, 4] and tokens.counts.tolist() == [3, 2]


def test_sentence_splitters_that_are_not_there(monkeypatch, punkt):
    with pytest.raises(ValueError, match="--lang is 'klingon', .*nltk.downloader punkt_tab"):
        build_splitter("klingon")
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    with pytest.raises(ValueError, match="needs the package nltk, which is not installed"):
        EncoderPool(EncodeConfig(BYTES, split_sentences="english"), 1)
