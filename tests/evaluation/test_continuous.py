"""--eval-tasks: tasks of the harness during training, which they do not change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import harness_tasks as tasks
from helpers import runs
from helpers.tools_in_ranks import run_tool
from megatron.evaluation.continuous import metrics_of

NAMES = ["local_choice", "local_answers", "local_pages"]
FIGURES = ("loss", "aux_loss", "grad_norm", "experts_per_token", "load_imbalance_max_over_mean")


def training_flags(data: str, out: Path, *more: str) -> list[str]:
    """Flags of 4 steps in fp32 with dropout and a gate with state, on ranks that share experts."""
    flags = runs.flags(data, out, 4, *runs.EP2, *more)
    flags = runs.with_gate(flags, "--gate", "deepseek_v3", "--topk", "2")
    return [flag for flag in flags if flag != "--bf16"]


def task_flags(folder: str, *more: str) -> list[str]:
    return ["--eval-tasks", ",".join(NAMES), "--eval-tasks-path", folder, *more]


@pytest.mark.parametrize("stage", [pytest.param("1", marks=pytest.mark.slow), "3"])
def test_training_is_not_changed(data, ranks2, tmp_path, stage):
    """Losses, routing and later random numbers are those of a run without tasks."""
    folder = tasks.write_tasks(tmp_path / "tasks")
    zero = ("--zero-stage", stage)
    ranks2.run(runs.train, training_flags(data, tmp_path / "without", *zero))
    more = task_flags(folder, "--eval-tasks-interval", "2", "--eval-tasks-batch-size", "3")
    with_tasks = tmp_path / "with"
    ranks2.run(runs.train, training_flags(data, with_tasks, *zero, *more))
    for kind in ("train", "eval", "test"):
        found = runs.metrics(with_tasks, kind)
        expected = runs.metrics(tmp_path / "without", kind)
        assert len(found) == len(expected) > 0
        for row, other in zip(found, expected, strict=True):
            assert {key: row[key] for key in FIGURES if key in row} == {
                key: other[key] for key in FIGURES if key in other
            }
    for name in NAMES:
        rows = runs.metrics(with_tasks, f"eval/{name}")
        assert [row["iteration"] for row in rows] == [0, 2, 4]
    assert rows[2]["bits_per_byte"] < rows[0]["bits_per_byte"], "the model learns bytes"
    ends = runs.metrics(with_tasks, "eval_tasks")
    assert [row["failures"] for row in ends] == [0, 0, 0] and ends[0]["seconds"] > 0
    output = tmp_path / "out.json"
    argv = ["--load", str(with_tasks / "checkpoints"), "--tasks", ",".join(NAMES)]
    ranks2.run(run_tool, "evaluate", [*argv, "--include-path", folder, "--output", str(output)])
    final = json.loads(output.read_text())["results"]["local_pages"]
    assert final["bits_per_byte,none"] == pytest.approx(rows[2]["bits_per_byte"], rel=1e-5)


def failing_train(argv: list[str], what: str) -> list[str]:
    """Train in a rank with a fault in the task or in the model; return the log lines."""
    from unittest import mock

    from lm_eval.api.task import ConfigurableTask

    from megatron.evaluation.scoring import TokenScorer

    place = {"task": (ConfigurableTask, "process_results"), "model": (TokenScorer, "score")}
    fault = RuntimeError(f"a fault of the {what}\nmore")
    with mock.patch.object(*place[what], side_effect=fault):
        return runs.logged_train(argv)


def test_failed_task_is_counted(data, ranks1, tmp_path):
    """The training and the other tasks go their way; an error of the model ends the run."""
    folder = tasks.write_tasks(tmp_path / "tasks")
    argv = [*runs.flags(data, tmp_path, 1), *task_flags(folder), "--eval-iters", "0"]
    argv += ["--split", "100,0,0", "--eval-tasks-limit", "2", "--eval-tasks-num-fewshot", "1"]
    (lines,) = ranks1.run(failing_train, argv, "task")
    assert (
        lines.count(
            "--eval-tasks local_pages failed (RuntimeError: a fault of the task); the training "
            "continues"
        )
        == 2
    )
    ends = runs.metrics(tmp_path, "eval_tasks")
    assert [(row["iteration"], row["failures"]) for row in ends] == [(0, 3), (1, 3)]
    assert len(runs.metrics(tmp_path)) == 1
    with pytest.raises(RuntimeError, match="RuntimeError: a fault of the model"):
        ranks1.run(failing_train, [*argv, "--save", str(tmp_path / "other")], "model")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--eval-tasks", "missing.yaml"], "--eval-tasks is 'missing.yaml'; allowed: the path"),
        (["--eval-tasks", ","], "--eval-tasks is ..,..; allowed: names of tasks"),
    ],
)
def test_bad_tasks_are_refused_before_training(data, ranks2, tmp_path, flags, message):
    """On all ranks, and nothing is written."""
    folder = tasks.write_tasks(tmp_path / "tasks")
    argv = [*runs.flags(data, tmp_path / "out", 1, *runs.EP2), "--eval-tasks-path", folder]
    with pytest.raises(RuntimeError, match=message):
        ranks2.run(runs.train, [*argv, *flags])
    assert not (tmp_path / "out").exists()


def test_names_of_metrics_have_no_commas():
    results = {"alias": "x", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": "N/A"}
    results |= {"exact_match,strict-match": 1, "name": "x"}
    assert metrics_of(results) == {"acc": 0.5, "exact_match_strict-match": 1}
