"""Training continues an upcycled checkpoint, from the dense model's loss; the tool as a program."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

from helpers import dense_models, programs, runs
from megatron.config.run_json import read_run_json

TOOL = "tools/upcycle.py"


def tool() -> ModuleType:
    """Import tools/upcycle.py."""
    spec = importlib.util.spec_from_file_location("upcycle_tool", programs.REPO / TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(argv: list[str]) -> None:
    """Run the tool in this process."""
    tool().run(argv)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    config = dense_models.dense_config()
    folder = tmp_path_factory.mktemp("dense") / "checkpoints"
    return dense_models.save(dense_models.build(config), config, folder)


def flags(directory: Path, data: str, out: Path, iters: int, *more: str) -> list[str]:
    """Return flags that continue a checkpoint of weights: its run.json names the model."""
    return [
        "--config",
        str(directory / "iter_0000000" / "run.json"),
        "--load",
        str(directory),
        "--data-path",
        data,
        "--split",
        "80,15,5",
        "--micro-batch-size",
        "2",
        "--train-iters",
        str(iters),
        "--lr",
        "1e-3",
        "--eval-interval",
        "2",
        "--eval-iters",
        "2",
        "--log-interval",
        "1",
        "--metrics-file",
        str(out / "metrics.jsonl"),
        *more,
    ]


def first_evaluation(out: Path) -> float:
    return runs.metrics(out, "eval")[0]["loss"]


def test_training_starts_at_the_dense_loss(dense, data, tmp_path, ranks2):
    """On two ranks with sharded experts; it saves, resumes, and the loss falls."""
    run_tool([str(dense), str(tmp_path / "moe"), "--num-experts", "4", "--topk", "2"])
    ranks2.run(runs.train, flags(dense, data, tmp_path / "a", 1), timeout=300)
    save = ("--save", str(tmp_path / "save"), "--save-interval", "3", *runs.EP2)
    argv = flags(tmp_path / "moe", data, tmp_path / "b", 6, *save)
    ranks2.run(runs.train, [*argv, "--exit-interval", "3"], timeout=300)
    resumed = [*argv, "--load", str(tmp_path / "save")]
    ranks2.run(runs.train, resumed, timeout=300)
    assert math.isclose(
        first_evaluation(tmp_path / "a"), first_evaluation(tmp_path / "b"), rel_tol=1e-5
    )
    losses = [row["loss"] for row in runs.metrics(tmp_path / "b")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_tool_reports_sizes_and_start(dense, tmp_path, capsys):
    run_tool([str(dense), str(tmp_path / "moe"), "--num-experts", "4", "--strategy", "random"])
    printed = capsys.readouterr().out
    assert "routed experts" in printed
    assert re.search(
        r"iter_0000000: 34,272 parameters, 29,664 active per token; the dense", printed
    )
    assert "the dense model has 34,016" in printed
    assert "the MoE layers approximate the dense ones: a slice" in printed
    config = read_run_json(tmp_path / "moe" / "iter_0000000" / "run.json")
    assert config.moe.num_experts == 4


def test_wrong_arguments_end_with_code_2(capsys):
    assert tool().main(["--num-experts", "4"]) == 2
    assert "the first two arguments is '--num-experts 4'; allowed" in capsys.readouterr().err


def test_help_lists_the_flags(capsys):
    assert tool().main(["--help"]) == 0
    printed = capsys.readouterr().out
    for flag in ("--strategy", "--granularity", "--shared-neurons", "--num-experts"):
        assert flag in printed
