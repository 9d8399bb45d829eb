"""Full or read-only disks, concurrent runs, Ctrl-C: a one-line error, and no pair that looks
finished but is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from helpers.namespaces import in_namespace, needs_namespace
from helpers.programs import BYTES, REPO, documents, jsonl, one_line_error, run
from helpers.waiting import wait_until
from megatron.io.staging_dir import StagingDir

TOOL = "tools/preprocess_data.py"
TEXTS = [f"document {i} " * 40 for i in range(1500)]  # 750 KB, 1.5 MB of uint16


@needs_namespace
@pytest.mark.parametrize(
    "size", ["8k", "100k", "1m", "1560k"]
)  # full at the lock, early, half-way, at the index
def test_run_continues_after_full_disk(tmp_path, size):
    text = jsonl(tmp_path / "a.jsonl", TEXTS)
    done = in_namespace(
        tmp_path,
        f"""
mount -t tmpfs -o size={size} none "$DISK"
"$P" {TOOL} --input "$1" --output-prefix "$DISK/x" {" ".join(BYTES)} --append-eod; echo "code $?"
ls "$DISK"
mount -o remount,size=20m "$DISK"
"$P" {TOOL} --input "$1" --output-prefix "$DISK/x" {" ".join(BYTES)} --append-eod; echo "code $?"
ls "$DISK"; cp "$DISK"/x_text_document.* "$2"
""",
        text,
        tmp_path,
    )
    first, second = done.stdout.split("code 2\n")
    assert first == "" and "code 0" in second
    # The first ls printed nothing.
    assert second.splitlines()[0].startswith(
        str(tmp_path / "disk/x_text_document: 1500 documents, ")
    )
    (line,) = done.stderr.splitlines()
    assert ": error: " in line and "No space left on device. Free some space" in line
    assert str(tmp_path / "disk") in line
    assert documents(tmp_path / "x_text_document") == [[*t.encode(), 256] for t in TEXTS]


@needs_namespace
def test_full_disk_ends_merging(tmp_path):
    text = jsonl(tmp_path / "a.jsonl", TEXTS)
    run(TOOL, "--input", text, "--output-prefix", "a", *BYTES, cwd=tmp_path)
    done = in_namespace(
        tmp_path,
        """
mount -t tmpfs -o size=1m none "$DISK"
"$P" tools/merge_datasets.py --input "$1" --output-prefix "$DISK/all"; echo "code $?"; ls "$DISK"
""",
        tmp_path / "a_text_document",
    )
    assert done.stdout == "code 2\n", done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and ": error: " in done.stderr


def test_file_size_limit_is_reported(tmp_path):
    """Like a full disk, but without special rights: no file may grow beyond 200 KB."""
    text = jsonl(tmp_path / "a.jsonl", TEXTS)
    program = (
        "import resource, runpy, sys; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = ["--input", str(text), "--output-prefix", str(tmp_path / "out/x"), *BYTES]
    done = subprocess.run(
        [sys.executable, "-c", program, str(REPO / TOOL), *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    line = one_line_error(done)
    assert "x_text_document.bin cannot be written: File too large" in line
    assert os.listdir(tmp_path / "out") == []


@needs_namespace
def test_read_only_target_is_reported(tmp_path):
    text = jsonl(tmp_path / "a.jsonl", ["x"])
    done = in_namespace(
        tmp_path,
        f"""
mount -t tmpfs none "$DISK"; mount -o remount,ro "$DISK"
"$P" {TOOL} --input "$1" --output-prefix "$DISK/new/x" {" ".join(BYTES)}; echo "code $?"
""",
        text,
    )
    assert done.stdout == "code 2\n"
    (line,) = done.stderr.splitlines()
    assert "error: " in line and "Read-only file system" in line
    assert str(tmp_path / "disk/new") in line


def test_targets_below_files_are_refused(tmp_path):
    text = jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "file").touch()
    (tmp_path / "y.partial").touch()
    for prefix, match in (("file/x", f"{tmp_path}/file"), ("y", "y.partial")):
        arguments = ("--input", text, "--output-prefix", tmp_path / prefix, *BYTES)
        line = one_line_error(run(TOOL, *arguments, cwd=tmp_path, code=2))
        assert match in line
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "file", "y.partial"]


@pytest.mark.parametrize("tool", ["preprocess_data", "merge_datasets"])
def test_second_program_on_prefix_is_refused(tmp_path, tool):
    arguments = ("--input", jsonl(tmp_path / "a.jsonl", ["x"]), *BYTES)
    if tool == "merge_datasets":
        run(TOOL, *arguments, "--output-prefix", "part", cwd=tmp_path)
        arguments = ("--input", "part_text_document")
    arguments = (f"tools/{tool}.py", *arguments, "--output-prefix", "x")
    with StagingDir(tmp_path / "x"):
        error = run(*arguments, cwd=tmp_path, code=2).stderr
        assert f"error: x is being written by process {os.getpid()} on " in error
        assert error.count("\n") == 1
    run(*arguments, cwd=tmp_path)


SMALL_CHUNKS = f"""
import runpy, sys
from megatron.data.ingest import encoder_pool, preprocess
encoder_pool._START_WORKERS_BYTES = 0
original = preprocess.PreprocessRun.__init__
def init(self, config): original(self, config, commit_seconds=0, chunk_bytes=3000)
preprocess.PreprocessRun.__init__ = init
if __name__ == "__main__":
    sys.argv = [{str(REPO / TOOL)!r}, *sys.argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_command_can_be_repeated(tmp_path, workers):
    """A terminal sends Ctrl-C to the process group: one line, and the same command continues."""
    text = jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "slow.py").write_text(SMALL_CHUNKS)
    outputs = ["--output-prefix", str(tmp_path / "x"), "--workers", str(workers)]
    arguments = ["--input", str(text), *outputs, *BYTES]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    wait_until((tmp_path / "x.partial/state.json").exists, "a commit", limit=120)
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "preprocess_data.py: interrupted\n"), errors
    assert not (tmp_path / "x_text_document.idx").exists()
    done = run(TOOL, *arguments, cwd=tmp_path)
    assert "continuing the unfinished run" in done.stdout
    assert documents(tmp_path / "x_text_document") == [[*t.encode()] for t in TEXTS]


def test_lang_without_split_sentences_is_refused(tmp_path):
    text = jsonl(tmp_path / "a.jsonl", ["x"])
    arguments = ("--input", text, "--output-prefix", "x", "--lang", "german", *BYTES)
    line = one_line_error(run(TOOL, *arguments, cwd=tmp_path, code=2))
    assert (
        "--lang is german; allowed: only with --split-sentences" in line or "'german'" in line
    )


def test_standard_input_with_skipped_records(tmp_path):
    lines = [json.dumps({"text": "a"}), "{", json.dumps({"text": "b"})]
    arguments = ["--input", "-", "--output-prefix", str(tmp_path / "x"), "--on-error", "skip"]
    done = subprocess.run(
        [sys.executable, str(REPO / TOOL), *arguments, *BYTES],
        input="\n".join(lines),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    warning, last = done.stdout.splitlines()
    assert "WARNING skipped standard input:2: not a JSON object" in warning
    assert "2 documents, 2 tokens, 2 bytes" in last and "1 skipped" in last
    assert documents(tmp_path / "x_text_document") == [[97], [98]]
    rejected = json.loads((tmp_path / "x.rejected.jsonl").read_text())
    reason = rejected.pop("reason")
    assert reason.startswith("not a JSON object in UTF-8 (unexpected end of data")
    assert rejected == {"file": "standard input", "line": 2, "record": "{"}
