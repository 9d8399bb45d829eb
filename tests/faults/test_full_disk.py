"""A full disk during a save: old checkpoints stay valid, and the run stops or continues."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import runs
from helpers.namespaces import REPO, in_namespace, needs_namespace
from megatron.checkpoint.directory import list_checkpoints
from megatron.checkpoint.manifest import check_files


def valid_iterations(folder: Path) -> list[int]:
    """Return the iterations of the checkpoints, all of which must be valid."""
    entries, problems = list_checkpoints(folder)
    assert not problems
    for entry in entries:
        check_files(entry.path, entry.manifest["files"], entry.manifest)
    return [entry.manifest["iteration"] for entry in reversed(entries)]


@needs_namespace
@pytest.mark.parametrize("on_error, options", [("stop", ("--async-save",)), ("continue", ())])
def test_no_space_for_third_checkpoint(on_error, options, data, tmp_path):
    """The disk has 1 MB, a checkpoint 0.4 MB, and each of four steps is saved."""
    out = tmp_path / "disk"
    argv = [
        *runs.flags(data, out, 4),
        "--eval-iters",
        "0",
        "--save-interval",
        "1",
        "--metrics-file",
        str(tmp_path / "metrics.jsonl"),
        "--on-save-error",
        on_error,
        *options,
    ]
    done = in_namespace(
        tmp_path,
        'mount -t tmpfs -o size=1m none "$DISK"; "$P" pretrain_gpt.py "${@:2}"; '
        'code=$?; cp -r "$DISK/checkpoints" "$1"; exit $code',
        tmp_path / "copy",
        *argv,
    )
    text = done.stdout + done.stderr
    assert valid_iterations(tmp_path / "copy") == [1, 2], text
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == [
        "iter_0000001",
        "iter_0000002",
        "latest",
        "latest.json",
    ]
    message = (
        r"iter_0000003 needs 0\.\d MB, but the disk of \S+ has 0\.\d MB free\. Free some space.*; "
        r"the last good checkpoint is \S+iter_0000002"
    )
    failed_saves = re.findall(message.replace("iter_0000003", r"iter_000000\d"), text)
    assert len(failed_saves) == {"stop": 1, "continue": 2}[on_error]
    assert re.search(message, text) and "Traceback" not in text
    assert text.count("The training continues, as --on-save-error sets") == (
        on_error == "continue"
    )
    assert done.returncode == 2, (
        "also with continue: the last checkpoint is the result of the run"
    )
    assert len(runs.metrics(tmp_path)) == {"stop": 3, "continue": 4}[on_error]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_disk_fills_during_write(on_error, data, tmp_path):
    """The kernel limits files to 100 KB: there was space before the write, and then not."""
    checkpoints = tmp_path / "checkpoints"
    program = (
        "import resource, runpy, sys; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    argv = [
        *runs.flags(data, tmp_path, 2),
        "--eval-iters",
        "0",
        "--save-interval",
        "1",
        "--on-save-error",
        on_error,
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, str(REPO / "pretrain_gpt.py"), *argv],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=300,
    )
    text = done.stdout + done.stderr
    assert (
        re.search(
            r"rank_00000.safetensors cannot be written: File too large. Raise the limit.*; "
            "no checkpoint was saved",
            text,
        )
        and "Traceback" not in text
    ), text
    assert done.returncode == 2
    assert len(runs.metrics(tmp_path)) == {"stop": 1, "continue": 2}[on_error]
    assert not list(checkpoints.glob("*iter_*"))
