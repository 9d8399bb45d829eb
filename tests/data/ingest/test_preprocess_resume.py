"""Preprocessing that is interrupted, killed, disturbed or asked for something else: the same bytes, or a new start."""

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

from helpers.corpora import content, corpus, job, loop
from helpers.programs import REPO, documents, jsonl
from megatron.config.schema import TokenizerConfig
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig, PreprocessRun, preprocess
from megatron.io.staging_dir import StagingDir


def stop_after(work: PreprocessRun, chunks: int) -> None:
    for _ in zip(range(chunks), work):
        pass


def test_a_run_continues_where_it_was_committed(bad, tmp_path, caplog, at_once):
    """Stop at any chunk, with what came after the last commit lost, any number of times."""
    caplog.set_level(logging.INFO, "megatron")
    names, whole = bad
    this, counts = job(names, tmp_path / "x", skip_errors=True), []
    for n in range(1, 9):
        with PreprocessRun(
            replace(this, workers=1 + n % 2), commit_seconds=1e9, chunk_bytes=700
        ) as work:
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
    assert (tmp_path / "x.rejected.jsonl").read_bytes() == Path(
        f"{whole}.rejected.jsonl"
    ).read_bytes()
    assert not (tmp_path / "x.partial").exists()


def interrupt(this: PreprocessConfig) -> None:
    with PreprocessRun(this, chunk_bytes=700) as work:
        stop_after(work, 6)
        work.commit()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda j: replace(j, recipe=replace(j.recipe, append_eod=False)), "append eod"),
        (lambda j: replace(j, recipe=replace(j.recipe, keys=("text",))), "keys"),
        (
            lambda j: replace(
                j,
                recipe=replace(
                    j.recipe, tokenizer=TokenizerConfig("NullTokenizer", tokenizer_model="9")
                ),
            ),
            "tokenizer",
        ),
        (lambda j: replace(j, max_documents=3), "max documents"),
        (lambda j: replace(j, inputs=j.inputs[:1]), "inputs"),
        (lambda j: os.utime(j.inputs[0], (1, 1)) or j, "inputs"),
        (lambda j: replace(j, skip_errors=False), "--on-error, and records were skipped"),
    ],
)
def test_another_job_starts_again(tmp_path, caplog, change, named):
    names = corpus(tmp_path / "in", bad=True)
    this = job(names, tmp_path / "x", skip_errors=True)
    interrupt(this)
    with PreprocessRun(change(this)) as work:
        assert not work.resumed and work.documents == 0 and work.read == 0
    assert f"differs in: {named}. Starting again" in caplog.text
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda folder: os.truncate(folder / "x_title_document.bin", 5),
            "files that were cut off or replaced",
        ),
        (
            lambda folder: (folder / "x_title_document.lengths").unlink(),
            "files that were cut off or replaced",
        ),
        (
            lambda folder: (folder / "rejected.jsonl").unlink(),
            "files that were cut off or replaced",
        ),
        (
            lambda folder: (folder / "state.json").write_text("{"),
            "its state, which cannot be read",
        ),
        (
            lambda folder: (folder / "state.json").write_text("[]"),
            "its state, which cannot be read",
        ),
        (lambda folder: (folder / "state.json").write_text('{"job": {"layout": 0}}'), "layout"),
    ],
)
def test_work_that_is_damaged_starts_again(bad, tmp_path, caplog, harm, said):
    names, whole = bad
    this = job(names, tmp_path / "x", skip_errors=True)
    interrupt(this)
    harm(tmp_path / "x.partial")
    preprocess(this)
    assert f"differs in: {said}. Starting again" in caplog.text and content(
        tmp_path / "x"
    ) == content(whole)
    assert (tmp_path / "x.rejected.jsonl").read_bytes() == Path(
        f"{whole}.rejected.jsonl"
    ).read_bytes()


def test_a_tokenizer_that_splits_otherwise_starts_again(tmp_path, caplog):
    """Its vocabulary, and with it its fingerprint, is the same."""
    from tokenizers import Tokenizer, models, normalizers

    t = Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1, "A": 2}, []))
    t.save(str(tmp_path / "t.json"))
    recipe = EncodeConfig(
        TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t.json"))
    )
    this = PreprocessConfig(
        [str(jsonl(tmp_path / "a.jsonl", ["A"] * 100))], str(tmp_path / "x"), recipe
    )
    with PreprocessRun(this, chunk_bytes=50) as work:
        stop_after(work, 2)
        work.commit()
    t.normalizer = normalizers.Lowercase()
    t.save(str(tmp_path / "t.json"))
    preprocess(this)
    assert (
        "differs in: tokenizer" in caplog.text
        and documents(tmp_path / "x_text_document") == [[1]] * 100
    )


@pytest.mark.parametrize("when", ["commit", "finish", "next file"])
def test_an_input_that_changes_meanwhile_is_noticed(tmp_path, when):
    names = corpus(tmp_path / "in")
    changed = 0 if when == "next file" else 1
    refused = pytest.raises(ValueError, match=f"{changed}.jsonl changed while it was read")
    with refused, PreprocessRun(job(names, tmp_path / "x"), chunk_bytes=700) as work:
        for encoded in work:
            if encoded.chunk.source == changed:
                os.utime(names[changed], (1, 1))
                if when == "commit":
                    work.commit()
        work.finish()
    assert os.listdir(tmp_path) == ["in"]


def die_at(this: PreprocessConfig, step: int) -> None:
    """Do the job in a child that ends, as a killed one does, at the publishing rename of this number."""
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (9 if step < 7 else 0)
        return
    real, steps = os.replace, []

    def dying(source, target):
        if str(target).startswith(f"{this.output_prefix}_") or str(target).endswith(
            "rejected.jsonl"
        ):
            steps.append(target)
            if len(steps) > step:
                os._exit(9)
        real(source, target)

    os.replace = dying
    preprocess(this)
    os._exit(0)


@pytest.mark.parametrize("step", range(8))
def test_killed_while_publishing(bad, tmp_path, step):
    """At any of the renames of two pairs and of the rejected records, over an older result."""
    names, whole = bad
    old = job(corpus(tmp_path / "old", 10), tmp_path / "x")
    preprocess(old)
    this = job(names, tmp_path / "x", skip_errors=True)
    die_at(this, step)
    for path in tmp_path.glob("*.idx"):
        known = loop(names, path.stem.split("_")[1]), loop(old.inputs, path.stem.split("_")[1])
        assert documents(path.with_suffix("")) in known
    (totals, _) = preprocess(this)
    assert totals.documents == 400 and content(tmp_path / "x") == content(whole)
    assert (tmp_path / "x.rejected.jsonl").read_bytes() == Path(
        f"{whole}.rejected.jsonl"
    ).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_publication_whose_files_are_gone_or_replaced_starts_again(
    bad, tmp_path, step, caplog
):
    names, whole = bad
    this = job(names, tmp_path / "x", skip_errors=True)
    die_at(this, step)
    for path in tmp_path.glob("x_*_document.*"):
        if path.is_file():
            path.unlink()
    preprocess(job(corpus(tmp_path / "old", 10), tmp_path / "y"))
    os.rename(tmp_path / "y_text_document.bin", tmp_path / "x_text_document.bin")
    preprocess(this)
    assert "differs in: files that were cut off or replaced" in caplog.text
    assert content(tmp_path / "x") == content(whole)


VICTIM = """
import json, sys
from megatron.data.ingest import encode
from megatron.config.schema import TokenizerConfig
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig, preprocess
encode.ALONE_SECONDS = 0
if __name__ == "__main__":
    names, prefix, workers = json.loads(sys.argv[1])
    recipe = EncodeConfig(TokenizerConfig(tokenizer_type="ByteTokenizer"), ("text", "title"), append_eod=True)
    print("start", flush=True)
    preprocess(PreprocessConfig(names, prefix, recipe, skip_errors=True, workers=workers), commit_seconds=0, chunk_bytes=60)
"""


def victim(folder: Path, names: list[str], prefix: Path, workers: int) -> subprocess.Popen:
    program = folder / "victim.py"
    program.write_text(VICTIM)
    process = subprocess.Popen(
        [sys.executable, str(program), json.dumps([names, str(prefix), workers])],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert process.stdout.readline() == b"start\n"
    return process


def compressed(names: list[str], folder: Path, suffix: str) -> list[str]:
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    for name in names if suffix else ():
        (folder / f"{Path(name).name}{suffix}").write_bytes(compress(Path(name).read_bytes()))
    return [str(folder / f"{Path(name).name}{suffix}") for name in names] if suffix else names


@pytest.mark.parametrize(
    ("suffix", "workers", "times"), [("", 1, 20), ("", 2, 5), (".gz", 1, 5), (".zst", 2, 5)]
)
def test_killed_again_and_again(bad, tmp_path, suffix, workers, times):
    """At random moments, committing after every chunk; between two lives nothing that looks finished is wrong."""
    plain, whole = bad
    names = compressed(plain, tmp_path, suffix)
    rng, kills = random.Random(0), 0
    while kills < times:
        process = victim(tmp_path, names, tmp_path / "x", workers)
        time.sleep(rng.uniform(0, 0.25 * workers))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        for path in tmp_path.glob("*.idx"):
            assert documents(path.with_suffix("")) == loop(plain, path.stem.split("_")[1])
    assert victim(tmp_path, names, tmp_path / "x", workers).wait() == 0
    assert content(tmp_path / "x", (".bin", ".idx")) == content(whole, (".bin", ".idx"))
    rejected, expected = (
        [json.loads(line) for line in Path(f"{prefix}.rejected.jsonl").read_text().splitlines()]
        for prefix in (tmp_path / "x", whole)
    )
    assert [{**r, "file": Path(r["file"]).name.removesuffix(suffix)} for r in rejected] == [
        {**r, "file": Path(r["file"]).name} for r in expected
    ]
    assert not list(tmp_path.glob("*.partial"))


def children(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(stat.parent.name))
        except OSError:  # ended meanwhile
            continue
    return found


def test_workers_end_with_a_killed_parent_and_a_killed_worker_ends_the_run(
    bad, tmp_path, at_once
):
    names, whole = bad
    process = victim(tmp_path, names, tmp_path / "x", 2)
    while (
        len(workers := children(process.pid)) < 3
    ):  # two, and the one that cleans up after multiprocessing
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    others = {
        child.pid for child in multiprocessing.active_children()
    }  # pools of ranks of other tests
    with PreprocessRun(
        job(names, tmp_path / "x", skip_errors=True, workers=2), chunk_bytes=60
    ) as work:
        with pytest.raises(OSError, match="a worker process ended before its work was done"):
            for _ in work:
                for worker in multiprocessing.active_children():
                    if worker.pid not in others:
                        os.kill(worker.pid, signal.SIGKILL)
        work.commit()
    preprocess(job(names, tmp_path / "x", skip_errors=True, workers=2))
    assert content(tmp_path / "x") == content(whole)


def test_a_second_run_on_a_prefix_is_refused(bad, tmp_path):
    names, _ = bad
    with (
        StagingDir(tmp_path / "x"),
        pytest.raises(ValueError, match=rf"x is being written by process {os.getpid()}"),
    ):
        preprocess(job(names, tmp_path / "x"))


@pytest.mark.parametrize("pair", ["x_text_document", "x_title_document"])
def test_a_pair_that_somebody_else_writes_is_refused(bad, tmp_path, pair):
    """By merging, or from another output prefix."""
    with (
        StagingDir(tmp_path / pair),
        pytest.raises(ValueError, match=rf"{pair} is being written by process"),
    ):
        preprocess(job(bad[0], tmp_path / "x"))
    assert os.listdir(tmp_path) == []


def test_a_result_is_not_touched_by_a_failure(bad, tmp_path):
    good = corpus(tmp_path / "good")
    preprocess(job(good, tmp_path / "x"))
    before = content(tmp_path / "x")
    with pytest.raises(ValueError, match="0.jsonl:1[0-9]: .*--on-error skip"):
        preprocess(job(bad[0], tmp_path / "x"))
    assert content(tmp_path / "x") == before and not (tmp_path / "x.partial").exists()
