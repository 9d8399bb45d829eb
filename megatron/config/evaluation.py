"""Config section `evaluation`: tasks of lm-evaluation-harness during training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.config.fields import option, require_not_negative, require_setting
from megatron.config.needs import TRAINING, setting


@dataclass(frozen=True)
class EvaluationConfig:
    """Continuous evaluation on tasks, in addition to the validation set."""

    eval_tasks: tuple[str, ...] = option((), needs=TRAINING)
    """tasks of lm-evaluation-harness, such as lambada_openai,hellaswag, that the model is
    evaluated on during the training; needs the eval extra; none: off"""
    eval_tasks_interval: int = option(1000, needs=setting("eval_tasks"))
    """optimizer steps between evaluations on tasks; 0: only at the start and the end of the
    run"""
    eval_tasks_limit: float = option(0.0, needs=setting("eval_tasks"))
    """examples of each task: a number, or a fraction below 1; 0: all"""
    eval_tasks_num_fewshot: int | None = option(None, needs=setting("eval_tasks"))
    """solved examples before each question; not set: each task's own number"""
    eval_tasks_path: tuple[str, ...] = option((), needs=setting("eval_tasks"))
    """folders with further task files"""
    eval_tasks_batch_size: int = option(0, needs=setting("eval_tasks"))
    """rows per forward pass of a rank; 0: the micro-batch size"""

    def __post_init__(self):
        require_not_negative(self, "eval_tasks_interval", "eval_tasks_batch_size")
        limit = self.eval_tasks_limit
        require_setting(
            self,
            "eval_tasks_limit",
            0 <= limit < 1 or (math.isfinite(limit) and limit > 0 and limit == int(limit)),
            "a positive integer, a fraction between 0 and 1, or 0 for all",
        )
        if self.eval_tasks_num_fewshot is not None:
            require_not_negative(self, "eval_tasks_num_fewshot")

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, which may be separated by commas or blanks."""
        words = (name for word in self.eval_tasks for name in word.split(","))
        return list(dict.fromkeys(name for name in words if name))
