"""What goes wrong with streamed text: one line, on every rank, and no process left waiting or working."""

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

import pytest

from helpers.programs import REPO
from helpers.spawn import free_port
from helpers.streams import (
    BYTES,
    TOKENIZER,
    S,
    cached_tokens,
    corpus,
    is_free,
    large,
    loop,
    open_samples,
    read,
    stream_of,
    streaming_flags,
    until,
)
from megatron.config.schema import DataConfig
from megatron.data.splits import build_splits
from megatron.data.streaming import producer as module
from megatron.data.streaming.producer import StreamingContext, StreamSamples, produce
from megatron.io.staging_dir import StagingDir


def first_error(entry, cache: Path, **options) -> str:
    """What the first sample says, in the process that started the producer and in one that did not."""
    samples = open_samples(entry, cache=cache, **options)
    messages = []
    for reader in (samples, open_samples(entry, cache=cache, **{**options, "starts": False})):
        with pytest.raises(ValueError) as error:
            reader[0]
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    return messages[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{",
            r"a.jsonl:4: not a JSON object .*Correct or remove it, or leave such records out with tools/preprocess_d",
        ),
        (
            '{"body": "x"}',
            r"a.jsonl:4: no key 'text'; there are: body. Set --streaming-json-key\. ",
        ),
        ('{"text": 1}', r"a.jsonl:4: 'text' is a JSON int; allowed: a string"),
    ],
)
def test_a_record_that_cannot_be_used_ends_the_run_with_its_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"text": "good"}) + "\n\n" + json.dumps({"text": "good"}) + f"\n{line}\n"
    )
    assert re.search(message, first_error(path, tmp_path / "c"))
    path.write_text(json.dumps({"text": "now it is correct"}) + "\n")
    assert read(open_samples(path, cache=tmp_path / "c")) == loop(
        [*b"now it is correct", 256], 20, 4
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--streaming-data-path .*a.jsonl has no documents"),
        (
            '{"text": "short"}\n',
            rf"a.jsonl has 6 tokens; one sample takes {S + 1}. Give more text or a smaller --seq-l",
        ),
        ('{"text": ""}\n', rf"a.jsonl has 0 tokens; one sample takes {S + 1}"),
    ],
)
def test_too_little_text(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    assert re.search(message, first_error(tmp_path / "a.jsonl", tmp_path / "c"))


def test_a_full_disk(tmp_path, monkeypatch):
    """The kernel refuses to let a file grow beyond 1 MB; the message fits into a file that is there already."""
    large(tmp_path / "a.jsonl")
    wrapper = tmp_path / "python"
    wrapper.write_text(
        f'#!/bin/sh\nulimit -f 2000\nexec {sys.executable} "$@"\n'
    )  # blocks of 512 bytes
    wrapper.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(wrapper))
    message = first_error(tmp_path / "a.jsonl", tmp_path / "c", samples=100_000, window=100_000)
    assert re.search(
        r"_text_document.bin cannot be written: File too large. Raise the limit", message
    )


def test_a_cache_that_cannot_be_made(tmp_path):
    corpus(tmp_path / "a.jsonl")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"tmp.*file"):
        open_samples(tmp_path / "a.jsonl", cache=tmp_path / "file/c")


def test_a_killed_producer_ends_the_run_and_the_next_run_goes_on(tmp_path):
    tokens = large(tmp_path / "a.jsonl")
    cache = tmp_path / "c"
    with StagingDir(stream_of(tmp_path / "a.jsonl", cache).prefix):
        real, started = module.start_producer, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                module,
                "start_producer",
                lambda *args: started.append(real(*args)) or started[0],
            )
            samples = open_samples(tmp_path / "a.jsonl", cache=cache)
        os.kill(started[0].pid, signal.SIGKILL)
        for reader in (samples, pickle.loads(pickle.dumps(samples))):
            with pytest.raises(
                ValueError,
                match=r"^the process that tokenises .*a.jsonl ended by signal 9 \(killed, "
                r"or out of memory\?\). Run the program again: it goes on where",
            ):
                reader[0]
    left, going = (
        stream_of(tmp_path / "a.jsonl", cache, run=run).error_file
        for run in ("this", "of another")
    )
    Path(going).write_bytes(bytes(4096))
    for path in (left, going):
        os.utime(path, (0, 0))  # messages of other runs go after a day
    assert read(open_samples(tmp_path / "a.jsonl", cache=cache, run="next")) == loop(
        tokens, 20, 4
    )
    assert os.path.exists(going) and not os.path.exists(left)


def test_a_producer_that_fails_by_our_fault_ends_the_run(tmp_path, monkeypatch, capfd):
    corpus(tmp_path / "a.jsonl")
    monkeypatch.setattr(module.dataclasses, "asdict", lambda _: {})
    with pytest.raises(ValueError, match="ended with exit code 1. Run"):
        open_samples(tmp_path / "a.jsonl", cache=tmp_path)[0]
    assert "KeyError: 'tokenizer'" in capfd.readouterr().err


PARENT = """
import sys, time
sys.path[:0] = sys.argv[2:]
from helpers import streams as t
from megatron.data.streaming.producer import StreamSamples
samples = StreamSamples(t.stream_of(sys.argv[1] + "/a.jsonl", sys.argv[1] + "/c"), 257, t.S, 300_000, 5, 4)
samples.start(lookahead=1 << 20)
print(samples[0].tolist(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_producer_ends_with_the_training_process(tmp_path, how):
    """Killed: what was made is kept. Ctrl-C, which a terminal sends to the process group: no word of the producer."""
    tokens = large(tmp_path / "a.jsonl")
    path = [str(REPO), str(REPO / "tests")]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), *path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    first = json.loads(parent.stdout.readline())
    assert first == loop(tokens, 1, 4)[0]
    os.killpg(parent.pid, how)
    out, err = parent.communicate(timeout=20)
    until(lambda: is_free(tmp_path / "c"))
    assert cached_tokens(tmp_path / "c") >= 4 * S + 1
    assert err.count("Traceback") == (how == signal.SIGINT) and out == ""
    errors = [path.read_text().rstrip("\0") for path in (tmp_path / "c").glob("*.error")]
    assert errors == [f"the process that had {tmp_path}/a.jsonl tokenised ended"] * (
        how == signal.SIGKILL
    )


def test_a_reader_does_not_wait_when_the_process_that_started_the_producer_has_ended(tmp_path):
    """Rank 0 ends by an error of its own: its producer is told to stop, and the other ranks see that it has."""
    large(tmp_path / "a.jsonl")
    first, other = (
        StreamSamples(stream_of(tmp_path / "a.jsonl", tmp_path / "c"), 257, S, 10**6, 5, 4)
        for _ in range(2)
    )
    first.start(lookahead=1000)
    other = pickle.loads(
        pickle.dumps(other)
    )  # another rank opens it when the producer has been started
    assert first[0].tolist() == other[0].tolist()
    del first
    with pytest.raises(ValueError, match="a.jsonl tokenised ended$"):
        for i in range(len(other)):
            other[i]
    assert is_free(tmp_path / "c")


def test_a_forked_worker_does_not_keep_the_producer_alive(tmp_path):
    large(tmp_path / "a.jsonl")
    samples = StreamSamples(
        stream_of(tmp_path / "a.jsonl", tmp_path / "c"), 257, S, 10**6, 5, 4
    )
    samples.start(lookahead=1000)
    assert len(samples[0]) == S + 1 and not is_free(tmp_path / "c")
    if not (worker := os.fork()):
        time.sleep(30)
        os._exit(0)
    try:
        del samples
        until(lambda: is_free(tmp_path / "c"))
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


@pytest.mark.parametrize(("told", "code"), [(b"q", 0), (b"", 1)])
def test_a_producer_that_hangs_is_not_waited_for(tmp_path, monkeypatch, told, code):
    stop, ended = threading.Event(), []
    monkeypatch.setattr(module, "GRACE_SECONDS", 0)
    monkeypatch.setattr(os, "read", lambda *_: told)
    monkeypatch.setattr(os, "_exit", ended.append)
    with open(tmp_path / "errors", "w+b") as errors:
        module._listen(stream_of("hf:x", tmp_path), errors.fileno(), stop)
        assert (errors.read() == b"") == bool(told)
    assert stop.is_set() and ended == [code]


def test_inputs_that_change_before_the_producer_reads_them(tmp_path):
    corpus(tmp_path / "a.jsonl")
    stream = stream_of(tmp_path / "a.jsonl", tmp_path)
    corpus(tmp_path / "a.jsonl", 41)
    with pytest.raises(
        ValueError, match=r"a.jsonl has changed since this run started. Start the run again"
    ):
        produce(stream, 100, 100, threading.Event())
    stop = threading.Event()
    stop.set()
    produce(stream, 100, 100, stop)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]


def test_inputs_that_make_no_sense(tmp_path):
    os.mkfifo(tmp_path / "pipe")
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
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            open_samples(*words)
    stream = stream_of("hf:x", "c")
    for name, sizes in (
        ("seq_length", (0, 1, 1)),
        ("num_samples", (1, 0, 1)),
        ("window", (1, 1, -1)),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*; allowed: a positive integer"):
            StreamSamples(stream, 257, *sizes[:2], 1, sizes[2])


def test_flags_that_contradict_each_other(tmp_path):
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
    corpus(tmp_path / "a.jsonl")
    with pytest.raises(
        ValueError,
        match=r"^--valid-data-path and --data-path are both empty, and 3 valid samples are "
        r"requested. Give --valid-data-path, or --eval-iters 0$",
    ):
        build_splits(
            DataConfig(streaming_data_path=(str(tmp_path / "a.jsonl"),)),
            seq_length=S,
            train_samples=1,
            valid_samples=3,
            test_samples=0,
            seed=1,
            tokenizer=TOKENIZER,
            streaming=StreamingContext(BYTES, "", False),
        )


def test_an_error_in_the_text_ends_every_rank(tmp_path, data):
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
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
        )
        for r in range(2)
    ]
    for rank, process in enumerate(ranks):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2 and "Traceback" not in err, err
        (line,) = [line for line in err.splitlines() if "error:" in line]
        assert line.startswith(
            f"{f'[rank {rank}] ' if rank else ''}error: {tmp_path}/a.jsonl:2: 'text' is a JSON int"
        )
