"""The harness's language model: local tasks against a direct computation, batches, windows."""

from __future__ import annotations

import pytest

from helpers import harness_tasks as tasks
from megatron.evaluation.lm_harness import model_for_harness
from megatron.evaluation.task_suite import RunOptions, TaskSuite
from megatron.parallel.groups import Groups

OPTIONS = RunOptions(bootstrap_iters=0)


def harness_model(batch_size: int = 3):
    model = tasks.tiny_model()
    tokenizer = tasks.byte_tokenizer()
    return model_for_harness(model, Groups(), tokenizer, batch_size, "--tasks")


def results_of(suite: TaskSuite, harness, names: list[str]) -> dict[str, dict[str, float]]:
    """Return the metrics of each task, without the names of filters."""
    found = suite.run(harness, names, OPTIONS)["results"]
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in found[task].items()
            if metric.endswith(",none") and "_stderr" not in metric
        }
        for task in names
    }


def test_local_tasks_equal_direct_computation(tmp_path):
    """All kinds of requests, contexts and continuations longer than the model has positions."""
    folder = tasks.write_tasks(tmp_path / "tasks")
    names = ["local_choice", "local_last_word", "local_pages"]
    suite = TaskSuite(names, "--tasks", [folder])
    found = results_of(suite, harness_model(), names)
    expected = tasks.expected_results(tasks.tiny_model())
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    again = results_of(suite, harness_model(1), names)  # a suite can be run more than once
    for name in names:
        assert again[name] == pytest.approx(found[name], rel=1e-5), name
    # The questions tell models apart.
    assert 0 < found["local_choice"]["acc"] < 1
