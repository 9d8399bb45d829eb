"""The logger of each rank, and the exit codes of tools."""

import fcntl
import logging
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from helpers.waiting import LIMIT_SECONDS, wait_until
from megatron import log

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def restored_loggers():
    """Restore the loggers after each test."""
    loggers = [log.get_logger(), logging.getLogger("DeepSpeed")]
    before = [
        (logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers
    ]
    yield
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers = handlers


def test_rank0_logs_from_info_up(monkeypatch, capsys):
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


def test_other_ranks_log_warnings_with_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    logger = log.setup(logging.DEBUG)
    logger.info("quiet")
    logger.error("bad")
    assert re.fullmatch(r"\[rank 3\] \d\d:\d\d:\d\d ERROR bad\n", capsys.readouterr().out)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_common_warnings_appear_once(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    log.setup()
    log.warn_on_rank0("%d of %d", 1, 2)
    log.warn_on_rank0("100%")
    out = capsys.readouterr().out
    assert ("WARNING 1 of 2" in out and "WARNING 100%" in out) == (rank == "0")
    assert bool(out) == (rank == "0")


def test_second_setup_replaces_the_first(monkeypatch, capsys):
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


def test_error_is_reported_in_one_line(monkeypatch, capsys):
    """Ranks other than 0 wait before, so that the launcher can end them."""
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
def test_tool_exit_codes_and_output(tmp_path, body, code, out, err):
    done = run_body(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def run_body(folder: Path, body: str, **arguments) -> subprocess.CompletedProcess:
    """Run `body` as a tool in a process of its own."""
    program = f"import sys\nfrom megatron.log import run_tool\ndef body():\n    {body}\n"
    program += "sys.exit(run_tool('tool', body))"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        text=True,
        timeout=LIMIT_SECONDS,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **arguments},
    )


@pytest.mark.parametrize(
    "body", ["print('x' * 10**6)", "print('x')"], ids=["while writing", "while flushing"]
)
def test_closed_output_exits_141(tmp_path, body):
    reading, writing = os.pipe()
    os.close(reading)
    done = run_body(tmp_path, body, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_bug_keeps_its_traceback(tmp_path):
    done = run_body(tmp_path, "raise TypeError('bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr


TRAIN = ("tools/train_tokenizer.py", "--vocab-size", "300", "--output", "t", "--input")


def start_train_tokenizer(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, REPO / TRAIN[0], *TRAIN[1:], *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def unread_bytes(pipe: BinaryIO) -> int:
    """Bytes that were written to a pipe and not read yet."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0]


def cpu_seconds(pid: int) -> float:
    """CPU time of a running process, which does not depend on other programs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user_ticks, system_ticks = fields[11:13]
    return (int(user_ticks) + int(system_ticks)) / os.sysconf("SC_CLK_TCK")


def interrupt(process: subprocess.Popen) -> tuple[str, str]:
    """Send SIGINT until the process ends, and return its output.

    Python handles a signal between two bytecodes. One that arrives just before a
    blocking system call is handled only when the call returns, so it is sent again
    after a while.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            assert time.monotonic() < deadline, "the tool does not end"


@pytest.mark.parametrize("more", [(), ("--max-bytes", "9"), ("--kind", "sentencepiece")])
def test_ctrl_c_ends_a_reading_tool(tmp_path, more):
    """One that waits for more of a pipe that stays open."""
    os.mkfifo(tmp_path / "pipe")
    tool = start_train_tokenizer(tmp_path, "pipe", *more)
    # Opening the pipe waits until the tool opens it, too.
    with open(tmp_path / "pipe", "wb", buffering=0) as pipe:
        pipe.write(b'{"text": "a"}\n')
        wait_until(lambda: unread_bytes(pipe) == 0, "reading the line")
        out, err = interrupt(tool)
    assert (tool.returncode, out, err) == (130, "", "train_tokenizer.py: interrupted\n")
    assert os.listdir(tmp_path) == ["pipe"]


def test_ctrl_c_ends_tokenizer_training(tmp_path):
    """It ends while the library's threads train, long before they would be done.

    The tool trains once it has computed for a second after the end of its input.
    """
    os.mkfifo(tmp_path / "pipe")
    cpu_before = cpu_of_children()
    tool = start_train_tokenizer(tmp_path, "pipe", "--vocab-size", "60000")
    with open(tmp_path / "pipe", "w") as pipe:
        for i in range(300_000):
            pipe.write(f'{{"text": "{i * 7919 % 100003} {i * 104729 % 1000003}"}}\n')
    cpu_at_end_of_input = cpu_seconds(tool.pid)
    wait_until(lambda: cpu_seconds(tool.pid) > cpu_at_end_of_input + 1, "training")
    cpu_at_signal = cpu_seconds(tool.pid)
    out, err = interrupt(tool)
    assert (tool.returncode, out, err) == (130, "", "train_tokenizer.py: interrupted\n")
    assert cpu_of_children() - cpu_before - cpu_at_signal < 5
    assert os.listdir(tmp_path) == ["pipe"]


def cpu_of_children() -> float:
    """CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    "script",
    [
        "tools/inspect_dataset.py",
        "tools/merge_datasets.py",
        "tools/train_tokenizer.py",
        "dataset/make_corpus.py",
    ],
)
def test_tools_exit_141_on_closed_output(tmp_path, script):
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
        timeout=LIMIT_SECONDS,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_output_survives_any_encoding():
    """What stdout's encoding lacks is escaped, in logs and in what tools print."""
    code = "\n".join(
        [
            "from megatron import log",
            "log.run_tool('tool', lambda: print('größe'))",
            "log.setup().info('größe')",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == "gr\\xf6\\xdfe" and second.endswith(" gr\\xf6\\xdfe")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("naïve 日本", "naïve 日本"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\ud800", r"\ud800"),
        ("x" * 20_000, f"{'x' * 5000} ... {'x' * 5000}"),
    ],
)
def test_errors_are_one_printable_line(text, shown, capsys):
    """Names in files may have any characters, such as those that clear a terminal."""

    def fail():
        raise ValueError(text)

    log.report_error(ValueError(text))
    assert log.run_tool("tool", fail) == 2
    assert capsys.readouterr().err == f"error: {shown}\ntool: error: {shown}\n"
