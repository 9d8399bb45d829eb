"""Disks that are full or cannot be written, and two runs at once: one line, and no finished-looking file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.namespaces import in_namespace, needs_namespace
from helpers.programs import BYTES, REPO, documents, jsonl, one_line_error, run
from megatron.io.staging_dir import StagingDir

TEXTS = [f"document {i} " * 40 for i in range(1500)]  # 750 KB, 1.5 MB of uint16


@needs_namespace
@pytest.mark.parametrize(
    "size", ["8k", "100k", "1m", "1560k"]
)  # at the lock, early, half-way, at the index
def test_a_full_disk_ends_preprocessing_and_more_room_continues_it(tmp_path, size):
    text = jsonl(tmp_path / "a.jsonl", TEXTS)
    done = in_namespace(
        tmp_path,
        f"""
mount -t tmpfs -o size={size} none "$DISK"
"$P" tools/preprocess_data.py --input "$1" --output-prefix "$DISK/x" {" ".join(BYTES)} --append-eod; echo "code $?"
ls "$DISK"
mount -o remount,size=20m "$DISK"
"$P" tools/preprocess_data.py --input "$1" --output-prefix "$DISK/x" {" ".join(BYTES)} --append-eod; echo "code $?"
ls "$DISK"; cp "$DISK"/x_text_document.* "$2"
""",
        text,
        tmp_path,
    )
    first, second = done.stdout.split("code 2\n")
    assert first == "" and "code 0" in second
    assert second.splitlines()[0].startswith(
        str(tmp_path / "disk/x_text_document: 1500 documents, ")
    )  # ls was empty
    (line,) = done.stderr.splitlines()
    assert (
        ": error: " in line
        and "No space left on device. Free some space" in line
        and str(tmp_path / "disk") in line
    )
    assert documents(tmp_path / "x_text_document") == [[*t.encode(), 256] for t in TEXTS]


@needs_namespace
def test_a_full_disk_ends_merging(tmp_path):
    run(
        "tools/preprocess_data.py",
        "--input",
        jsonl(tmp_path / "a.jsonl", TEXTS),
        "--output-prefix",
        "a",
        *BYTES,
        cwd=tmp_path,
    )
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


def test_a_limit_of_file_sizes_acts_like_a_full_disk(tmp_path):
    """Needs no rights: the kernel refuses to let any file grow beyond 200 KB."""
    text = jsonl(tmp_path / "a.jsonl", TEXTS)
    program = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            str(REPO / "tools/preprocess_data.py"),
            "--input",
            str(text),
            "--output-prefix",
            str(tmp_path / "out/x"),
            *BYTES,
        ],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "x_text_document.bin cannot be written: File too large" in one_line_error(done)
    )
    assert os.listdir(tmp_path / "out") == []


@needs_namespace
def test_a_target_that_cannot_be_written(tmp_path):
    text = jsonl(tmp_path / "a.jsonl", ["x"])
    done = in_namespace(
        tmp_path,
        f"""
mount -t tmpfs none "$DISK"; mount -o remount,ro "$DISK"
"$P" tools/preprocess_data.py --input "$1" --output-prefix "$DISK/new/x" {" ".join(BYTES)}; echo "code $?"
""",
        text,
    )
    assert done.stdout == "code 2\n"
    (line,) = done.stderr.splitlines()
    assert (
        "error: " in line
        and "Read-only file system" in line
        and str(tmp_path / "disk/new") in line
    )


def test_targets_that_are_no_folders(tmp_path):
    text = jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "file").touch()
    (tmp_path / "y.partial").touch()
    for prefix, match in (("file/x", f"{tmp_path}/file"), ("y", "y.partial")):
        line = one_line_error(
            run(
                "tools/preprocess_data.py",
                "--input",
                text,
                "--output-prefix",
                tmp_path / prefix,
                *BYTES,
                cwd=tmp_path,
                code=2,
            )
        )
        assert match in line
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "file", "y.partial"]


@pytest.mark.parametrize("tool", ["preprocess_data", "merge_datasets"])
def test_a_second_run_on_a_prefix_is_refused(tmp_path, tool):
    arguments = ("--input", jsonl(tmp_path / "a.jsonl", ["x"]), *BYTES)
    if tool == "merge_datasets":
        run("tools/preprocess_data.py", *arguments, "--output-prefix", "part", cwd=tmp_path)
        arguments = ("--input", "part_text_document")
    with StagingDir(tmp_path / "x"):
        line = run(
            f"tools/{tool}.py", *arguments, "--output-prefix", "x", cwd=tmp_path, code=2
        ).stderr
        assert (
            f"error: x is being written by process {os.getpid()} on " in line
            and line.count("\n") == 1
        )
    run(f"tools/{tool}.py", *arguments, "--output-prefix", "x", cwd=tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_is_one_line_and_the_same_command_continues(tmp_path, workers):
    """The signal goes to the whole group, as a terminal sends it, when the workers have started."""
    text = jsonl(tmp_path / "a.jsonl", TEXTS)
    program = f"""
import runpy, sys
from megatron.data.ingest import encode, preprocess
encode.ALONE_BYTES, preprocess.COMMIT_SECONDS = 0, 0
real = preprocess.PreprocessRun.__init__
def small(self, job): real(self, job, commit_seconds=0, chunk_bytes=3000)
preprocess.PreprocessRun.__init__ = small
if __name__ == "__main__":
    print("started", flush=True)
    sys.argv = [{str(REPO / "tools/preprocess_data.py")!r}, *sys.argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
    (tmp_path / "slow.py").write_text(program)
    arguments = [
        "--input",
        str(text),
        "--output-prefix",
        str(tmp_path / "x"),
        "--workers",
        str(workers),
        *BYTES,
    ]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "x.partial/state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "preprocess_data.py: interrupted\n"), errors
    assert not (tmp_path / "x_text_document.idx").exists()
    done = run("tools/preprocess_data.py", *arguments, cwd=tmp_path)
    assert "continuing the unfinished run" in done.stdout
    assert documents(tmp_path / "x_text_document") == [[*t.encode()] for t in TEXTS]


def test_a_language_without_sentences_is_refused(tmp_path):
    line = one_line_error(
        run(
            "tools/preprocess_data.py",
            "--input",
            jsonl(tmp_path / "a.jsonl", ["x"]),
            "--output-prefix",
            "x",
            "--lang",
            "german",
            *BYTES,
            cwd=tmp_path,
            code=2,
        )
    )
    assert (
        "--lang is german; allowed: only with --split-sentences" in line or "'german'" in line
    )


def test_standard_input_to_skipped_records(tmp_path):
    lines = [json.dumps({"text": "a"}), "{", json.dumps({"text": "b"})]
    done = subprocess.run(
        [
            sys.executable,
            str(REPO / "tools/preprocess_data.py"),
            "--input",
            "-",
            "--output-prefix",
            str(tmp_path / "x"),
            "--on-error",
            "skip",
            *BYTES,
        ],
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
    assert rejected.pop("reason").startswith(
        "not a JSON object in UTF-8 (unexpected end of data"
    )
    assert rejected == {"file": "standard input", "line": 2, "record": "{"}
