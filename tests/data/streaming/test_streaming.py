"""Streaming against a reference loop over the tokens: order, epochs, cache, other processes."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import json
import multiprocessing
import os
import pickle
import threading
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard

from helpers import runs
from helpers.corpora import BYTE_TOKENIZER
from helpers.programs import documents
from helpers.streams import (
    S,
    committed_state,
    committed_tokens,
    is_unlocked,
    open_samples,
    open_stream,
    read_samples,
    reference_samples,
    streaming_flags,
    write_large_text,
    write_text,
)
from helpers.waiting import assert_stays, wait_until
from megatron.config.schema import DataConfig, TokenizerConfig
from megatron.data.ingest import preprocess as preprocess_module
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig, PreprocessRun, preprocess
from megatron.data.loader import BatchLoader, DataParallelShard
from megatron.data.sampling.blend import quotas
from megatron.data.streaming import reader
from megatron.data.streaming.producer import produce
from megatron.data.streaming.reader import StreamSamples
from megatron.data.streaming.stream import cache_folder
from megatron.io.staging_dir import StagingDir


def forbid_producers(monkeypatch) -> None:
    monkeypatch.setattr(
        reader, "start_producer", lambda *_: pytest.fail("a producer was started")
    )


def preprocess_reference(text: Path, prefix: Path) -> None:
    """Preprocess a text as streaming does, in one run."""
    encoding = EncodeConfig(BYTE_TOKENIZER, append_eod=True)
    preprocess(PreprocessConfig([str(text)], str(prefix), encoding))


# Order and content


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("epochs", [0.5, 3.5])
def test_samples_equal_reference_loop(tmp_path, window, epochs):
    tokens = write_text(tmp_path / "a.jsonl")
    number = int(epochs * len(tokens) / S)
    samples = open_samples(tmp_path / "a.jsonl", samples=number, window=window)
    assert len(samples) == number
    assert read_samples(samples) == reference_samples(tokens, number, window)
    assert samples.source(0) == str(tmp_path / "a.jsonl")
    for outside in (-1, number):
        match = rf"sample {outside} of .*: allowed 0 to {number - 1}"
        with pytest.raises(IndexError, match=match):
            samples[outside]
    if window == 1 and epochs < 1:
        in_order = [tokens[k * S : k * S + S + 1] for k in range(number)]
        assert read_samples(samples) == in_order
    elif window > 1:
        assert read_samples(samples) != reference_samples(tokens, number, 1), "shuffled"
        first_window = read_samples(samples)[:window]
        assert sorted(first_window) == sorted(reference_samples(tokens, window, 1))


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet", "folder", "pattern", "hf"])
def test_every_format_can_be_streamed(tmp_path, monkeypatch, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    tokens = write_text(folder / "a.jsonl")
    text = (folder / "a.jsonl").read_bytes()
    entry = {"folder": str(folder), "pattern": f"{folder}/*.jsonl", "hf": "hf:in"}.get(
        kind, f"{folder}/a.{kind}"
    )
    if kind == "gz":
        Path(entry).write_bytes(gzip.compress(text))
    elif kind == "zst":
        Path(entry).write_bytes(zstandard.compress(text))
    elif kind == "parquet":
        records = [json.loads(line) for line in text.splitlines()]
        pq.write_table(pa.Table.from_pylist(records), entry)
    elif kind == "hf":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    else:
        tokens += write_text(folder / "b.jsonl")
    number = 3 * len(tokens) // S  # to the end of the text and beyond
    samples = open_samples(entry, samples=number, cache=tmp_path / "cache")
    assert read_samples(samples) == reference_samples(tokens, number, 4)
    # A reader that has reached the end of the text finds no trace of the work.
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_ranks_and_workers_read_one_order(tmp_path):
    """Neither ranks, micro-batches, workers nor resuming change the order of the samples."""
    tokens = write_text(tmp_path / "a.jsonl", 60)
    expected = reference_samples(tokens, 32, 8)
    open_samples(tmp_path / "a.jsonl", samples=32, window=8)

    def read_batches(consumed: int, world: int, micro: int, workers: int) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for rank in range(world):
            batches = BatchLoader(
                open_samples(tmp_path / "a.jsonl", samples=32, window=8, starts=rank == 0),
                DataParallelShard(micro, 8, rank, world),
                consumed_samples=consumed,
                data=DataConfig(num_workers=workers),
                eod=256,
                vocab_size=257,
            )
            for step in range((32 - consumed) // (micro * world)):
                tokens_BS = next(batches).tokens_BS.tolist()
                for b, row in enumerate(tokens_BS):
                    found[consumed + (step * world + rank) * micro + b] = row
        return [row for _, row in sorted(found.items())]

    for consumed, world, micro, workers in (
        (0, 1, 4, 0),
        (0, 2, 2, 0),
        (16, 2, 1, 0),
        (8, 1, 8, 1),
        (24, 4, 2, 1),
    ):
        rows = read_batches(consumed, world, micro, workers)
        assert rows == [row[:-1] for row in expected[consumed:]]


def test_blends_hold_their_weights(tmp_path):
    folder = tmp_path / "b"
    folder.mkdir()
    tokens = {
        tmp_path / "a.jsonl": write_text(tmp_path / "a.jsonl", 300),
        folder: write_text(folder / "x.jsonl", 100),
    }
    blend = open_samples("0.25", tmp_path / "a.jsonl", "0.75", folder, samples=80)
    found: dict[str, list] = {}
    for i in range(80):
        found.setdefault(blend.source(i), []).append(blend[i].tolist())
        share = len(found.get(str(folder), ())) / (i + 1)
        assert abs(share - 0.75) * (i + 1) < 1
    assert found == {
        str(entry): reference_samples(tokens[entry], count, 4)
        for entry, count in zip(tokens, (20, 60))
    }


@pytest.mark.parametrize("second", ["b.jsonl", "empty.jsonl", "hf:name"])
def test_sizes_are_the_default_weights(tmp_path, second):
    """Where the size of a source is unknown, all weigh the same."""
    write_text(tmp_path / "a.jsonl", 30)
    write_text(tmp_path / "b.jsonl", 90)
    (tmp_path / "empty.jsonl").touch()
    other = second if second.startswith("hf:") else str(tmp_path / second)
    blend = open_samples(tmp_path / "a.jsonl", other, samples=100, starts=False)
    sizes = [1, 1]
    if second == "b.jsonl":
        sizes = [os.path.getsize(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    sources = [blend.source(i) for i in range(100)]
    counts = [sources.count(str(tmp_path / "a.jsonl")), sources.count(other)]
    assert all(abs(count - 100 * s / sum(sizes)) < 1 for count, s in zip(counts, sizes))
    assert [len(d) for d in blend.datasets] == quotas(sizes, 100)


# The cache


def test_finished_cache_is_reused(tmp_path, monkeypatch):
    tokens = write_text(tmp_path / "a.jsonl")
    number = 2 * len(tokens) // S
    read_samples(open_samples(tmp_path / "a.jsonl", samples=number))
    cache = tmp_path / "stream_cache"
    wait_until(lambda: not list(cache.glob("*.error")), "the end of the producer")
    assert {path.suffix for path in cache.iterdir()} == {".bin", ".idx", ".json"}
    preprocess_reference(tmp_path / "a.jsonl", tmp_path / "reference")
    for suffix in (".bin", ".idx", ".json"):
        (made,) = cache.glob("*" + suffix)
        reference = tmp_path / f"reference_text_document{suffix}"
        assert made.read_bytes() == reference.read_bytes()
    forbid_producers(monkeypatch)
    samples = open_samples(tmp_path / "a.jsonl", samples=number)
    assert read_samples(samples) == reference_samples(tokens, number, 4)
    samples = open_samples(tmp_path / "a.jsonl", samples=7, window=3, seed=9)
    assert read_samples(samples) == reference_samples(tokens, 7, 3, seed=9)


def test_longer_run_extends_the_cache(tmp_path, monkeypatch):
    """Only the tokens that a run needs are produced; a longer run adds to them."""
    text = tmp_path / "a.jsonl"
    tokens = write_large_text(text)
    cache = tmp_path / "c"
    samples = open_samples(text, samples=2000, window=100, cache=cache)
    assert read_samples(samples) == reference_samples(tokens, 2000, 100)
    wait_until(
        lambda: is_unlocked(cache) and not list(cache.glob("*.error")),
        "the end of the producer",
    )
    produced = committed_tokens(cache)
    (file,) = cache.glob("*.partial/*.bin")
    assert 2000 * S < produced < 2000 * S + (3 << 20) < len(tokens)
    with monkeypatch.context() as patch:
        forbid_producers(patch)
        samples = open_samples(text, samples=1900, window=100, cache=cache)
        assert read_samples(samples) == reference_samples(tokens, 1900, 100)
    inode = file.stat().st_ino
    assert committed_state(cache)["read"] < text.stat().st_size / 2
    number = len(tokens) // S + 50
    samples = open_samples(text, samples=number, window=1, cache=cache)
    expected = reference_samples(tokens, number, 1, start=number - 100)
    assert read_samples(samples, number - 100) == expected
    (pair,) = cache.glob("*.bin")
    assert pair.stat().st_ino == inode, "the same file, extended"
    preprocess_reference(text, tmp_path / "reference")
    assert pair.read_bytes() == (tmp_path / "reference_text_document.bin").read_bytes()
    assert documents(str(pair)[:-4]) == documents(tmp_path / "reference_text_document")


def test_producer_stays_near_the_requests(tmp_path):
    tokens = write_large_text(tmp_path / "a.jsonl")
    cache = tmp_path / "c"
    stream = open_stream(tmp_path / "a.jsonl", cache)
    samples = StreamSamples(stream, 257, S, 300_000, 5, 4)
    samples.start(lookahead=1 << 20)
    ahead = wait_until(lambda: committed_tokens(cache), "a commit")
    assert_stays(lambda: committed_tokens(cache) == ahead, "the producer pauses")
    assert (1 << 20) <= ahead < (1 << 20) + (2 << 20)
    first = 3_000_000 // S // 4 * 4
    found = [samples[i].tolist() for i in range(first, first + 4)]
    assert found == reference_samples(tokens, first + 4, 4, start=first)
    wait_until(
        lambda: 4_000_000 < committed_tokens(cache) < 3_100_000 + (3 << 20),
        "tokens ahead of the request",
    )
    if not os.fork():
        # As in a worker process of a loader, whose copy of the samples stops no producer.
        del samples
        gc.collect()
        os._exit(0)
    os.wait()
    assert_stays(lambda: not is_unlocked(cache), "the producer runs")
    del samples
    gc.collect()
    wait_until(lambda: is_unlocked(cache), "the end of the producer")
    wait_until(lambda: not list(cache.glob("*.error")), "the removal of its error file")


def test_stream_is_complete_after_cleanup(tmp_path):
    """A published pair is not complete while its producer cleans up; then no trace is left."""
    write_text(tmp_path / "a.jsonl")
    stream = open_stream(tmp_path / "a.jsonl", tmp_path / "c")
    produce(stream, 10**6, 10**6, threading.Event())
    assert stream.check_complete()
    with StagingDir(stream.prefix):
        assert stream.is_published and not stream.check_complete()
    os.mkdir(stream.staging_path)  # the producer has removed the lock, not yet the directory
    assert stream.check_complete() and not os.path.exists(stream.staging_path)


def test_interrupted_cleanup_is_completed(tmp_path):
    """A producer was killed after publishing: the next one only removes what it left."""
    tokens = write_text(tmp_path / "a.jsonl")
    stream = open_stream(tmp_path / "a.jsonl", tmp_path / "c")
    produce(stream, 10**6, 10**6, threading.Event())
    finished = sorted(os.listdir(tmp_path / "c"))
    os.mkdir(stream.staging_path)
    Path(stream.staging_path, "lock").write_text("process 1")
    samples = open_samples(tmp_path / "a.jsonl", cache=tmp_path / "c")
    assert read_samples(samples) == reference_samples(tokens, 20, 4)
    wait_until(lambda: not list((tmp_path / "c").glob("*.error")), "the end of the producer")
    assert sorted(os.listdir(tmp_path / "c")) == finished


def test_request_of_finished_stream_leaves_nothing(tmp_path, monkeypatch):
    """The pair may be published between a reader's check and its write."""
    write_text(tmp_path / "a.jsonl")
    stream = open_stream(tmp_path / "a.jsonl", tmp_path / "c")
    produce(stream, 10**6, 10**6, threading.Event())
    published = iter([False, True])
    monkeypatch.setattr(type(stream), "is_published", property(lambda _: next(published)))
    stream.request(5)
    assert not os.path.exists(stream.request_file)


def test_cache_depends_on_all_inputs(tmp_path):
    """Files, their path, key and tokenizer each select another cache; order and run do not."""
    path = tmp_path / "a.jsonl"
    write_text(path)
    os.utime(path, ns=(0, 1000))

    def prefix(entry: Path | str = path, **changes) -> str:
        return open_stream(entry, "/c", **changes).prefix

    first = prefix()
    assert prefix() == prefix(run="other") == prefix(os.path.relpath(path)) == first
    others = [
        prefix(key="body"),
        prefix(tmp_path),
        prefix(config=TokenizerConfig("NullTokenizer", "", "", "9")),
    ]
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(0, 1000))
    others.append(prefix())
    os.utime(path, ns=(0, 2000))
    others.append(prefix())
    assert len({first, *others}) == 6
    assert first.startswith("/c/a.jsonl-")
    assert prefix("hf:name/set:train").startswith("/c/set_train-")


def test_changed_normalizer_takes_another_cache(tmp_path):
    """The vocabulary, and with it the fingerprint of the tokenizer, stays the same."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"<|endoftext|>": 0, "a": 1}, []))
    config = TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t.json"))
    write_text(tmp_path / "a.jsonl")
    prefixes = []
    for normalizer in (None, tokenizers.normalizers.Lowercase()):
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.save(str(tmp_path / "t.json"))
        prefixes.append(open_stream(tmp_path / "a.jsonl", tmp_path, config=config).prefix)
    assert len(set(prefixes)) == 2


def test_sufficient_cache_stays_unchanged(tmp_path):
    """Nothing is requested, so the folder may be read-only; a late producer adds nothing."""
    text = tmp_path / "a.jsonl"
    tokens = write_large_text(text)
    cache = tmp_path / "c"
    expected = reference_samples(tokens, 50, 4)
    assert read_samples(open_samples(text, samples=50, cache=cache)) == expected
    wait_until(
        lambda: is_unlocked(cache) and not list(cache.glob("*.error")),
        "the end of the producer",
    )
    for path in cache.glob("*.wanted"):
        path.unlink()
    produced = committed_tokens(cache)
    files = sorted(os.listdir(cache))
    assert read_samples(open_samples(text, samples=50, cache=cache)) == expected
    produce(open_stream(text, cache), 50 * S + 1, 1 << 20, threading.Event())
    assert committed_tokens(cache) == produced and sorted(os.listdir(cache)) == files


def test_cache_is_next_to_first_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/deep", "d[1]"):
        Path(name).mkdir(parents=True)
    Path("d[1]/a.jsonl").touch()
    here = str(tmp_path)
    for entry, folder in (
        ("in/a.jsonl", "in"),
        ("in/*.jsonl", "in"),
        ("in", ""),
        ("in/", ""),
        ("in/*/a.jsonl", ""),
        ("in/**", ""),
        ("d[1]/a.jsonl", "d[1]"),
        (f"{here}/in/a.jsonl", "in"),
    ):
        expected = os.path.join(here, folder, "stream_cache")
        assert cache_folder("", [entry, "hf:x"]) == expected, entry
        assert cache_folder("c", [entry]) == "c"
    match = "--data-cache-path is ''; allowed: a folder.* none next to hf:x"
    with pytest.raises(ValueError, match=match):
        cache_folder("", ["hf:x", "in"])
    match = r"tokens of in.* stored in in/c, .*searched for text.* Set --data-cache-p"
    for entry in ("in", "in/**/*.jsonl", "in/*/a.jsonl"):
        with pytest.raises(ValueError, match=match):
            cache_folder("in/c", ["d[1]/a.jsonl", entry])


def test_interrupted_publication_is_completed(tmp_path, monkeypatch):
    tokens = write_text(tmp_path / "a.jsonl")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(preprocess_module, "publish", mock.Mock(side_effect=OSError("gone")))
        produce(open_stream(tmp_path / "a.jsonl", tmp_path), 10**6, 10**6, threading.Event())
    assert committed_state(tmp_path)["published"] and not list(tmp_path.glob("*.idx"))
    samples = open_samples(tmp_path / "a.jsonl", cache=tmp_path)
    assert read_samples(samples) == reference_samples(tokens, 20, 4)


def test_truncated_cache_is_produced_again(tmp_path):
    tokens = write_large_text(tmp_path / "a.jsonl")
    cache = tmp_path / "c"
    read_samples(open_samples(tmp_path / "a.jsonl", samples=100, cache=cache), 99)
    wait_until(lambda: is_unlocked(cache), "the end of the producer")
    (file,) = cache.glob("*.partial/*.bin")
    with open(file, "r+b") as opened:
        opened.truncate(1000)
    samples = open_samples(tmp_path / "a.jsonl", samples=100, cache=cache)
    assert read_samples(samples) == reference_samples(tokens, 100, 4)


# Other processes


def _read_in_process(samples, start: int, pipe) -> None:
    pipe.send(read_samples(pickle.loads(pickle.dumps(samples)), start))


def test_processes_share_one_producer(tmp_path):
    """Readers in other processes wait for it."""
    a = tmp_path / "a.jsonl"
    b = tmp_path / "b.jsonl"
    tokens = write_text(a, 100)
    write_text(b, 100)
    number = 2 * len(tokens) // S
    readers = [open_samples(a, samples=number, starts=False) for _ in range(2)]
    readers.append(open_samples("1", a, "1", b, samples=2 * number, starts=False))
    context = multiprocessing.get_context("fork")
    pipes = []
    for n, samples in enumerate(readers):
        ours, theirs = multiprocessing.Pipe()
        context.Process(target=_read_in_process, args=(samples, n, theirs), daemon=True).start()
        pipes.append(ours)
    assert_stays(lambda: not any(pipe.poll() for pipe in pipes), "the readers wait")
    own = open_samples("1", a, "1", b, samples=2 * number)
    expected = reference_samples(tokens, number, 4)
    received = [pipe.recv() for pipe in pipes]
    assert received == [expected, expected[1:], read_samples(own, 2)]


def test_second_run_takes_over_the_cache(tmp_path):
    """It waits while the first has the lock, reads what that one commits, and continues."""
    text = tmp_path / "a.jsonl"
    tokens = write_large_text(text)
    cache = tmp_path / "c"
    stream = open_stream(text, cache, run="other")
    with PreprocessRun(stream.preprocess_config, chunk_bytes=1 << 20) as run:
        samples = open_samples(text, samples=200_000, window=1, cache=cache)
        steps = iter(run)
        next(steps)
        run.commit()
        assert samples[100].tolist() == tokens[100 * S : 101 * S + 1]
        (error_file,) = map(str, cache.glob("*.error"))
        assert error_file == dataclasses.replace(stream, run="this").error_file
        assert error_file != stream.error_file
        Path(stream.error_file).write_text("of the other run")
        assert_stays(
            lambda: run.tokens == committed_tokens(cache) < 2_000_000,
            "the producer of this run waits",
        )
        next(steps)
    assert samples[150_000].tolist() == tokens[150_000 * S : 150_001 * S + 1]


def test_waiting_reader_logs_the_reason(tmp_path, monkeypatch, caplog):
    write_text(tmp_path / "a.jsonl")
    monkeypatch.setattr(reader, "_FIRST_MESSAGE_SECONDS", 0.1)
    caplog.set_level("INFO", "megatron")
    samples = open_samples(tmp_path / "a.jsonl", starts=False, window=1, cache=tmp_path)

    def read_one() -> None:
        with pytest.raises(ValueError, match="^enough$"):
            samples[3]

    thread = threading.Thread(target=read_one)
    thread.start()
    wait_until(lambda: "waiting" in caplog.text, "a message")
    assert caplog.messages[-1] == (
        f"waiting for {tmp_path}/a.jsonl: 0 tokens are available, the next sample ends with "
        f"token {4 * S + 1}; the others are produced by no process yet"
    )
    Path(samples._stream.error_file).write_text("enough")
    thread.join(60)
    assert not thread.is_alive()


# Complete runs


def test_resumed_streaming_runs_are_bit_identical(tmp_path, data, ranks2):
    """More than two epochs on two ranks; the second half with an empty cache."""
    text = tmp_path / "a.jsonl"
    tokens = write_text(text, 15, name="the quick brown fox")
    assert len(tokens) < 8 * 8 * 32 / 2
    full_flags = streaming_flags(text, tmp_path / "full", data)
    half_flags = streaming_flags(text, tmp_path / "halves", data)
    checkpoints = str(tmp_path / "halves/checkpoints")
    resume_flags = ["--load", checkpoints, "--data-cache-path", str(tmp_path / "new")]
    ranks2.run(runs.train, full_flags, timeout=300)
    ranks2.run(runs.train, [*half_flags, "--exit-interval", "4"], timeout=300)
    ranks2.run(runs.train, [*half_flags, *resume_flags], timeout=300)
    full = runs.metrics(tmp_path / "full")
    halves = runs.metrics(tmp_path / "halves")
    iterations = [m["iteration"] for m in full]
    assert iterations == [m["iteration"] for m in halves] == list(range(1, 9))
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in full] == [m[name] for m in halves]
    assert full[-1]["loss"] < full[0]["loss"] - 0.5
    assert not list((tmp_path / "new").glob("*.partial"))
