"""Config section `checkpoint`: saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    option,
    require,
    require_choices,
    require_not_negative,
    require_setting,
)


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints a run writes and retains, and what it starts from."""

    save: str = ""
    """directory for checkpoints, visible to all nodes; empty: no checkpoints are written"""
    save_interval: int = 0
    """optimizer steps between checkpoints; 0: only at the end of the run"""
    async_save: bool = False
    """write checkpoints in the background; training pauses only while the state is copied
    to host memory"""
    keep_last: int = 0
    """number of most recent checkpoints to retain; older ones are deleted once a newer one
    is complete; 0: retain all"""
    keep_every: int = 0
    """with --keep-last: always retain checkpoints of iterations divisible by this number;
    0: no such exception"""
    on_save_error: str = option("stop", choices=("stop", "continue"))
    """whether the run stops or continues when a checkpoint or a row of metrics cannot be
    written (for example, the disk is full); the checkpoint at the end of the run is always
    required"""
    load: str = ""
    """directory of checkpoints to resume from its newest complete one, or from that which its
    edited file `latest` names; or the path of one checkpoint; the number of ranks,
    --moe-expert-parallel-size and --zero-stage may differ from those of the saved run"""
    load_step: int = 0
    """iteration of the checkpoint to resume from, whatever the file `latest` names; 0: the
    newest"""
    load_or_init: bool = False
    """start from scratch when the directory given to --load holds no checkpoint; without
    this flag that is an error"""
    finetune: bool = False
    """load only the weights: the optimizer, the iteration and the data order start from
    scratch"""
    load_optim: bool = True
    """with --load: load the state of the optimizer; with --no-load-optim it starts from
    scratch, while weights, iteration and data order are the checkpoint's"""
    load_rng: bool = True
    """with --load: load the random states; with --no-load-rng they are seeded by --seed"""
    override_lr_schedule: bool = False
    """with --load: allow a learning rate, schedule, warm-up or run length that differs from
    the checkpoint's"""

    def __post_init__(self):
        require_not_negative(self, "save_interval", "keep_last", "keep_every", "load_step")
        require_choices(self)
        for name in ("load_step", "load_or_init", "finetune", "override_lr_schedule"):
            require_setting(
                self,
                name,
                bool(self.load) or not getattr(self, name),
                "only with --load",
                "Name the folder of the checkpoints.",
            )
        for name in ("load_optim", "load_rng"):
            flag = "--no-" + name.replace("_", "-")
            allowed = "only with --load"
            advice = "Name the folder of the checkpoints."
            require(bool(self.load) or getattr(self, name), flag, True, allowed, advice)
        require_setting(
            self,
            "keep_every",
            not self.keep_every or self.keep_last > 0,
            "only with --keep-last",
            "Without it every checkpoint is kept.",
        )
