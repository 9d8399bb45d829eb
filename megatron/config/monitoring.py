"""Config sections `logging` and `profiling`: where metrics and profiles are written."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import option, require_not_negative, require_setting
from megatron.config.needs import TRAINING, setting


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
    routing_metrics: bool = True
    """log what the gates do beyond loads, drops and experts per token: evenness of the loads,
    gate mass, margins, entropies, router inputs, the gates' state, and gradient norms of the
    parts of the model"""
    routing_probe_samples: int = option(16, needs=(TRAINING, setting("num_experts")))
    """samples of the validation set, over all ranks and rounded up to micro-batches, on which the
    changes of the routing are measured between steps; 0: not measured"""
    routing_probe_interval: int = option(
        0, needs=(setting("num_experts"), setting("routing_probe_samples"))
    )
    """optimizer steps between these measurements; 0: as --eval-interval"""

    def __post_init__(self):
        require_not_negative(self, "routing_probe_samples", "routing_probe_interval")


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
