"""Config sections `logging` and `profiling`: where metrics and profiles are written."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    option,
    require_not_negative,
    require_setting,
)
from megatron.config.needs import TRAINING, setting

_NOT_IN_WANDB_ID = ":;,#?/'"


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics are written, in addition to the console."""

    tensorboard_dir: str = ""
    """directory for TensorBoard event files; needs the tensorboard extra; empty: none are
    written"""
    metrics_file: str = ""
    """JSON-lines file that metrics are appended to; empty: metrics.jsonl in the directory
    of --save, if that is set"""
    wandb_project: str = ""
    """Weights & Biases project to log to; needs the wandb extra; empty: off"""
    wandb_exp_name: str = option("", needs=setting("wandb_project"))
    """name of this run in Weights & Biases"""
    wandb_entity: str = option("", needs=setting("wandb_project"))
    """user or team of Weights & Biases that has the project; empty: that of the variable
    WANDB_ENTITY, or the default of the account"""
    wandb_id: str = option("", needs=setting("wandb_project"))
    """id of this run in Weights & Biases, which is continued if it exists; empty: a new one,
    which a run that resumes from its own --save directory continues"""
    wandb_mode: str = option("", needs=setting("wandb_project"))
    """online; offline: write files that `wandb sync` uploads later; or disabled; empty: that of
    the variable WANDB_MODE, or online"""
    wandb_save_dir: str = option("", needs=setting("wandb_project"))
    """directory in which Weights & Biases makes its folder wandb; empty: that of the variable
    WANDB_DIR, or --save, or else the working directory"""
    wandb_log_checkpoints: bool = option(
        False, needs=(TRAINING, setting("wandb_project"), setting("save"))
    )
    """upload each checkpoint to Weights & Biases as an artifact once it is complete"""

    def __post_init__(self):
        modes = ("", "online", "offline", "disabled")
        allowed = "online, offline or disabled"
        require_setting(self, "wandb_mode", self.wandb_mode in modes, allowed)
        require_setting(
            self,
            "wandb_id",
            self.wandb_id.strip() == self.wandb_id
            and not set(self.wandb_id) & set(_NOT_IN_WANDB_ID),
            f"an id without any of {' '.join(_NOT_IN_WANDB_ID)} and without blanks around it",
        )


@dataclass(frozen=True)
class ProfilingConfig:
    """Which iterations and ranks are profiled, and where the results are written."""

    profile: bool = option(False, needs=TRAINING)
    """profile a range of iterations: writes a Chrome trace, and a table that breaks down
    the time of a step"""
    profile_step_start: int = option(10, needs=setting("profile"))
    """number of completed iterations at which profiling starts"""
    profile_step_end: int = option(12, needs=setting("profile"))
    """number of completed iterations at which profiling ends"""
    profile_ranks: tuple[int, ...] = option((0,), needs=setting("profile"))
    """ranks to profile"""
    profile_dir: str = option("", needs=setting("profile"))
    """directory for traces and tables; empty: the subdirectory profile of --save, or else
    of --tensorboard-dir, or else of the working directory"""

    def __post_init__(self):
        require_not_negative(self, "profile_step_start")
        require_setting(
            self,
            "profile_step_end",
            self.profile_step_end > self.profile_step_start,
            f"more than --profile-step-start, which is {self.profile_step_start}",
        )
        require_setting(
            self,
            "profile_ranks",
            len(self.profile_ranks) > 0 and min(self.profile_ranks) >= 0,
            "one rank or more, each 0 or more",
        )
