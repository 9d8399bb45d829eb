"""Failures of streaming: one line on every rank, and no process left waiting or working."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.programs import REPO
from helpers.spawn import free_port
from helpers.streams import (
    S,
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
from helpers.waiting import wait_until
from megatron.config.schema import DataConfig
from megatron.data.streaming import producer, reader
from megatron.data.streaming.producer import produce
from megatron.data.streaming.reader import GrowingTokens, StreamSamples
from megatron.io.staging_dir import StagingDir


def first_error(entry, cache: Path, **options) -> str:
    """The error of the first sample, which is the same in the process that started the
    producer and in another."""
    samples = open_samples(entry, cache=cache, **options)
    other = open_samples(entry, cache=cache, **{**options, "starts": False})
    messages = []
    for opened in (samples, other):
        with pytest.raises(ValueError) as error:
            opened[0]
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    return messages[0]


# The text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{",
            r"a.jsonl:4: not a JSON object .*Correct or remove it, or leave such records out "
            r"with tools/preprocess_d",
        ),
        (
            '{"body": "x"}',
            r"a.jsonl:4: no key 'text'; there are: body. Set --streaming-json-key\. ",
        ),
        ('{"text": 1}', r"a.jsonl:4: 'text' is a JSON int; allowed: a string"),
    ],
)
def test_unusable_record_ends_the_run(tmp_path, line, message):
    """The error names its line. Once the text is corrected, the run can be started again."""
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "good"})
    path.write_text(f"{good}\n\n{good}\n{line}\n")
    assert re.search(message, first_error(path, tmp_path / "c"))
    path.write_text(json.dumps({"text": "now it is correct"}) + "\n")
    samples = open_samples(path, cache=tmp_path / "c")
    assert read_samples(samples) == reference_samples([*b"now it is correct", 256], 20, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--streaming-data-path .*a.jsonl has no documents"),
        (
            '{"text": "short"}\n',
            rf"a.jsonl has 6 tokens; one sample takes {S + 1}. Give more text or a smaller "
            rf"--seq-l",
        ),
        ('{"text": ""}\n', rf"a.jsonl has 0 tokens; one sample takes {S + 1}"),
    ],
)
def test_too_little_text_is_refused(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    assert re.search(message, first_error(tmp_path / "a.jsonl", tmp_path / "c"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet", r"a.parquet: no column 'text'; there are: n. Set --streaming-json-key$"),
        ("hf:in", r"hf:in: no column 'text'; there are: n. Set --streaming-json-key$"),
    ],
)
def test_source_errors_name_streaming_flags(tmp_path, monkeypatch, name, message):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"n": 1}\n')
    pq.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
    stop = threading.Event()
    with pytest.raises(ValueError, match=message):
        produce(open_stream(name, tmp_path / "c"), 100, 100, stop)


def test_changed_inputs_are_refused(tmp_path):
    """The text changes before the producer reads it."""
    write_text(tmp_path / "a.jsonl")
    stream = open_stream(tmp_path / "a.jsonl", tmp_path)
    write_text(tmp_path / "a.jsonl", 41)
    match = r"a.jsonl has changed since this run started. Start the run again"
    with pytest.raises(ValueError, match=match):
        produce(stream, 100, 100, threading.Event())
    stop = threading.Event()
    stop.set()
    produce(stream, 100, 100, stop)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]


# The cache


def test_full_disk_ends_the_run(tmp_path, monkeypatch):
    """No file may grow beyond 1 MB. The message fits into a file that was written before."""
    write_large_text(tmp_path / "a.jsonl")
    wrapper = tmp_path / "python"
    blocks = 2000  # of 512 bytes
    wrapper.write_text(f'#!/bin/sh\nulimit -f {blocks}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(producer.sys, "executable", str(wrapper))
    message = first_error(tmp_path / "a.jsonl", tmp_path / "c", samples=100_000, window=100_000)
    expected = r"_text_document.bin cannot be written: File too large. Raise the limit"
    assert re.search(expected, message)


def test_cache_below_a_file_is_refused(tmp_path):
    write_text(tmp_path / "a.jsonl")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"tmp.*file"):
        open_samples(tmp_path / "a.jsonl", cache=tmp_path / "file/c")


# The producer


def test_producer_starts_in_any_directory(tmp_path, monkeypatch):
    """It imports the package of the training process, also when that is not installed."""
    tokens = write_text(tmp_path / "a.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    commands = []
    popen = subprocess.Popen

    def record(command, **options):
        commands.append(command)
        return popen(command, **options)

    monkeypatch.setattr(producer.subprocess, "Popen", record)
    samples = open_samples(tmp_path / "a.jsonl", cache=tmp_path / "c")
    assert read_samples(samples) == reference_samples(tokens, 20, 4)
    (command,) = commands
    assert f"sys.path.insert(0, {str(REPO)!r})" in command[2]


def test_killed_producer_ends_the_run(tmp_path, monkeypatch):
    """The next run continues. It removes the message of this run, which is old, but not the
    file of a run that may be active."""
    text = tmp_path / "a.jsonl"
    tokens = write_large_text(text)
    cache = tmp_path / "c"
    started = []

    def start(*arguments):
        started.append(producer.start_producer(*arguments))
        return started[-1]

    with StagingDir(open_stream(text, cache).prefix):
        with monkeypatch.context() as patch:
            patch.setattr(reader, "start_producer", start)
            samples = open_samples(text, cache=cache)
        os.kill(started[0].pid, signal.SIGKILL)
        match = (
            r"^the process that tokenizes .*a.jsonl ended by signal 9 \(killed, or out of "
            r"memory\?\). Run the program again: it continues where"
        )
        for opened in (samples, pickle.loads(pickle.dumps(samples))):
            with pytest.raises(ValueError, match=match):
                opened[0]
    old = open_stream(text, cache, run="this").error_file
    active = open_stream(text, cache, run="of another").error_file
    Path(active).write_bytes(bytes(4096))
    for path in (old, active):
        os.utime(path, (0, 0))  # messages are removed after a day
    samples = open_samples(text, cache=cache, run="next")
    assert read_samples(samples) == reference_samples(tokens, 20, 4)
    assert os.path.exists(active) and not os.path.exists(old)


def test_bug_in_producer_ends_run(tmp_path, monkeypatch, capfd):
    """An unexpected exception is reported with the exit code."""
    write_text(tmp_path / "a.jsonl")
    monkeypatch.setattr(producer.dataclasses, "asdict", lambda _: {})
    with pytest.raises(ValueError, match="ended with exit code 1. Run"):
        open_samples(tmp_path / "a.jsonl", cache=tmp_path)[0]
    assert "KeyError: 'tokenizer'" in capfd.readouterr().err


PARENT = """
import sys, time
sys.path[:0] = sys.argv[2:]
from helpers.streams import S, open_stream
from megatron.data.streaming.reader import StreamSamples
folder = sys.argv[1]
samples = StreamSamples(open_stream(folder + "/a.jsonl", folder + "/c"), 257, S, 300_000, 5, 4)
samples.start(lookahead=1 << 20)
print(samples[0].tolist(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_producer_ends_with_training_process(tmp_path, how):
    """After a kill, the tokens are kept. Ctrl-C goes to the process group of the training
    process: the producer prints nothing."""
    tokens = write_large_text(tmp_path / "a.jsonl")
    path = [str(REPO), str(REPO / "tests")]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), *path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    first = json.loads(parent.stdout.readline())
    assert first == reference_samples(tokens, 1, 4)[0]
    os.killpg(parent.pid, how)
    out, err = parent.communicate(timeout=120)
    wait_until(lambda: is_unlocked(tmp_path / "c"), "the end of the producer")
    assert committed_tokens(tmp_path / "c") >= 4 * S + 1
    assert err.count("Traceback") == (how == signal.SIGINT) and out == ""
    expected = []
    if how == signal.SIGKILL:
        expected = [f"the training process that had {tmp_path}/a.jsonl tokenized has ended"]
    wait_until(lambda: error_messages(tmp_path / "c") == expected, "the error message")


def error_messages(cache: Path) -> list[str]:
    return [path.read_text().rstrip("\0") for path in cache.glob("*.error")]


def test_readers_notice_a_stopped_producer(tmp_path):
    """Rank 0 ends by an error of its own and stops its producer: the other ranks end, too."""
    write_large_text(tmp_path / "a.jsonl")
    stream = open_stream(tmp_path / "a.jsonl", tmp_path / "c")
    first = StreamSamples(stream, 257, S, 10**6, 5, 4)
    first.start(lookahead=1000)
    other = StreamSamples(stream, 257, S, 10**6, 5, 4)  # as another rank, opened later
    assert first[0].tolist() == other[0].tolist()
    del first
    with pytest.raises(ValueError, match="a.jsonl tokenized has ended$"):
        for i in range(0, len(other), 50):
            other[i]
    assert is_unlocked(tmp_path / "c")


def test_forked_worker_does_not_keep_producer(tmp_path):
    write_large_text(tmp_path / "a.jsonl")
    stream = open_stream(tmp_path / "a.jsonl", tmp_path / "c")
    samples = StreamSamples(stream, 257, S, 10**6, 5, 4)
    samples.start(lookahead=1000)
    assert len(samples[0]) == S + 1 and not is_unlocked(tmp_path / "c")
    worker = os.fork()
    if not worker:
        time.sleep(600)
        os._exit(0)
    try:
        del samples
        wait_until(lambda: is_unlocked(tmp_path / "c"), "the end of the producer")
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


@pytest.mark.parametrize(("received", "code"), [(b"q", 0), (b"", 1)])
def test_hanging_producer_exits(tmp_path, monkeypatch, received, code):
    """A read from a network may hang when the producer is to stop."""
    stop = threading.Event()
    exit_codes = []
    monkeypatch.setattr(producer, "_GRACE_SECONDS", 0)
    monkeypatch.setattr(os, "read", lambda *_: received)
    monkeypatch.setattr(os, "_exit", exit_codes.append)
    with open(tmp_path / "errors", "w+b") as errors:
        producer._listen(open_stream("hf:x", tmp_path), errors.fileno(), stop)
        assert (errors.read() == b"") == bool(received)
    assert stop.is_set() and exit_codes == [code]


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ("{", "Expecting"),
        ("[" * 100_000, "state of .* is corrupt"),
        ("[]", "state of .* is corrupt"),
        ('{"writers": {}}', "state of .* is corrupt"),
        ('{"writers": {"text": 3}}', "state of .* is corrupt"),
        ('{"writers": {"text": {"tokens": "5"}}}', "state of .* is corrupt"),
        ('{"writers": {"text": {"tokens": 5}}}', "has 4 bytes; its state counts 10"),
    ],
)
def test_corrupt_state_counts_no_tokens(tmp_path, state, match):
    """It is about to be replaced, by the pair or by a new start: readers wait."""
    stream = open_stream("hf:x", tmp_path)
    folder = Path(stream.staging_path)
    folder.mkdir()
    (folder / "state.json").write_text(state)
    (folder / f"{Path(stream.pair_prefix).name}.bin").write_bytes(b"abcd")
    assert GrowingTokens(stream, np.dtype(np.uint16)).refresh() == 0
    with pytest.raises(ValueError, match=match):
        GrowingTokens(stream, np.dtype(np.uint16))._map_committed()


# The flags


def test_invalid_inputs_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a.jsonl", tmp_path / "b" / "c.jsonl"):
        path.write_text('{"text": "a"}\n')
    for words, match in (
        (
            [tmp_path / "nowhere.jsonl"],
            r"^--streaming-data-path .*nowhere.jsonl does not exist$",
        ),
        ([f"{tmp_path}/*.gz"], r"^--streaming-data-path .*\*.gz matches no file$"),
        (
            [tmp_path / "pipe"],
            r"--streaming-data-path is '.*pipe'; allowed: files, patterns.* only be read once",
        ),
        (
            ["0.5", "a", "b"],
            r"--streaming-data-path is '0.5 a b'; allowed: weight prefix weight prefix",
        ),
        (["-1", "a"], r"a weight of --streaming-data-path is -1.0; allowed: a positive number"),
        (
            [f"{i}.jsonl" for i in range(33)],
            r"--streaming-data-path is 33; allowed: up to 32.* Quote a pattern",
        ),
        (
            [tmp_path / "a.jsonl", tmp_path / "b" / ".." / "a.jsonl"],
            r"^--streaming-data-path names .*a.jsonl twice; allowed: each once",
        ),
        (
            ["0.5", tmp_path / "b", "0.5", f"{tmp_path}/b/*.jsonl"],
            r"^--streaming-data-path names .*c.jsonl twice; allowed: each once",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            open_samples(*words)
    stream = open_stream("hf:x", "c")
    for name, (seq_length, num_samples, window) in (
        ("seq_length", (0, 1, 1)),
        ("num_samples", (1, 0, 1)),
        ("window", (1, 1, -1)),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*; allowed: a positive integer"):
            StreamSamples(stream, 257, seq_length, num_samples, 1, window)


def test_contradicting_flags_are_refused(tmp_path):
    for options, match in (
        (
            {"data_path": ("p",)},
            r"--streaming-data-path is \['a'\]; allowed: only without --data-path and --tr",
        ),
        (
            {"train_data_path": ("p",)},
            r"--streaming-data-path .* Validation has --valid-data-path",
        ),
        (
            {"dataloader_type": "cyclic"},
            r"--dataloader-type is 'cyclic'; allowed: single with --streaming-data-",
        ),
        (
            {"streaming_shuffle_samples": 0},
            r"--streaming-shuffle-samples is 0; allowed: a positive integer",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            DataConfig(streaming_data_path=("a",), **options)


def test_text_error_ends_every_rank(tmp_path, data):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 9}) + '\n{"text": 3}\n')
    port = str(free_port())
    argv = streaming_flags(tmp_path / "a.jsonl", tmp_path, data, "--num-workers", "1")
    ranks = [
        subprocess.Popen(
            [sys.executable, "pretrain_gpt.py", *argv],
            cwd=REPO,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2 and "Traceback" not in err, err
        (line,) = [line for line in err.splitlines() if "error:" in line]
        prefix = f"[rank {rank}] " if rank else ""
        assert line.startswith(f"{prefix}error: {tmp_path}/a.jsonl:2: 'text' is a JSON int")
