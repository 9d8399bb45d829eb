"""Evaluation on tasks of lm-evaluation-harness during training."""

from __future__ import annotations

import time
from typing import Any

from megatron.checkpoint.metadata import TrainingProgress
from megatron.config.evaluation import EvaluationConfig
from megatron.config.fields import require
from megatron.engine.engine import Engine
from megatron.evaluation.lm_harness import HarnessModel, build_harness_model, prefix_token
from megatron.evaluation.lockstep import LockstepRanks
from megatron.evaluation.scoring import TokenScorer
from megatron.evaluation.task_suite import RunOptions, TaskSuite
from megatron.evaluation.text_generation import TextGenerator
from megatron.initialize import Run
from megatron.log import get_logger
from megatron.optional_packages import require_package
from megatron.parallel import rng
from megatron.training.metric_rows import MetricsRow
from megatron.training.metric_writers import MetricsWriters

_FLAG = "--eval-tasks"
_BOOTSTRAP_ITERS = 100
"""resamples for standard errors: fewer than in tools/evaluate.py, while all ranks wait"""


def load_tasks(run: Run) -> TaskSuite | None:
    """Load the tasks of a training run and their data sets on rank 0. A collective.

    Returns:
        The tasks on rank 0; None on other ranks.

    Raises:
        ValueError: the harness is not installed, a task is unknown, its data set cannot be
            loaded, or the vocabulary has no token to begin a text with.
    """
    config = run.config.evaluation
    flag = f"{_FLAG} {','.join(config.task_names)}"
    require(bool(config.task_names), _FLAG, list(config.eval_tasks), "names of tasks")
    require_package("lm_eval", "eval", flag)
    prefix_token(run.tokenizer)

    def load() -> TaskSuite:
        return TaskSuite(
            config.task_names, _FLAG, config.eval_tasks_path, config.eval_tasks_num_fewshot
        )

    return LockstepRanks(run.groups, {}).run(load)


class TaskEvaluation:
    """Evaluates the model of an engine on tasks, and writes a metrics row per task.

    A task that fails does not end the training: the error is logged and counted. An error of
    the model does, because it would be one of the training, too.

    Args:
        config: the interval and the options of the tasks.
        suite: the tasks, on rank 0; see `load_tasks`.
        engine: runs the model.
        run: its groups and tokenizer.
        metric_writers: receive the rows.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        suite: TaskSuite | None,
        engine: Engine,
        run: Run,
        metric_writers: MetricsWriters,
    ):
        self.interval = config.eval_tasks_interval
        self.config = config
        self.suite = suite
        self.engine = engine
        self.run = run
        self.metric_writers = metric_writers
        self.start_time = time.monotonic()

    def evaluate(self, progress: TrainingProgress, fraction_done: float) -> None:
        """Evaluate on all tasks. A collective: all ranks must call it.

        Random streams and the state of the gates are as before.

        Args:
            progress: how far the run is.
            fraction_done: share of the training that is done, for gates that change over time.
        """
        start = time.monotonic()
        with rng.preserved(), self.engine.evaluating() as model:
            harness = self._harness_model(model, fraction_done)
            rows = harness.ranks.run(lambda: self._rows(harness))
        if rows is None:
            return
        now = time.monotonic()
        rows[-1]["seconds"] = now - start
        position = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "elapsed_s": now - self.start_time,
        }
        for row in rows:
            self.metric_writers.write({**row, **position})

    def _harness_model(self, model: Any, fraction_done: float) -> HarnessModel:
        tokenizer = self.run.tokenizer
        groups = self.run.groups
        config = self.run.config
        batch_size = self.config.eval_tasks_batch_size or config.train.micro_batch_size
        max_positions = config.model.max_positions
        scorer = TokenScorer(
            model, groups, tokenizer.vocab_size, max_positions, batch_size, fraction_done
        )
        generator = TextGenerator(
            self.engine.model,
            groups,
            tokenizer,
            batch_size,
            fraction_done,
            is_sharded=config.deepspeed.zero_stage == 3,
        )
        return build_harness_model(scorer, generator, tokenizer, _FLAG)

    def _rows(self, harness: HarnessModel) -> list[MetricsRow]:
        """Return a row for each task or group, and one about the evaluation, on rank 0."""
        options = RunOptions(self.config.eval_tasks_limit or None, _BOOTSTRAP_ITERS)
        rows = []
        failures = 0
        for name in self.config.task_names:
            try:
                results = self.suite.run(harness, [name], options)["results"]
            except Exception as error:  # tasks are code of others
                if harness.ranks.function_error is not None:
                    raise
                failures += 1
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                get_logger().error(
                    "%s %s failed (%s); the training continues", _FLAG, name, reason
                )
                continue
            for task in self.suite.tasks_of(name):
                rows.append({"kind": f"eval/{task}", **metrics_of(results[task])})
        return [*rows, {"kind": "eval_tasks", "failures": failures}]


def metrics_of(results: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a task by names without commas: `acc,none` is `acc`.

    Filters other than none, such as strict-match, follow the name of the metric.
    """
    figures = {}
    for key, value in results.items():
        metric, comma, name = key.partition(",")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if comma and is_number:
            figures[metric if name == "none" else f"{metric}_{name}"] = value
    return figures
