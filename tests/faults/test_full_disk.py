"""A disk that gets full during a save: the old checkpoints stay whole, and the run stops or goes on as it was told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import runs
from helpers.namespaces import REPO, in_namespace, needs_namespace
from megatron.checkpoint import directory


def whole(folder: Path) -> list[int]:
    """Iterations of the checkpoints, all of which must be whole."""
    good, bad = directory.list_checkpoints(folder)
    assert not bad
    for path, manifest in good:
        directory.check_files(path, manifest["files"], manifest)
    return [manifest["iteration"] for _, manifest in reversed(good)]


@needs_namespace
@pytest.mark.parametrize("answer, options", [("stop", ("--async-save",)), ("continue", ())])
def test_no_room_for_the_third_checkpoint(answer, options, data, tmp_path):
    """1 MB of disk, 0.4 MB a checkpoint, a save after each of four steps."""
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
        answer,
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
    assert whole(tmp_path / "copy") == [1, 2], text
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == [
        "iter_0000001",
        "iter_0000002",
        "latest",
    ]
    message = (
        r"the checkpoint of iteration 3 takes 0\.\d MB, but \S+ has 0\.\d MB free\. Free some space.*; "
        r"the last good checkpoint is \S+iter_0000002"
    )
    assert len(re.findall(message.replace("iteration 3", r"iteration \d"), text)) == (
        1 if answer == "stop" else 2
    )
    assert re.search(message, text) and "Traceback" not in text
    assert text.count("The training goes on, as --on-save-error says") == (answer == "continue")
    assert done.returncode == 2, "also when it went on: the last checkpoint is the run's result"
    assert len(runs.metrics(tmp_path)) == (3 if answer == "stop" else 4)


@pytest.mark.parametrize("answer", ["stop", "continue"])
def test_the_disk_gets_full_while_a_file_is_written(answer, data, tmp_path):
    """The kernel refuses to let any file grow beyond 100 KB: there was room, and then there is none."""
    runs_there = tmp_path / "checkpoints"
    program = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    argv = [
        *runs.flags(data, tmp_path, 2),
        "--eval-iters",
        "0",
        "--save-interval",
        "1",
        "--on-save-error",
        answer,
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
            r"rank_00000.safetensors cannot be written: File too large. Raise the limit.*; no checkpoint was "
            "saved",
            text,
        )
        and "Traceback" not in text
    ), text
    assert done.returncode == 2 and len(runs.metrics(tmp_path)) == (
        1 if answer == "stop" else 2
    )
    assert not list(runs_there.glob("*iter_*"))
