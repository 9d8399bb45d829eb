"""Preprocessing that is interrupted, killed or disturbed: the same bytes, or a new start."""

from __future__ import annotations

import gzip
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

import pytest
import zstandard

from helpers.corpora import (
    output_bytes,
    preprocess_config,
    reference_documents,
    rejected_bytes,
    write_corpus,
)
from helpers.programs import REPO, documents, jsonl
from helpers.waiting import wait_until
from megatron.config.schema import TokenizerConfig
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig, PreprocessRun, preprocess
from megatron.io.staging_dir import StagingDir


def advance(run: PreprocessRun, chunks: int) -> None:
    """Process the next `chunks` chunks."""
    for _ in zip(range(chunks), run):
        pass


def test_run_continues_from_its_commit(bad_corpus, tmp_path, caplog, start_workers_first):
    """Stop at any chunk, lose what came after the last commit, any number of times."""
    caplog.set_level(logging.INFO, "megatron")
    names, reference = bad_corpus
    config = preprocess_config(names, tmp_path / "x", skip_errors=True)
    counts = []
    for n in range(1, 9):
        with PreprocessRun(
            replace(config, workers=1 + n % 2), commit_seconds=1e9, chunk_bytes=700
        ) as run:
            assert run.resumed == (n > 1)
            advance(run, 3)
            run.commit()
            counts.append(run.documents)
            advance(run, 2)  # not committed
            assert not (tmp_path / "x_text_document.idx").exists()
    assert counts == sorted(set(counts))
    assert caplog.text.count("continuing the unfinished run") == 7
    preprocess(config, chunk_bytes=700)
    assert output_bytes(tmp_path / "x") == output_bytes(reference)
    assert rejected_bytes(tmp_path / "x") == rejected_bytes(reference)
    assert not (tmp_path / "x.partial").exists()


def interrupt(config: PreprocessConfig) -> None:
    """Start a run and leave it after a commit."""
    with PreprocessRun(config, chunk_bytes=700) as run:
        advance(run, 6)
        run.commit()


STATE_KEYS = [
    "job",
    "source",
    "position",
    "line",
    "skipped",
    "rejected",
    "read",
    "published",
    "use_reference",
    "writers",
    "bytes",
]


def test_state_file_keeps_its_keys(bad_corpus, tmp_path):
    """Work that an earlier version left unfinished can be continued."""
    interrupt(preprocess_config(bad_corpus[0], tmp_path / "x", skip_errors=True))
    state = json.loads((tmp_path / "x.partial/state.json").read_text())
    assert list(state) == STATE_KEYS
    assert list(state["writers"]) == list(state["bytes"]) == ["text", "title"]
    assert list(state["writers"]["text"]) == [
        ".bin",
        ".lengths",
        ".counts",
        "documents",
        "tokens",
    ]


NULL_TOKENIZER = TokenizerConfig("NullTokenizer", tokenizer_model="9")


def with_encoding(config: PreprocessConfig, **changes) -> PreprocessConfig:
    return replace(config, encoding=replace(config.encoding, **changes))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda c: with_encoding(c, append_eod=False), "append eod"),
        (lambda c: with_encoding(c, keys=("text",)), "keys"),
        (lambda c: with_encoding(c, tokenizer=NULL_TOKENIZER), "tokenizer"),
        (lambda c: replace(c, max_documents=3), "max documents"),
        (lambda c: replace(c, inputs=c.inputs[:1]), "inputs"),
        (lambda c: os.utime(c.inputs[0], (1, 1)) or c, "inputs"),
        (lambda c: replace(c, skip_errors=False), "--on-error, and records were skipped"),
    ],
)
def test_different_job_starts_again(tmp_path, caplog, change, difference):
    names = write_corpus(tmp_path / "in", bad=True)
    config = preprocess_config(names, tmp_path / "x", skip_errors=True)
    interrupt(config)
    with PreprocessRun(change(config)) as run:
        assert not run.resumed and run.documents == 0 and run.bytes_read == 0
    assert f"differs in: {difference}. Starting again" in caplog.text
    assert not list(tmp_path.glob("x*"))


CUT_OFF = "files that were cut off or replaced"
UNREADABLE = "its state, which cannot be read"


@pytest.mark.parametrize(
    ("damage", "difference"),
    [
        (lambda folder: os.truncate(folder / "x_title_document.bin", 5), CUT_OFF),
        (lambda folder: (folder / "x_title_document.lengths").unlink(), CUT_OFF),
        (lambda folder: (folder / "rejected.jsonl").unlink(), CUT_OFF),
        (lambda folder: (folder / "state.json").write_text("{"), UNREADABLE),
        (lambda folder: (folder / "state.json").write_text("[]"), UNREADABLE),
        (lambda folder: (folder / "state.json").write_text("7"), UNREADABLE),
        (lambda folder: (folder / "state.json").write_text("[" * 100_000), UNREADABLE),
        (lambda folder: (folder / "state.json").write_text('{"job": {"layout": 0}}'), "layout"),
    ],
)
def test_damaged_work_starts_again(bad_corpus, tmp_path, caplog, damage, difference):
    names, reference = bad_corpus
    config = preprocess_config(names, tmp_path / "x", skip_errors=True)
    interrupt(config)
    damage(tmp_path / "x.partial")
    preprocess(config)
    assert f"differs in: {difference}. Starting again" in caplog.text
    assert output_bytes(tmp_path / "x") == output_bytes(reference)
    assert rejected_bytes(tmp_path / "x") == rejected_bytes(reference)


def test_changed_normalizer_starts_again(tmp_path, caplog):
    """The vocabulary, and with it the fingerprint of the tokenizer, stays the same."""
    from tokenizers import Tokenizer, models, normalizers

    tokenizer = Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1, "A": 2}, []))
    tokenizer.save(str(tmp_path / "t.json"))
    encoding = EncodeConfig(
        TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t.json"))
    )
    path = jsonl(tmp_path / "a.jsonl", ["A"] * 100)
    config = PreprocessConfig([str(path)], str(tmp_path / "x"), encoding)
    with PreprocessRun(config, chunk_bytes=50) as run:
        advance(run, 2)
        run.commit()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "t.json"))
    preprocess(config)
    assert "differs in: tokenizer" in caplog.text
    assert documents(tmp_path / "x_text_document") == [[1]] * 100


@pytest.mark.parametrize("when", ["commit", "finish", "next file"])
def test_input_changed_during_run_is_refused(tmp_path, when):
    names = write_corpus(tmp_path / "in")
    changed = 0 if when == "next file" else 1
    refused = pytest.raises(ValueError, match=f"{changed}.jsonl changed while it was read")
    config = preprocess_config(names, tmp_path / "x")
    with refused, PreprocessRun(config, chunk_bytes=700) as run:
        for encoded in run:
            if encoded.chunk.source == changed:
                os.utime(names[changed], (1, 1))
                if when == "commit":
                    run.commit()
        run.finish()
    assert os.listdir(tmp_path) == ["in"]


# Killed while publishing


def die_at(config: PreprocessConfig, step: int) -> None:
    """Run the job in a child that exits, as if killed, at this rename of the publication."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == (9 if step < 7 else 0)
        return
    replace_file = os.replace
    renamed = []

    def replace_or_exit(source, target):
        name = str(target)
        if name.startswith(f"{config.output_prefix}_") or name.endswith("rejected.jsonl"):
            renamed.append(target)
            if len(renamed) > step:
                os._exit(9)
        replace_file(source, target)

    os.replace = replace_or_exit
    preprocess(config)
    os._exit(0)


@pytest.mark.parametrize("step", range(8))
def test_killed_publication_is_completed(bad_corpus, tmp_path, step):
    """Exit before any of the renames of two pairs and of the rejected records, over an older
    result."""
    names, reference = bad_corpus
    old = preprocess_config(write_corpus(tmp_path / "old", 10), tmp_path / "x")
    preprocess(old)
    config = preprocess_config(names, tmp_path / "x", skip_errors=True)
    die_at(config, step)
    for path in tmp_path.glob("*.idx"):
        key = path.stem.split("_")[1]
        new_documents = reference_documents(names, key)
        old_documents = reference_documents(old.inputs, key)
        assert documents(path.with_suffix("")) in (new_documents, old_documents)
    (stats, _) = preprocess(config)
    assert stats.documents == 400
    assert output_bytes(tmp_path / "x") == output_bytes(reference)
    assert rejected_bytes(tmp_path / "x") == rejected_bytes(reference)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("step", [1, 3, 6])
def test_damaged_publication_starts_again(bad_corpus, tmp_path, step, caplog):
    """Its files are missing, and one is replaced by that of another result."""
    names, reference = bad_corpus
    config = preprocess_config(names, tmp_path / "x", skip_errors=True)
    die_at(config, step)
    for path in tmp_path.glob("x_*_document.*"):
        if path.is_file():
            path.unlink()
    preprocess(preprocess_config(write_corpus(tmp_path / "old", 10), tmp_path / "y"))
    os.rename(tmp_path / "y_text_document.bin", tmp_path / "x_text_document.bin")
    preprocess(config)
    assert "differs in: files that were cut off or replaced" in caplog.text
    assert output_bytes(tmp_path / "x") == output_bytes(reference)


# Killed at any moment

VICTIM = """
import json, sys
from helpers.corpora import preprocess_config
from megatron.data.ingest import encoder_pool
from megatron.data.ingest.preprocess import preprocess
encoder_pool._START_WORKERS_SECONDS = 0
if __name__ == "__main__":
    names, prefix, workers = json.loads(sys.argv[1])
    print("start", flush=True)
    config = preprocess_config(names, prefix, skip_errors=True, workers=workers)
    preprocess(config, commit_seconds=0, chunk_bytes=60)
"""


def start_victim(
    folder: Path, names: list[str], prefix: Path, workers: int
) -> subprocess.Popen:
    """Start a program that commits after every small chunk."""
    program = folder / "victim.py"
    program.write_text(VICTIM)
    process = subprocess.Popen(
        [sys.executable, str(program), json.dumps([names, str(prefix), workers])],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"},
    )
    assert process.stdout.readline() == b"start\n"
    return process


def compressed(names: list[str], folder: Path, suffix: str) -> list[str]:
    """Compress files into a folder and return their paths; without a suffix do nothing."""
    if not suffix:
        return names
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    paths = []
    for name in names:
        path = folder / f"{Path(name).name}{suffix}"
        path.write_bytes(compress(Path(name).read_bytes()))
        paths.append(str(path))
    return paths


def rejected_records(prefix: Path, suffix: str = "") -> list[dict]:
    """The rejected records of a run, with names of files without folder and suffix."""
    records = [json.loads(line) for line in rejected_bytes(prefix).splitlines()]
    for record in records:
        record["file"] = Path(record["file"]).name.removesuffix(suffix)
    return records


@pytest.mark.parametrize(
    ("suffix", "workers", "times"), [("", 1, 20), ("", 2, 5), (".gz", 1, 5), (".zst", 2, 5)]
)
def test_repeatedly_killed_run_is_correct(bad_corpus, tmp_path, suffix, workers, times):
    """Killed at random moments; after each, every pair that looks finished is correct."""
    plain, reference = bad_corpus
    names = compressed(plain, tmp_path, suffix)
    rng = random.Random(0)
    kills = 0
    while kills < times:
        process = start_victim(tmp_path, names, tmp_path / "x", workers)
        time.sleep(rng.uniform(0, 0.25 * workers))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        for path in tmp_path.glob("*.idx"):
            expected = reference_documents(plain, path.stem.split("_")[1])
            assert documents(path.with_suffix("")) == expected
    assert start_victim(tmp_path, names, tmp_path / "x", workers).wait() == 0
    tokens = (".bin", ".idx")
    assert output_bytes(tmp_path / "x", tokens) == output_bytes(reference, tokens)
    assert rejected_records(tmp_path / "x", suffix) == rejected_records(reference)
    assert not list(tmp_path.glob("*.partial"))


def children(pid: int) -> set[int]:
    """The processes that a process has started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(stat.parent.name))
        except OSError:  # it has ended
            continue
    return found


def is_running(pids: set[int]) -> bool:
    return any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_end_with_their_parent(bad_corpus, tmp_path):
    process = start_victim(tmp_path, bad_corpus[0], tmp_path / "x", 2)
    # Two workers, and the process that cleans up after multiprocessing.
    workers = wait_until(
        lambda: len(children(process.pid)) >= 3 and children(process.pid), "workers"
    )
    wait_until((tmp_path / "x.partial/state.json").exists, "a commit")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not is_running(workers), "the end of the workers")


def test_killed_worker_ends_the_run(bad_corpus, tmp_path, start_workers_first):
    names, reference = bad_corpus
    config = preprocess_config(names, tmp_path / "x", skip_errors=True, workers=2)
    # Pools of ranks of other tests
    others = {child.pid for child in multiprocessing.active_children()}
    with PreprocessRun(config, chunk_bytes=60) as run:
        with pytest.raises(OSError, match="a worker process ended before its work was done"):
            for _ in run:
                for worker in multiprocessing.active_children():
                    if worker.pid not in others:
                        os.kill(worker.pid, signal.SIGKILL)
        run.commit()
    preprocess(config)
    assert output_bytes(tmp_path / "x") == output_bytes(reference)


# Locks and failures


def test_second_run_on_prefix_is_refused(bad_corpus, tmp_path):
    names, _ = bad_corpus
    match = rf"x is being written by process {os.getpid()}"
    with StagingDir(tmp_path / "x"), pytest.raises(ValueError, match=match):
        preprocess(preprocess_config(names, tmp_path / "x"))


@pytest.mark.parametrize("pair", ["x_text_document", "x_title_document"])
def test_pair_written_elsewhere_is_refused(bad_corpus, tmp_path, pair):
    """By merging, or by a run with another output prefix."""
    match = rf"{pair} is being written by process"
    with StagingDir(tmp_path / pair), pytest.raises(ValueError, match=match):
        preprocess(preprocess_config(bad_corpus[0], tmp_path / "x"))
    assert os.listdir(tmp_path) == []


def test_failure_leaves_the_old_result(bad_corpus, tmp_path):
    good = write_corpus(tmp_path / "good")
    preprocess(preprocess_config(good, tmp_path / "x"))
    before = output_bytes(tmp_path / "x")
    with pytest.raises(ValueError, match="0.jsonl:1[0-9]: .*--on-error skip"):
        preprocess(preprocess_config(bad_corpus[0], tmp_path / "x"))
    assert output_bytes(tmp_path / "x") == before
    assert not (tmp_path / "x.partial").exists()
