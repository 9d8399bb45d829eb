"""Streaming against a dumb loop over the tokenised documents: order, epochs, caching, other processes, a whole run."""

from __future__ import annotations

import gc
import gzip
import json
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard

from helpers import runs
from helpers.programs import documents
from helpers.streams import (
    BYTES,
    S,
    cached_tokens,
    corpus,
    is_free,
    large,
    loop,
    open_samples,
    read,
    state,
    stream_of,
    streaming_flags,
    until,
)
from megatron.config.schema import DataConfig, TokenizerConfig
from megatron.data.ingest import preprocess as preprocess_module
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig, PreprocessRun, preprocess
from megatron.data.loader import BatchLoader, DataParallelShard
from megatron.data.sampling.blend import quotas
from megatron.data.streaming import producer as module
from megatron.data.streaming.producer import StreamSamples, cache_folder, produce


def no_producer(monkeypatch) -> None:
    monkeypatch.setattr(
        module, "start_producer", lambda *_: pytest.fail("a producer was started")
    )


# Order and content


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("epochs", [0.5, 3.5])
def test_samples_equal_a_loop_over_the_tokens(tmp_path, window, epochs):
    tokens = corpus(tmp_path / "a.jsonl")
    number = int(epochs * len(tokens) / S)
    got = open_samples(tmp_path / "a.jsonl", samples=number, window=window)
    assert len(got) == number and read(got) == loop(tokens, number, window)
    assert got.source(0) == str(tmp_path / "a.jsonl")
    for beyond in (-1, number):
        with pytest.raises(
            IndexError, match=rf"sample {beyond} of .*: allowed 0 to {number - 1}"
        ):
            got[beyond]
    if window == 1 and epochs < 1:
        assert read(got) == [tokens[k * S : k * S + S + 1] for k in range(number)]
    elif window > 1:
        assert read(got) != loop(tokens, number, 1), "shuffled"
        assert sorted(read(got)[:window]) == sorted(loop(tokens, window, 1))


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet", "folder", "pattern", "hf"])
def test_every_kind_of_source(tmp_path, monkeypatch, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    tokens = corpus(folder / "a.jsonl")
    text = (folder / "a.jsonl").read_bytes()
    entry = {"folder": str(folder), "pattern": f"{folder}/*.jsonl", "hf": "hf:in"}.get(
        kind, f"{folder}/a.{kind}"
    )
    if kind == "gz":
        Path(entry).write_bytes(gzip.compress(text))
    elif kind == "zst":
        Path(entry).write_bytes(zstandard.compress(text))
    elif kind == "parquet":
        pq.write_table(
            pa.Table.from_pylist([json.loads(line) for line in text.splitlines()]), entry
        )
    elif kind == "hf":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    else:
        tokens += corpus(folder / "b.jsonl")
    number = 3 * len(tokens) // S  # to the end and beyond
    assert read(open_samples(entry, samples=number, cache=tmp_path / "cache")) == loop(
        tokens, number, 4
    )
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_ranks_micro_batches_workers_and_resuming_change_nothing(tmp_path):
    tokens = corpus(tmp_path / "a.jsonl", 60)
    want = loop(tokens, 32, 8)
    open_samples(tmp_path / "a.jsonl", samples=32, window=8)

    def taken(consumed: int, world: int, micro: int, workers: int) -> list[list[int]]:
        got: dict[int, list[int]] = {}
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
                    got[consumed + (step * world + rank) * micro + b] = row
        return [row for _, row in sorted(got.items())]

    for consumed, world, micro, workers in (
        (0, 1, 4, 0),
        (0, 2, 2, 0),
        (16, 2, 1, 0),
        (8, 1, 8, 1),
        (24, 4, 2, 1),
    ):
        assert taken(consumed, world, micro, workers) == [row[:-1] for row in want[consumed:]]


def test_blends_hold_their_weights(tmp_path):
    folder = tmp_path / "b"
    folder.mkdir()
    tokens = {
        tmp_path / "a.jsonl": corpus(tmp_path / "a.jsonl", 300),
        folder: corpus(folder / "x.jsonl", 100),
    }
    blend = open_samples("0.25", tmp_path / "a.jsonl", "0.75", folder, samples=80)
    got: dict[str, list] = {}
    for i in range(80):
        got.setdefault(blend.source(i), []).append(blend[i].tolist())
        share = len(got.get(str(folder), ())) / (i + 1)
        assert abs(share - 0.75) * (i + 1) < 1
    assert got == {
        str(entry): loop(tokens[entry], count, 4) for entry, count in zip(tokens, (20, 60))
    }


@pytest.mark.parametrize("second", ["b.jsonl", "empty.jsonl", "hf:name"])
def test_without_weights_the_sizes_count_or_all_count_the_same(tmp_path, second):
    corpus(tmp_path / "a.jsonl", 30)
    corpus(tmp_path / "b.jsonl", 90)
    (tmp_path / "empty.jsonl").touch()
    other = second if second.startswith("hf:") else str(tmp_path / second)
    blend = open_samples(tmp_path / "a.jsonl", other, samples=100, starts=False)
    size = (
        [os.path.getsize(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
        if second == "b.jsonl"
        else [1, 1]
    )
    counts = [
        sum(blend.source(i) == entry for i in range(100))
        for entry in (str(tmp_path / "a.jsonl"), other)
    ]
    assert all(abs(count - 100 * s / sum(size)) < 1 for count, s in zip(counts, size))
    assert [len(d) for d in blend.datasets] == quotas(size, 100)


# The cache


def test_a_finished_cache_is_read_and_nothing_is_made_again(tmp_path, monkeypatch):
    tokens = corpus(tmp_path / "a.jsonl")
    number = 2 * len(tokens) // S
    read(open_samples(tmp_path / "a.jsonl", samples=number))
    cache = tmp_path / "stream_cache"
    until(lambda: {path.suffix for path in cache.iterdir()} == {".bin", ".idx", ".json"})
    preprocess(
        PreprocessConfig(
            [str(tmp_path / "a.jsonl")],
            str(tmp_path / "whole"),
            EncodeConfig(BYTES, append_eod=True),
        )
    )
    for suffix in (".bin", ".idx", ".json"):
        (made,) = cache.glob("*" + suffix)
        assert made.read_bytes() == (tmp_path / f"whole_text_document{suffix}").read_bytes()
    no_producer(monkeypatch)
    assert read(open_samples(tmp_path / "a.jsonl", samples=number)) == loop(tokens, number, 4)
    assert read(open_samples(tmp_path / "a.jsonl", samples=7, window=3, seed=9)) == loop(
        tokens, 7, 3, seed=9
    )


def test_only_what_is_needed_is_made_and_a_longer_run_goes_on(tmp_path, monkeypatch):
    tokens = large(tmp_path / "a.jsonl")
    cache = tmp_path / "c"
    assert read(
        open_samples(tmp_path / "a.jsonl", samples=2000, window=100, cache=cache)
    ) == loop(tokens, 2000, 100)
    until(lambda: is_free(cache))
    made, (file,) = cached_tokens(cache), cache.glob("*.partial/*.bin")
    assert 2000 * S < made < 2000 * S + (3 << 20) < len(tokens) and not list(
        cache.glob("*.error")
    )
    with monkeypatch.context() as patch:
        no_producer(patch)
        assert read(
            open_samples(tmp_path / "a.jsonl", samples=1900, window=100, cache=cache)
        ) == loop(tokens, 1900, 100)
    inode, state_then = file.stat().st_ino, state(cache)
    assert state_then["read"] < (tmp_path / "a.jsonl").stat().st_size / 2
    longer = len(tokens) // S + 50
    assert read(
        open_samples(tmp_path / "a.jsonl", samples=longer, window=1, cache=cache), longer - 100
    ) == loop(tokens, longer, 1, start=longer - 100)
    (pair,) = cache.glob("*.bin")
    assert pair.stat().st_ino == inode, "the same file, added to"
    preprocess(
        PreprocessConfig(
            [str(tmp_path / "a.jsonl")],
            str(tmp_path / "whole"),
            EncodeConfig(BYTES, append_eod=True),
        )
    )
    assert pair.read_bytes() == (tmp_path / "whole_text_document.bin").read_bytes()
    assert documents(str(pair)[:-4]) == documents(tmp_path / "whole_text_document")


def test_the_producer_stays_near_what_was_asked_for(tmp_path):
    tokens = large(tmp_path / "a.jsonl")
    cache = tmp_path / "c"
    stream = stream_of(tmp_path / "a.jsonl", cache)
    samples = StreamSamples(stream, 257, S, 300_000, 5, 4)
    samples.start(lookahead=1 << 20)
    ahead = until(lambda: list(cache.glob("*.partial/state.json")) and cached_tokens(cache))
    time.sleep(0.3)
    assert (1 << 20) <= cached_tokens(cache) == ahead < (1 << 20) + (2 << 20)
    at = 3_000_000 // S // 4 * 4
    assert [samples[i].tolist() for i in range(at, at + 4)] == loop(tokens, at + 4, 4, start=at)
    until(lambda: 4_000_000 < cached_tokens(cache) < 3_100_000 + (3 << 20))
    if (
        not os.fork()
    ):  # as a worker process of a loader: its copy of the samples is not the producer's
        del samples
        gc.collect()
        os._exit(0)
    os.wait()
    time.sleep(0.3)
    assert not is_free(cache)
    del samples
    gc.collect()
    until(lambda: is_free(cache))
    until(lambda: not list(cache.glob("*.error")))


def test_what_another_cache_takes(tmp_path):
    """The files, their place, key and tokenizer: each change is another cache; order, run and window are none."""
    path = tmp_path / "a.jsonl"
    corpus(path)
    os.utime(path, ns=(0, 1000))

    def prefix(entry: Path | str = path, **changes) -> str:
        return stream_of(entry, "/c", **changes).prefix

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
    assert first.startswith("/c/a.jsonl-") and prefix("hf:name/set:train").startswith(
        "/c/set_train-"
    )


def test_a_tokenizer_that_splits_otherwise_takes_another_cache(tmp_path):
    """Its vocabulary, and with it its fingerprint, is the same."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE({"<|endoftext|>": 0, "a": 1}, []))
    config = TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t.json"))
    corpus(tmp_path / "a.jsonl")
    prefixes = []
    for normalizer in (None, tokenizers.normalizers.Lowercase()):
        if normalizer:
            t.normalizer = normalizer
        t.save(str(tmp_path / "t.json"))
        prefixes.append(stream_of(tmp_path / "a.jsonl", tmp_path, config=config).prefix)
    assert len(set(prefixes)) == 2


def test_a_cache_that_has_enough_is_left_as_it_is(tmp_path):
    """Nothing is asked for, so a folder that cannot be written will do; and a producer that comes late adds nothing."""
    tokens = large(tmp_path / "a.jsonl")
    cache = tmp_path / "c"
    want = loop(tokens, 50, 4)
    assert read(open_samples(tmp_path / "a.jsonl", samples=50, cache=cache)) == want
    until(lambda: is_free(cache) and not list(cache.glob("*.error")))
    for path in cache.glob("*.wanted"):
        path.unlink()
    made, files = cached_tokens(cache), sorted(os.listdir(cache))
    assert read(open_samples(tmp_path / "a.jsonl", samples=50, cache=cache)) == want
    stream = stream_of(tmp_path / "a.jsonl", cache)
    module.produce(stream, 50 * S + 1, 1 << 20, threading.Event())
    assert cached_tokens(cache) == made and sorted(os.listdir(cache)) == files


def test_the_place_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/deep", "d[1]"):
        Path(name).mkdir(parents=True)
    Path("d[1]/a.jsonl").touch()
    here = str(tmp_path)
    for entry, place in (
        ("in/a.jsonl", "in"),
        ("in/*.jsonl", "in"),
        ("in", ""),
        ("in/", ""),
        ("in/*/a.jsonl", ""),
        ("in/**", ""),
        ("d[1]/a.jsonl", "d[1]"),
        (f"{here}/in/a.jsonl", "in"),
    ):
        assert cache_folder("", [entry, "hf:x"]) == os.path.join(here, place, "stream_cache"), (
            entry
        )
        assert cache_folder("c", [entry]) == "c"
    with pytest.raises(
        ValueError, match="--data-cache-path is ''; allowed: a folder.* none beside hf:x"
    ):
        cache_folder("", ["hf:x", "in"])
    for entry in ("in", "in/**/*.jsonl", "in/*/a.jsonl"):
        with pytest.raises(
            ValueError,
            match=r"tokens of in.* kept in in/c, .*searched for text.* Set --data-cache-p",
        ):
            cache_folder("in/c", ["d[1]/a.jsonl", entry])


def test_a_cache_whose_publishing_was_interrupted_is_published(tmp_path, monkeypatch):
    tokens = corpus(tmp_path / "a.jsonl")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(preprocess_module, "publish", mock.Mock(side_effect=OSError("gone")))
        produce(stream_of(tmp_path / "a.jsonl", tmp_path), 10**6, 10**6, threading.Event())
    assert state(tmp_path)["published"] and not list(tmp_path.glob("*.idx"))
    assert read(open_samples(tmp_path / "a.jsonl", cache=tmp_path)) == loop(tokens, 20, 4)


def test_a_cache_that_was_cut_off_is_made_again(tmp_path):
    tokens = large(tmp_path / "a.jsonl")
    cache = tmp_path / "c"
    read(open_samples(tmp_path / "a.jsonl", samples=100, cache=cache), 99)
    until(lambda: is_free(cache))
    (file,) = cache.glob("*.partial/*.bin")
    with open(file, "r+b") as opened:
        opened.truncate(1000)
    assert read(open_samples(tmp_path / "a.jsonl", samples=100, cache=cache)) == loop(
        tokens, 100, 4
    )


# Other processes


def _read_elsewhere(samples, start: int, pipe) -> None:
    pipe.send(read(pickle.loads(pickle.dumps(samples)), start))


def test_readers_in_other_processes_wait_for_the_one_producer(tmp_path):
    tokens = corpus(tmp_path / "a.jsonl", 100)
    corpus(tmp_path / "b.jsonl", 100)
    number = 2 * len(tokens) // S
    readers = [
        open_samples(tmp_path / "a.jsonl", samples=number, starts=False) for _ in range(2)
    ]
    readers.append(
        open_samples(
            "1",
            tmp_path / "a.jsonl",
            "1",
            tmp_path / "b.jsonl",
            samples=2 * number,
            starts=False,
        )
    )
    context, pipes = multiprocessing.get_context("fork"), []
    for n, samples in enumerate(readers):
        ours, theirs = multiprocessing.Pipe()
        context.Process(target=_read_elsewhere, args=(samples, n, theirs), daemon=True).start()
        pipes.append(ours)
    time.sleep(0.2)
    assert not any(pipe.poll() for pipe in pipes)
    own = open_samples("1", tmp_path / "a.jsonl", "1", tmp_path / "b.jsonl", samples=2 * number)
    want = loop(tokens, number, 4)
    assert [pipe.recv() for pipe in pipes] == [want, want[1:], read(own, 2)]


def test_another_run_makes_the_tokens_and_ends_half_way(tmp_path):
    """A second run waits while the first has the cache, reads what that one commits, and goes on when it ends."""
    tokens = large(tmp_path / "a.jsonl")
    cache = tmp_path / "c"
    stream = stream_of(tmp_path / "a.jsonl", cache, run="other")
    with PreprocessRun(stream.job, chunk_bytes=1 << 20) as work:
        samples = open_samples(tmp_path / "a.jsonl", samples=200_000, window=1, cache=cache)
        steps = iter(work)
        next(steps)
        work.commit()
        assert samples[100].tolist() == tokens[100 * S : 101 * S + 1]
        (other,) = module.glob.glob(f"{cache}/*.error")
        assert (
            other
            == module.dataclasses.replace(stream, run="this").error_file
            != stream.error_file
        )
        Path(stream.error_file).write_text("of the other run")
        time.sleep(0.2)
        assert work.tokens == cached_tokens(cache) < 2_000_000, (
            "this run's producer keeps its hands off"
        )
        next(steps)
    assert samples[150_000].tolist() == tokens[150_000 * S : 150_001 * S + 1]


def test_waiting_says_what_for(tmp_path, monkeypatch, caplog):
    corpus(tmp_path / "a.jsonl")
    monkeypatch.setattr(module, "SAY_AFTER_SECONDS", 0.1)
    caplog.set_level("INFO", "megatron")
    samples = open_samples(tmp_path / "a.jsonl", starts=False, window=1, cache=tmp_path)

    def wait() -> None:
        with pytest.raises(ValueError, match="^enough$"):
            samples[3]

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: "waiting" in caplog.text)
    assert (
        caplog.messages[-1]
        == f"waiting for {tmp_path}/a.jsonl: 0 tokens are made, the next sample ends with the "
        f"{4 * S + 1}th; the others are made by nobody yet"
    )
    Path(samples._stream.error_file).write_text("enough")
    thread.join(10)
    assert not thread.is_alive()


# A whole run


def test_resumed_runs_on_streamed_text_are_bit_identical(tmp_path, data, ranks2):
    """Two epochs and more on two ranks; the second half on a new cache, whose producer starts from nothing."""
    tokens = corpus(tmp_path / "a.jsonl", 15, name="the quick brown fox")
    assert len(tokens) < 8 * 8 * 32 / 2
    ranks2.run(
        runs.train, streaming_flags(tmp_path / "a.jsonl", tmp_path / "whole", data), timeout=100
    )
    halves = streaming_flags(tmp_path / "a.jsonl", tmp_path / "halves", data)
    ranks2.run(runs.train, [*halves, "--exit-interval", "4"], timeout=100)
    ranks2.run(
        runs.train,
        [
            *halves,
            "--load",
            str(tmp_path / "halves/checkpoints"),
            "--data-cache-path",
            str(tmp_path / "new"),
        ],
        timeout=100,
    )
    whole, half = (runs.metrics(tmp_path / name) for name in ("whole", "halves"))
    assert (
        [m["iteration"] for m in whole] == [m["iteration"] for m in half] == list(range(1, 9))
    )
    assert [(m["loss"], m["grad_norm"]) for m in whole] == [
        (m["loss"], m["grad_norm"]) for m in half
    ]
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.5
    assert not list((tmp_path / "new").glob("*.partial"))
