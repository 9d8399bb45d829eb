"""Evaluation of a model on the validation and test sets of a task."""

from __future__ import annotations

import math
import time

from megatron.checkpoint.metadata import TrainingProgress
from megatron.engine.engine import Engine
from megatron.training.metric_writers import MetricsWriters
from megatron.training.task import LM_LOSS, Task
from megatron.training.watchdog import Watchdog

_LARGEST_EXPONENT = 700.0
"""exp of more overflows an fp64 number: the perplexity of a diverged model stays finite."""


class Evaluator:
    """Logs the mean losses on the splits of a task, always on the same samples.

    Args:
        engine: runs the model.
        task: gives micro-batches and loss terms.
        watchdog: ends this rank when a batch does not come.
        metric_writers: receive one row per split.
    """

    def __init__(
        self, engine: Engine, task: Task, watchdog: Watchdog, metric_writers: MetricsWriters
    ):
        self.engine = engine
        self.task = task
        self.watchdog = watchdog
        self.metric_writers = metric_writers
        self.start_time = time.monotonic()

    def evaluate(self, name: str, progress: TrainingProgress, fraction_done: float) -> None:
        """Evaluate "valid", with all named validation sets, or "test".

        Does nothing if the task has no such split.

        Args:
            progress: how far the run is.
            fraction_done: share of the training that is done, for gates that change over time.
        """
        for split in self.task.eval_splits():
            if split == name or split.startswith(f"{name}/"):
                self._evaluate_split(split, progress, fraction_done)

    def _evaluate_split(
        self, split: str, progress: TrainingProgress, fraction_done: float
    ) -> None:
        batches = self.watchdog.reading(
            self.task.eval_batches(split), f"a batch of split {split!r}"
        )
        loss = self.engine.evaluate(batches, self.task, fraction_done)[LM_LOSS]
        row = {
            "kind": metrics_kind(split),
            "iteration": progress.iteration,
            "loss": loss,
            "perplexity": math.exp(min(loss, _LARGEST_EXPONENT)),
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "elapsed_s": time.monotonic() - self.start_time,
        }
        row |= self.engine.metrics.read(training=False)
        self.metric_writers.write(row)


def metrics_kind(split: str) -> str:
    """Return the `kind` of a split's metrics: `eval`, `eval/NAME` or `test`."""
    if split == "valid" or split.startswith("valid/"):
        return "eval" + split.removeprefix("valid")
    return split
