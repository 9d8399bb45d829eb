"""Metrics of a run that was killed and resumed: one curve in every place that shows it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import killable, runs, wandb_files
from helpers.killed_run import run_until_killed
from helpers.spawn import free_port
from helpers.wandb_server import WandbServer
from megatron.training.metrics_file import read_metrics, without_repeated_steps

KILLED_AFTER = 8
SAVED = 5
LAST = 11
CHECKPOINTS = ["iter_0000005", "iter_0000010", "iter_0000011"]


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory) -> Path:
    """The folder of a run that was killed between the log line of 8 and the next one.

    Its last checkpoint is of 5: it repeats 6 to 8, and the evaluation at 6.
    """
    out = tmp_path_factory.mktemp("resumed")
    argv = [
        *runs.flags(data, out, LAST),
        *("--eval-interval", "3", "--save-interval", str(SAVED)),
        *("--load", str(out / "checkpoints"), "--load-or-init"),
        *("--tensorboard-dir", str(out / "tensorboard"), "--wandb-project", "p"),
        *("--wandb-mode", "offline", "--wandb-save-dir", str(out), "--wandb-log-checkpoints"),
    ]
    os.environ |= {"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(out / "staging")}
    arguments = (argv, KILLED_AFTER, free_port(), str(out / "log"))
    process = killable.server().Process(target=run_until_killed, args=arguments, daemon=True)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (out / "log").read_text()[-3000:]
    (process,) = killable.start(argv, 1, free_port(), str(out / "log"))
    process.join()
    assert process.exitcode == 0, (out / "log").read_text()[-3000:]
    return out


def expected_rows(out: Path) -> list[dict]:
    """Rows of measurements, each once, from metrics.jsonl."""
    rows = read_metrics(out / "metrics.jsonl")
    starts = [row["iteration"] for row in rows if row["kind"] == "run"]
    assert starts == [0, SAVED]
    once = [row for row in without_repeated_steps(rows) if row["kind"] != "run"]
    assert len(once) == len(rows) - 2 - 5, (
        "6, 7 and 8, and the evaluation and the probe at 6, are twice there"
    )
    return once


def test_tensorboard_shows_one_curve(resumed):
    """In all summaries, as TensorBoard's own reader sees them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(resumed / "tensorboard"), {"tensors": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    assert "train/experts_per_token_histogram" in tags
    for tag in tags:
        steps = [event.step for event in events.Tensors(tag)]
        assert steps == sorted(set(steps)), tag
    for kind in ("train", "eval", "test"):
        shown = [
            (event.step, float(make_ndarray(event.tensor_proto)))
            for event in events.Tensors(f"{kind}/loss")
        ]
        rows = [row for row in expected_rows(resumed) if row["kind"] == kind]
        assert [step for step, _ in shown] == [row["iteration"] for row in rows]
        losses = [row["loss"] for row in rows]
        assert [loss for _, loss in shown] == pytest.approx(losses, rel=1e-6)  # fp32
    assert [event.step for event in events.Tensors("run/text_summary")] == [1, SAVED + 1]


def same_curve(history: list[dict], rows: list[dict]) -> None:
    """Compare W&B's history with rows: each once, in order, with the same loss."""
    assert [row["_step"] for row in history] == list(range(len(rows)))
    assert [row["iteration"] for row in history] == [row["iteration"] for row in rows]
    for logged, row in zip(history, rows, strict=True):
        name = "router_similarity_mean" if row["kind"] == "probe" else "loss"
        assert logged[f"{row['kind']}/{name}"] == pytest.approx(row[name], rel=1e-6)


def test_wandb_files_hold_one_curve(resumed):
    """Two files of one run. Both lives computed the same, so the order of kinds is the same."""
    files = wandb_files.run_files(resumed)
    assert len(files) == 2
    assert len({path.name for path in files}) == 1, "the id was remembered"
    same_curve(wandb_files.history(resumed), expected_rows(resumed))


def test_synced_run_is_one_curve(resumed):
    """As a server of Weights & Biases receives it from `wandb sync`, with the checkpoints."""
    command = [sys.executable, "-m", "wandb", "sync", "--yes", str(resumed / "wandb")]
    with WandbServer() as server:
        environment = {**os.environ, **server.variables()}
        done = subprocess.run(
            command, env=environment, cwd=resumed, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (run,) = server.runs.values()
        same_curve(run.history(), expected_rows(resumed))
        assert sorted(run.artifacts) == [[name, "latest"] for name in CHECKPOINTS]


def test_checkpoints_are_artifacts_of_the_run(resumed):
    """Those of 5, 10 and 11, each with all files of its manifest."""
    logged = [
        record.artifact if record.HasField("artifact") else record.request.log_artifact.artifact
        for path in wandb_files.run_files(resumed)
        for record in wandb_files.records(path)
        if record.HasField("artifact") or record.request.HasField("log_artifact")
    ]
    assert [sorted(a.aliases) for a in logged] == [[name, "latest"] for name in CHECKPOINTS]
    for name, artifact in zip(CHECKPOINTS, logged, strict=True):
        names = {entry.path for entry in artifact.manifest.contents}
        checkpoint = resumed / "checkpoints" / name
        assert names == {path.name for path in checkpoint.iterdir()}
