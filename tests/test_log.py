"""The logger: what each rank prints."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron import log

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def restored():
    """Leave the loggers as other tests expect them."""
    loggers = [log.get_logger(), logging.getLogger("DeepSpeed")]
    before = [
        (logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers
    ]
    yield
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


def test_rank_0_prints_from_info_up(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    logger = log.setup()
    logger.debug("quiet")
    logger.info("loss %d", 3)
    logger.warning("careful")
    logging.getLogger("megatron.config.cli").warning("from a child")
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"(\d\d:\d\d:\d\d) loss 3\n\d\d:\d\d:\d\d WARNING careful\n\d\d:\d\d:\d\d WARNING from a "
        r"child\n",
        out,
    )
    assert err == ""


def test_other_ranks_print_warnings_with_their_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    logger = log.setup(logging.DEBUG)
    logger.info("quiet")
    logger.error("bad")
    assert re.fullmatch(r"\[rank 3\] \d\d:\d\d:\d\d ERROR bad\n", capsys.readouterr().out)


def test_setting_up_again_replaces(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert log.setup() is log.setup("DEBUG") is log.get_logger()
    log.get_logger().debug("once")
    assert capsys.readouterr().out.count("once") == 1


def test_each_line_is_flushed(monkeypatch):
    import io

    class Stream(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed += 1

    monkeypatch.setattr(sys, "stdout", Stream())
    monkeypatch.setenv("RANK", "0")
    log.setup().info("one")
    log.get_logger().info("two")
    assert sys.stdout.flushed == 2


def test_quiet_deepspeed():
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.INFO)
    log.quiet_deepspeed()
    assert logger.level == logging.WARNING and not logger.isEnabledFor(logging.INFO)


def test_an_error_is_one_line_and_other_ranks_wait(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(log.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "0")
    log.report_error(ValueError("--x is 1"))
    assert capsys.readouterr().err == "error: --x is 1\n" and waits == []
    monkeypatch.setenv("RANK", "2")
    log.report_error(ValueError("--x is 1"))
    assert capsys.readouterr().err == "[rank 2] error: --x is 1\n" and waits == [3]


@pytest.mark.parametrize(
    ("body", "code", "out", "err"),
    [
        ("return None", 0, "", ""),
        ("return 1", 1, "", ""),
        ("print('x')", 0, "x\n", ""),
        ("raise ValueError('--x is 1')", 2, "", "tool: error: --x is 1\n"),
        ("open('none')", 2, "", "tool: error: [Errno 2] No such file or directory: 'none'\n"),
        ("raise KeyboardInterrupt", 130, "", "tool: interrupted\n"),
        ("raise BrokenPipeError", 141, "", ""),
    ],
)
def test_outcomes_of_a_tool(tmp_path, body, code, out, err):
    done = run_body(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def run_body(folder: Path, body: str, **arguments) -> subprocess.CompletedProcess:
    program = f"import sys\nfrom megatron.log import run_tool\ndef body():\n    {body}\n"
    program += "sys.exit(run_tool('tool', body))"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **arguments},
    )


@pytest.mark.parametrize(
    "body", ["print('x' * 10**6)", "print('x')"], ids=["while writing", "while flushing"]
)
def test_nobody_reads_the_output(tmp_path, body):
    reading, writing = os.pipe()
    os.close(reading)
    done = run_body(tmp_path, body, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_bug_stays_a_traceback(tmp_path):
    done = run_body(tmp_path, "raise TypeError('bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr


TRAIN = ("tools/train_tokenizer.py", "--vocab-size", "300", "--output", "t", "--input")


@pytest.mark.parametrize("more", [(), ("--max-bytes", "9"), ("--kind", "sentencepiece")])
def test_ctrl_c_ends_a_tool_with_one_line(tmp_path, more):
    """It reads a pipe that stays open."""
    os.mkfifo(tmp_path / "pipe")
    tool = subprocess.Popen(
        [sys.executable, REPO / TRAIN[0], *TRAIN[1:], "pipe", *more],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with open(tmp_path / "pipe", "wb", buffering=0) as pipe:  # waits until it reads
        pipe.write(b'{"text": "a"}\n')
        time.sleep(
            0.5
        )  # a signal in the moment before read() is heard at its end only, as in all of Python
        tool.send_signal(signal.SIGINT)
        out, err = tool.communicate(timeout=60)
    assert (tool.returncode, out, err) == (130, "", "train_tokenizer.py: interrupted\n")
    assert os.listdir(tmp_path) == ["pipe"]


def test_ctrl_c_during_the_training_itself(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(
            f'{{"text": "{i * 7919 % 100003} {i * 104729 % 1000003}"}}\n'
            for i in range(300_000)
        )
    tool = subprocess.Popen(
        [sys.executable, REPO / TRAIN[0], *TRAIN[1:], "a.jsonl", "--vocab-size", "60000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(4)
    tool.send_signal(signal.SIGINT)
    sent = time.monotonic()
    out, err = tool.communicate(timeout=60)
    assert (tool.returncode, out, err) == (130, "", "train_tokenizer.py: interrupted\n")
    assert time.monotonic() - sent < 5 and os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(
    "script",
    [
        "tools/inspect_dataset.py",
        "tools/merge_datasets.py",
        "tools/train_tokenizer.py",
        "dataset/make_corpus.py",
    ],
)
def test_tools_whose_output_nobody_reads(tmp_path, script):
    import numpy as np

    from megatron.data.indexed.writer import IndexedWriter

    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([1, 2])
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    arguments = {
        "inspect": ["d"],
        "merge": ["--input", "d", "--output-prefix", "e"],
        "train": [*TRAIN[1:], "a.jsonl"],
        "make": ["--output", "c", "--max-bytes", "200000"],
    }
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, REPO / script, *arguments[Path(script).stem.split("_")[0]]],
        cwd=tmp_path,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
