"""Preprocessing against a dumb loop: the same bytes however it is cut, shared out, interrupted or killed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.schema import TokenizerConfig
from megatron.data import encode as encode_module
from megatron.data import preprocess as module
from megatron.data.encode import Encoders, Recipe, build_splitter, encode, usable_cores, with_eod
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import Job, Preprocessing, preprocess
from megatron.data.sources import open_sources
from megatron.data.tokenizer import ByteTokenizer, FastBPE, flatten
from megatron.data.work import WorkFolder
from programs import REPO, documents, jsonl

BYTES = TokenizerConfig(tokenizer_type="ByteTokenizer")
PAIR = (".bin", ".idx", ".json")


def corpus(folder: Path, records: int = 400, bad: bool = False) -> list[str]:
    """Two files of records with a text and a title, some empty, some unusable; returns their names."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(1)
    names = []
    for n in range(2):
        lines = []
        for i in range(records // 2):
            record = {"text": f"text {n}.{i} " + "é" * rng.randrange(60) if i % 7 else "", "title": f"t{i}"}
            lines.append(json.dumps(record))
            if bad and i % 30 == 11:
                lines.append(rng.choice(["{", '{"text": 1}', '["text"]', '{"text": "x"}', "\ud800"]))
            if i % 50 == 3:
                lines.append("")
        names.append(str(folder / f"{n}.jsonl"))
        Path(names[-1]).write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    return names


def loop(names: list[str], key: str, limit: int = 0) -> list[list[int]]:
    """What must come out, one record at a time, by the standard library."""
    out = []
    for name in names:
        for line in Path(name).read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
                texts = [record[k] for k in ("text", "title")]
                assert all(isinstance(t, str) for t in texts)
            except (ValueError, KeyError, TypeError, AssertionError):
                continue
            ids = [*record[key].encode()]
            out.append([*ids, 256] if ids else [])
    return out[:limit] if limit else out


def job(names: list[str], prefix: Path, **changes) -> Job:
    return Job(names, str(prefix), Recipe(BYTES, ("text", "title"), append_eod=True), **changes)


def content(prefix: Path, suffixes=(".bin", ".idx", ".json")) -> list[bytes]:
    return [Path(f"{prefix}_{key}_document{suffix}").read_bytes() for key in ("text", "title") for suffix in suffixes]


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Start the workers without waiting, and leave the first chunks to them."""
    monkeypatch.setattr(encode_module, "ALONE_SECONDS", 0)
    real = Encoders._submit

    def wait(self, chunk):
        future = real(self, chunk)
        return future if chunk else future.result() or future

    monkeypatch.setattr(Encoders, "_submit", wait)


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> tuple[list[str], Path]:
    """(names of the files, prefix of what they become in one piece): with unusable records, which are skipped."""
    folder = tmp_path_factory.mktemp("bad")
    names = corpus(folder / "in", bad=True)
    preprocess(job(names, folder / "whole", skip_errors=True))
    return names, folder / "whole"


def test_against_a_loop(bad):
    names, whole = bad
    for key in ("text", "title"):
        assert documents(f"{whole}_{key}_document") == loop(names, key)
    rejected = [json.loads(line) for line in Path(f"{whole}.rejected.jsonl").read_text().splitlines()]
    lines = {name: Path(name).read_bytes().split(b"\n") for name in names}
    assert len(rejected) == 14 and all(
        r["record"].encode() == lines[r["file"]][r["line"] - 1].decode(errors="backslashreplace").encode()
        for r in rejected)
    assert IndexedDataset(f"{whole}_text_document").sidecar["skipped"] == 14
    assert sorted(os.listdir(whole.parent)) == sorted(
        ["in", "whole.rejected.jsonl", *(f"whole_{key}_document{s}" for key in ("text", "title") for s in PAIR)])


@pytest.mark.parametrize("chunk_bytes", [1, 100, 3000, 10**7])
def test_chunks_of_any_size_give_the_same(bad, tmp_path, chunk_bytes):
    names, whole = bad
    preprocess(job(names, tmp_path / "x", skip_errors=True), chunk_bytes=chunk_bytes)
    assert content(tmp_path / "x") == content(whole)
    assert (tmp_path / "x.rejected.jsonl").read_bytes() == Path(f"{whole}.rejected.jsonl").read_bytes()


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same(bad, tmp_path, workers, at_once):
    names, whole = bad
    with Preprocessing(job(names, tmp_path / "x", skip_errors=True, workers=workers), chunk_bytes=500) as work:
        assert len([*work]) > 20 and work.read == work.size
        work.finish()
    assert content(tmp_path / "x") == content(whole)
    assert (tmp_path / "x.rejected.jsonl").read_bytes() == Path(f"{whole}.rejected.jsonl").read_bytes()


@pytest.mark.parametrize("limit", [1, 57, 180, 250, 399, 400, 1000])
def test_the_first_documents_only(bad, tmp_path, limit):
    names, _ = bad
    for n, chunk_bytes in enumerate((200, 10**7)):
        preprocess(job(names, tmp_path / f"{n}", skip_errors=True, max_documents=limit), chunk_bytes=chunk_bytes)
        for key in ("text", "title"):
            assert documents(tmp_path / f"{n}_{key}_document") == loop(names, key, limit)
    rejected = tmp_path / "0.rejected.jsonl"
    assert content(tmp_path / "0") == content(tmp_path / "1")
    assert rejected.exists() == (limit > 11) and (limit == 1 or
                                                  rejected.read_bytes() == (tmp_path / "1.rejected.jsonl").read_bytes())


def test_an_error_behind_the_first_documents_is_not_reached(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{\n')
    recipe = Recipe(BYTES)
    (totals,) = preprocess(Job([str(path)], str(tmp_path / "x"), recipe, max_documents=2))
    assert totals.documents == 2 and (totals.tokens, totals.bytes) == (2, 2)
    with pytest.raises(ValueError, match="a.jsonl:3: not a JSON object"):
        preprocess(Job([str(path)], str(tmp_path / "y"), recipe, max_documents=3))
    assert not list(tmp_path.glob("y*"))


def test_all_records_unusable(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n[\n")
    with pytest.raises(ValueError, match="has no documents: all 2 records were skipped"):
        preprocess(Job([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), Recipe(BYTES), skip_errors=True))
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


@pytest.mark.parametrize(("arguments", "match"), [({"workers": 0}, "--workers is 0"),
                                                  ({"max_documents": -1}, "--max-documents is -1")])
def test_jobs_that_make_no_sense(arguments, match):
    with pytest.raises(ValueError, match=match):
        job(["a"], Path("x"), **arguments)


def stop_after(work: Preprocessing, chunks: int) -> None:
    for _ in zip(range(chunks), work):
        pass


def test_a_run_continues_where_it_was_committed(bad, tmp_path, caplog, at_once):
    """Stop at any chunk, with what came after the last commit lost, any number of times."""
    caplog.set_level(logging.INFO, "megatron")
    names, whole = bad
    this, counts = job(names, tmp_path / "x", skip_errors=True), []
    for n in range(1, 9):
        with Preprocessing(replace(this, workers=1 + n % 2), commit_seconds=1e9, chunk_bytes=700) as work:
            assert work.resumed == (n > 1)
            stop_after(work, 3)
            work.commit()
            counts.append(work.documents)
            stop_after(work, 2)  # not committed
            assert not (tmp_path / "x_text_document.idx").exists()
    assert counts == sorted(set(counts))
    assert caplog.text.count("continuing the unfinished run") == 7
    preprocess(this, chunk_bytes=700)
    assert content(tmp_path / "x") == content(whole)
    assert (tmp_path / "x.rejected.jsonl").read_bytes() == Path(f"{whole}.rejected.jsonl").read_bytes()
    assert not (tmp_path / "x.partial").exists()


def interrupt(this: Job) -> None:
    with Preprocessing(this, chunk_bytes=700) as work:
        stop_after(work, 6)
        work.commit()


@pytest.mark.parametrize(("change", "named"), [
    (lambda j: replace(j, recipe=replace(j.recipe, append_eod=False)), "append eod"),
    (lambda j: replace(j, recipe=replace(j.recipe, keys=("text",))), "keys"),
    (lambda j: replace(j, recipe=replace(j.recipe, tokenizer=TokenizerConfig("NullTokenizer", tokenizer_model="9"))),
     "tokenizer"),
    (lambda j: replace(j, max_documents=3), "max documents"),
    (lambda j: replace(j, inputs=j.inputs[:1]), "inputs"),
    (lambda j: os.utime(j.inputs[0], (1, 1)) or j, "inputs"),
    (lambda j: replace(j, skip_errors=False), "--on-error, and records were skipped"),
])
def test_another_job_starts_again(tmp_path, caplog, change, named):
    names = corpus(tmp_path / "in", bad=True)
    this = job(names, tmp_path / "x", skip_errors=True)
    interrupt(this)
    with Preprocessing(change(this)) as work:
        assert not work.resumed and work.documents == 0 and work.read == 0
    assert f"differs in: {named}. Starting again" in caplog.text
    assert not list(tmp_path.glob("x*"))


def test_work_that_was_cut_off_starts_again(bad, tmp_path, caplog):
    names, whole = bad
    this = job(names, tmp_path / "x", skip_errors=True)
    interrupt(this)
    os.truncate(tmp_path / "x.partial/x_title_document.bin", 5)
    preprocess(this)
    assert "differs in: files that were cut off" in caplog.text and content(tmp_path / "x") == content(whole)


@pytest.mark.parametrize("step", range(9))
def test_interrupted_while_publishing(bad, tmp_path, monkeypatch, step):
    """After any of the renames of two pairs and of the rejected records, over an older result."""
    names, whole = bad
    preprocess(job(corpus(tmp_path / "old", 10), tmp_path / "x"))
    real, steps = os.replace, []

    def dying(source, target):
        if str(target).startswith(str(tmp_path / "x_")) or str(target).endswith("rejected.jsonl"):
            steps.append(target)
            if len(steps) > step:
                raise KeyboardInterrupt
        real(source, target)

    this = job(names, tmp_path / "x", skip_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt) if step < 7 else pytest.MonkeyPatch.context():
            preprocess(this)
    for path in tmp_path.glob("*.idx"):
        assert IndexedDataset(path.with_suffix("")).num_documents == (400 if str(path) in steps[:step] else 10)
    (totals, _) = preprocess(this)
    assert totals.documents == 400 and content(tmp_path / "x") == content(whole)
    assert (tmp_path / "x.rejected.jsonl").read_bytes() == Path(f"{whole}.rejected.jsonl").read_bytes()
    assert not (tmp_path / "x.partial").exists()


VICTIM = """
import json, sys
from megatron.data import encode
from megatron.config.schema import TokenizerConfig
from megatron.data.encode import Recipe
from megatron.data.preprocess import Job, preprocess
encode.ALONE_SECONDS = 0
if __name__ == "__main__":
    names, prefix, workers = json.loads(sys.argv[1])
    recipe = Recipe(TokenizerConfig(tokenizer_type="ByteTokenizer"), ("text", "title"), append_eod=True)
    print("start", flush=True)
    preprocess(Job(names, prefix, recipe, skip_errors=True, workers=workers), commit_seconds=0, chunk_bytes=60)
"""


def victim(folder: Path, names: list[str], prefix: Path, workers: int) -> subprocess.Popen:
    program = folder / "victim.py"
    program.write_text(VICTIM)
    process = subprocess.Popen([sys.executable, str(program), json.dumps([names, str(prefix), workers])],
                               stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPO)})
    assert process.stdout.readline() == b"start\n"
    return process


def test_killed_twenty_times(bad, tmp_path):
    """At random moments, committing after every chunk; between two lives nothing that looks finished is wrong."""
    names, whole = bad
    rng, kills = random.Random(0), 0
    while kills < 20:
        process = victim(tmp_path, names, tmp_path / "x", 1)
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        for path in tmp_path.glob("*.idx"):
            assert documents(path.with_suffix("")) == loop(names, path.stem.split("_")[1])
    assert victim(tmp_path, names, tmp_path / "x", 1).wait() == 0
    assert content(tmp_path / "x") == content(whole)
    assert (tmp_path / "x.rejected.jsonl").read_bytes() == Path(f"{whole}.rejected.jsonl").read_bytes()
    assert not (tmp_path / "x.partial").exists()


def children(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(stat.parent.name))
        except OSError:  # ended meanwhile
            continue
    return found


def test_workers_end_with_a_killed_parent_and_a_killed_worker_ends_the_run(bad, tmp_path, at_once):
    names, whole = bad
    process = victim(tmp_path, names, tmp_path / "x", 2)
    while len(workers := children(process.pid)) < 3:  # two, and the one that cleans up after multiprocessing
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with Preprocessing(job(names, tmp_path / "x", skip_errors=True, workers=2), chunk_bytes=60) as work:
        with pytest.raises(OSError, match="a worker process ended before its work was done"):
            for _ in work:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, signal.SIGKILL)
        work.commit()
    preprocess(job(names, tmp_path / "x", skip_errors=True, workers=2))
    assert content(tmp_path / "x") == content(whole)


def test_a_second_run_on_a_prefix_is_refused(bad, tmp_path):
    names, _ = bad
    with WorkFolder(tmp_path / "x"), pytest.raises(ValueError, match=rf"x is being written by process {os.getpid()}"):
        preprocess(job(names, tmp_path / "x"))


def test_a_result_is_not_touched_by_a_failure(bad, tmp_path):
    good = corpus(tmp_path / "good")
    preprocess(job(good, tmp_path / "x"))
    before = content(tmp_path / "x")
    with pytest.raises(ValueError, match="0.jsonl:1[0-9]: .*--on-error skip"):
        preprocess(job(bad[0], tmp_path / "x"))
    assert content(tmp_path / "x") == before and not (tmp_path / "x.partial").exists()


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
        return flatten(self._reference(texts) if self._fast is None else self.encode_batch_list(texts))

    def _reference(self, texts):
        return [[*t.encode()] for t in texts]

    def _decode(self, ids):
        return bytes(ids).decode()


@pytest.mark.parametrize("chunk_bytes", [30, 10**6])
def test_a_fast_encoder_that_errs_is_left_from_that_file_on(tmp_path, monkeypatch, caplog, chunk_bytes):
    """Files are compared one by one: the first does not show the fault, the second does at its beginning."""
    monkeypatch.setattr(encode_module, "build_tokenizer", lambda config, threads: Doubtful())
    a = jsonl(tmp_path / "a.jsonl", ["plain"] * 20 + ["é"])
    b = jsonl(tmp_path / "b.jsonl", ["plain", "é", "éé"] * 9)
    preprocess(Job([str(a), str(b)], str(tmp_path / "x"), Recipe(BYTES)), chunk_bytes=chunk_bytes)
    texts = [bytes(ids).decode() for ids in documents(tmp_path / "x_text_document")]
    assert texts == ["plain"] * 20 + ["e"] + ["plain", "é", "éé"] * 9
    said = [r.message for r in caplog.records if r.name == "megatron"]
    assert sum(m.startswith(f"{b}: gigatoken encodes a document differently") for m in said) == 1


def test_a_token_outside_the_vocabulary_is_not_written(tmp_path, monkeypatch):
    class Wild(ByteTokenizer):
        def encode_batch(self, texts):
            return np.array([70000], np.uint32), np.array([1])

    monkeypatch.setattr(encode_module, "build_tokenizer", lambda config, threads: Wild())
    path = jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(ValueError, match="a.jsonl.*gives the token id 70000, outside its vocabulary of 257"):
        preprocess(Job([str(path)], str(tmp_path / "x"), Recipe(BYTES)))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_text_that_the_tokenizer_refuses_is_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["1 2", "3 x"])
    null = TokenizerConfig("NullTokenizer", tokenizer_model="5")
    with pytest.raises(ValueError, match="a.jsonl.*'x' is no token id for NullTokenizer"):
        preprocess(Job([str(path)], str(tmp_path / "x"), Recipe(null)))


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
    assert out.tolist() == [t for s in expected for t in s] and new.tolist() == [*map(len, expected)]
    assert out.dtype == np.uint16


def test_usable_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, cores in (("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8)):
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
    recipe = Recipe(BYTES, append_eod=True, split_sentences="english")
    (totals,) = preprocess(Job([str(path)], str(tmp_path / "x"), recipe))
    assert totals.prefix == str(tmp_path / "x_text_sentence") and totals.documents == 4
    d = IndexedDataset(totals.prefix)
    assert [bytes(s[s < 256].tolist()).decode() for s in d] == [
        "Dr. Smith is here.", " How are you?", "  Fine.", "\n\nYes. ", "One", " \n"]
    assert d.document_index.tolist() == [0, 4, 4, 5, 6]
    assert [256 in s for s in d] == [False, False, False, True, True, True]
    assert [d.read(i)[:-1].tobytes() for i in (0, 2)] == [np.frombuffer(texts[i].encode(), np.uint8).astype(
        np.uint16).tobytes() for i in (0, 2)]
    assert d.sidecar["split_sentences"] == "english"


def test_a_begin_token_comes_once_per_document_also_with_sentences(tmp_path, punkt):
    class WithBos(ByteTokenizer):
        bos = 255

        def encode_batch(self, texts):
            return flatten([[255, *t.encode()] for t in texts])

    (chunk,) = open_sources([str(jsonl(tmp_path / "a.jsonl", ["A cat. A dog. It", "One. Two"]))])[0].chunks(["text"])
    recipe = Recipe(BYTES, split_sentences="english")
    tokens = encode(chunk, recipe, WithBos(), build_splitter("english")).keys["text"]
    assert tokens.ids.tolist() == [255, *b"A cat. A dog. It", 255, *b"One. Two"]
    assert tokens.lengths.tolist() == [7, 7, 3, 5, 4] and tokens.counts.tolist() == [3, 2]


def test_sentence_splitters_that_are_not_there(monkeypatch, punkt):
    with pytest.raises(ValueError, match="--lang is 'klingon', .*nltk.downloader punkt_tab"):
        build_splitter("klingon")
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    with pytest.raises(ValueError, match="needs the package nltk, which is not installed"):
        Encoders(Recipe(BYTES, split_sentences="english"), 1)


def test_state_of_another_layout_is_not_used(bad, tmp_path, monkeypatch, caplog):
    this = job(bad[0], tmp_path / "x", skip_errors=True)
    interrupt(this)
    monkeypatch.setattr(module, "LAYOUT", 99)
    preprocess(this)
    assert "differs in: layout" in caplog.text and content(tmp_path / "x") == content(bad[1])
