"""Which metric writers a run has, and what they do together."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import pytest

from helpers import runs
from helpers.fake_wandb import FakeWandb
from helpers.metric_rows import EVAL, TRAIN
from megatron import log, pretrain
from megatron.checkpoint.metadata import TrainingProgress
from megatron.config.schema import CheckpointConfig, LoggingConfig, RunConfig
from megatron.training.console_writer import ConsoleWriter
from megatron.training.jsonl_writer import JsonlWriter
from megatron.training.metric_writers import MetricsWriters, build_metric_writers
from megatron.training.tensorboard_writer import TensorboardWriter
from megatron.training.wandb_writer import WandbWriter


def test_named_set_has_own_names(printed, tmp_path, monkeypatch):
    """A named validation set on the console, in metrics.jsonl, TensorBoard and W&B. What a layer
    does not have is null in the file and left out by the others."""
    row = {**EVAL, "kind": "eval/wiki", "experts_per_token_by_layer": [2.0, None]}
    ConsoleWriter(1000, 1000 * 8192).write(row)
    assert printed().startswith(
        "eval/wiki at   10/1000 | loss  4.00000 | perplexity     54.598"
    )
    jsonl = JsonlWriter(tmp_path / "m.jsonl")
    jsonl.write(row)
    jsonl.close()
    written = json.loads((tmp_path / "m.jsonl").read_text())
    assert written["kind"] == "eval/wiki"
    assert written["experts_per_token_by_layer"] == [2.0, None]
    tags = {
        "eval/wiki/loss": 4.0,
        "eval/wiki/perplexity": math.exp(4),
        "eval/wiki/elapsed_s": 3700.0,
        "eval/wiki/experts_per_token_by_layer/0": 2.0,
    }
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    WandbWriter(LoggingConfig(wandb_project="project")).write(row)
    assert wandb.rows == [{"iteration": 10, "eval/wiki/iteration": 10, **tags}]
    board = TensorboardWriter(tmp_path / "board")
    scalars = []
    board.writer.add_scalar = lambda tag, value, step: scalars.append((tag, value, step))
    board.write(row)
    board.close()
    assert scalars == [(tag, value, 10) for tag, value in tags.items()]


def test_metrics_follow_on_save_error(tmp_path):
    for on_error in ("stop", "continue"):
        checkpoint = CheckpointConfig(save=str(tmp_path), on_save_error=on_error)
        writers = build_metric_writers(LoggingConfig(), checkpoint, 0, 10, 80)
        writers.close()
        assert writers.on_error == on_error


@pytest.mark.parametrize(
    ("flag", "package"), [("--wandb-project", "wandb"), ("--tensorboard-dir", "tensorboard")]
)
def test_missing_writer_package_is_an_error(tmp_path, monkeypatch, capsys, flag, package):
    """Every rank reports it before it joins the others, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    message = (
        f"{flag} x needs the package {package}, which is not installed. Install it: pip install "
        f"'moe-megatron[{package}]'"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(log, "_PEER_DELAY_SECONDS", 0)
        assert pretrain.main([*runs.flags("d", tmp_path), flag, "x"]) == 2
        assert capsys.readouterr().err.splitlines()[0].endswith(f"error: {message}")
    assert not list(tmp_path.iterdir())
    options = {flag[2:].replace("-", "_"): "x"}
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError) as info:
        build_metric_writers(LoggingConfig(**options), CheckpointConfig(), 0, 10, 80)
    assert str(info.value) == message


@pytest.mark.parametrize(
    "options, loaded, expected",
    [
        ({}, "", None),
        ({"save": "a"}, "", None),
        ({"load": "a"}, "a/iter_0000003", None),
        ({"save": "a", "load": "b"}, "b/iter_0000003", None),
        ({"save": "a", "load": "a", "finetune": True}, "a/iter_0000003", None),
        ({"save": "a", "load": "b", "load_or_init": True}, "", None),
        ({"save": "a", "load": "a"}, "a/iter_0000003", 3),
        ({"save": "a", "load": "./a/iter_0000003"}, "a/iter_0000003", 3),
        ({"save": "a", "load": "a", "load_or_init": True}, "", 0),
    ],
)
def test_run_continues_from_own_directory(options, loaded, expected):
    """Only then does it repeat steps that were logged before."""
    checkpoint = None
    progress = TrainingProgress()
    if loaded:
        checkpoint = types.SimpleNamespace(path=Path(loaded))
        progress.iteration = 3
    run = types.SimpleNamespace(
        config=RunConfig(checkpoint=CheckpointConfig(**options)),
        checkpoint=checkpoint,
        progress=progress,
    )
    assert pretrain.iteration_of_interruption(run) == expected


def test_flags_choose_the_writers(tmp_path, monkeypatch):
    def kinds(rank=0, save="", **options):
        checkpoint = CheckpointConfig(save=save)
        writers = build_metric_writers(LoggingConfig(**options), checkpoint, rank, 10, 80)
        writers.close()
        return [type(writer) for writer in writers.writers]

    everything = {
        "save": str(tmp_path / "run"),
        "tensorboard_dir": str(tmp_path / "tb"),
        "wandb_project": "p",
    }
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    assert kinds() == [ConsoleWriter]
    assert kinds(rank=1, **everything) == []
    assert not (tmp_path / "run").exists()
    assert kinds(**everything) == [ConsoleWriter, JsonlWriter, TensorboardWriter, WandbWriter]
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert kinds(metrics_file=str(tmp_path / "m.jsonl"), save=str(tmp_path / "other")) == [
        ConsoleWriter,
        JsonlWriter,
    ]
    assert (tmp_path / "m.jsonl").exists() and not (tmp_path / "other").exists()


def test_writers_forward_every_row():
    class Fake:
        def __init__(self):
            self.calls = []

        def write(self, row):
            self.calls.append(row)

        def close(self):
            self.calls.append("closed")

    fakes = [Fake(), Fake()]
    writers = MetricsWriters(fakes)
    writers.write(TRAIN)
    writers.close()
    assert [fake.calls for fake in fakes] == [[TRAIN, "closed"]] * 2


def test_all_writers_are_closed_despite_errors(tmp_path):
    class Failing:
        def close(self):
            raise OSError("full")

    first = JsonlWriter(tmp_path / "1.jsonl")
    last = JsonlWriter(tmp_path / "2.jsonl")
    with pytest.raises(OSError, match="full"):
        MetricsWriters([first, Failing(), last]).close()
    assert first.file.closed
    assert last.file.closed
