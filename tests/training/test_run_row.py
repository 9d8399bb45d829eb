"""The row of kind run: what was started, where, and the size of the model."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

import megatron
from helpers import runs
from megatron.config.run_json import config_from_dict
from megatron.config.schema import RunConfig
from megatron.model.parameter_count import ParameterCount
from megatron.parallel.groups import Groups
from megatron.pretrain import parse_flags
from megatron.training import run_row
from megatron.training.metrics_file import read_metrics, without_repeated_steps

SIZE = ParameterCount(100, {"embedding": 60, "routed experts": 40}, 70, 80)


def test_row_describes_the_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--lr", "1e-3"])
    row = run_row.describe_run(RunConfig(), Groups(world_size=4), SIZE, 7, 1_700_000_000.5)
    assert row["kind"] == "run"
    assert row["iteration"] == 7
    assert row["started"] == "2023-11-14T22:13:20+00:00"
    assert row["command"] == ["pretrain_gpt.py", "--lr", "1e-3"]
    assert row["version"] == megatron.__version__
    assert (row["world_size"], row["device"]) == (4, "cpu")
    assert row["cpu_cores"] >= 1
    assert row["total_parameters"] == 100
    assert (row["active_parameters_min"], row["active_parameters_max"]) == (70, 80)
    assert row["parameters"] == SIZE.parts
    assert config_from_dict(row["config"]) == RunConfig()
    assert (
        json.loads(json.dumps(row))["config"]["train"]["seed"] == row["config"]["train"]["seed"]
    )


def test_start_defaults_to_now():
    before = datetime.now(timezone.utc).replace(microsecond=0)
    row = run_row.describe_run(RunConfig(), Groups(), SIZE, 0)
    started = datetime.fromisoformat(row["started"])
    assert before <= started <= datetime.now(timezone.utc)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: B\n", "A CPU @ 2 GHz"),
        ("processor\t: 0\nmodel name\t:\n", "m"),
        (None, "m"),
    ],
)
def test_cpu_has_a_name(content, expected, tmp_path, monkeypatch):
    """Where the system names no model, as on some ARM machines, it is the architecture."""
    monkeypatch.setattr(run_row.platform, "machine", lambda: "m")
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    assert run_row.cpu_name(tmp_path / "cpuinfo") == expected


def test_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert run_row.device_name(torch.device("cuda", 1)) == "GPU 1"


def test_each_start_writes_it_first(data, tmp_path, ranks2):
    """Two ranks write it once. The second start resumes at 2 and repeats nothing."""
    more = ("--eval-iters", "0", "--split", "100,0,0", *runs.EP2)
    argv = runs.flags(data, tmp_path, 4, *more, "--load-or-init")
    argv += ["--load", str(tmp_path / "checkpoints")]
    ranks2.run(runs.train, [*argv, "--exit-interval", "2"], timeout=300)
    ranks2.run(runs.train, argv, timeout=300)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["kind"], row["iteration"]) for row in rows] == [
        ("run", 0),
        ("train", 1),
        ("train", 2),
        ("run", 2),
        ("train", 3),
        ("train", 4),
    ]
    assert without_repeated_steps(rows) == rows
    first, second = (row for row in rows if row["kind"] == "run")
    assert first["world_size"] == 2
    assert first["parameters"] == second["parameters"]
    assert sum(first["parameters"].values()) == first["total_parameters"]
    assert first["parameters"]["routed experts"] == 4 * 2 * 32 * 32, "those of both ranks"
    saved = json.loads(Path(tmp_path, "checkpoints/iter_0000004/run.json").read_text())
    assert second["config"] == saved
    resolved = config_from_dict(first["config"])
    assert resolved.train == parse_flags([*argv, "--exit-interval", "2"]).train
