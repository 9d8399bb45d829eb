"""Config section `checkpoint`: saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    option,
    require_choices,
    require_not_negative,
    require_setting,
)
from megatron.config.needs import TRAINING, setting

LOAD_OPTIONS = (
    "load_step",
    "load_or_init",
    "finetune",
    "load_optim",
    "load_rng",
    "override_lr_schedule",
)
"""Fields that say how the checkpoint of --load is loaded; with another --load they do not apply"""


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints a run writes and retains, and what it starts from."""

    save: str = ""
    """directory for checkpoints, visible to all nodes; empty: no checkpoints are written"""
    save_interval: int = option(0, needs=(TRAINING, setting("save")))
    """optimizer steps between checkpoints; 0: only at the end of the run"""
    async_save: bool = option(False, needs=(TRAINING, setting("save")))
    """write checkpoints in the background; training pauses only while the state is copied
    to host memory"""
    keep_last: int = option(0, needs=(TRAINING, setting("save")))
    """number of most recent checkpoints to retain; older ones are deleted once a newer one
    is complete; 0: retain all"""
    keep_every: int = option(0, needs=(TRAINING, setting("save"), setting("keep_last")))
    """always retain checkpoints of iterations divisible by this number;
    0: no such exception"""
    on_save_error: str = option(
        "stop",
        choices=("stop", "continue"),
        needs=setting("save")
        | setting("metrics_file")
        | setting("tensorboard_dir")
        | setting("wandb_project"),
    )
    """whether the run stops or continues when a checkpoint or a row of metrics cannot be
    written (for example, the disk is full); the checkpoint at the end of the run is always
    required"""
    init_from_hf: str = ""
    """directory of a Hugging Face model whose weights the run starts from; its config.json
    sets the model, the experts, the gate and the tokenizer, and flags take precedence over it.
    With --load-or-init it is used when there is no checkpoint yet"""
    load: str = ""
    """directory of checkpoints to resume from its newest complete one, or from that which its
    edited file `latest` names; or the path of one checkpoint; the number of ranks,
    --moe-expert-parallel-size and --zero-stage may differ from those of the saved run"""
    load_step: int = option(0, needs=setting("load"))
    """iteration of the checkpoint to resume from, whatever the file `latest` names; 0: the
    newest"""
    load_or_init: bool = option(False, needs=setting("load"))
    """start from scratch when the directory given to --load holds no checkpoint; without
    this flag that is an error"""
    finetune: bool = option(False, needs=(TRAINING, setting("load")))
    """load only the weights: the optimizer, the iteration and the data order start from
    scratch"""
    load_optim: bool = option(
        True, needs=(TRAINING, setting("load"), setting("finetune", False))
    )
    """load the state of the optimizer; with --no-load-optim it starts from scratch, while
    weights, iteration and data order are the checkpoint's"""
    load_rng: bool = option(True, needs=(TRAINING, setting("load"), setting("finetune", False)))
    """load the random states; with --no-load-rng they are seeded by --seed"""
    override_lr_schedule: bool = option(
        False, needs=(TRAINING, setting("load"), setting("finetune", False))
    )
    """allow a learning rate, schedule, warm-up or run length that differs from
    the checkpoint's"""

    def __post_init__(self):
        require_not_negative(self, "save_interval", "keep_last", "keep_every", "load_step")
        require_choices(self)
        require_setting(
            self,
            "init_from_hf",
            not (self.init_from_hf and self.load) or self.load_or_init,
            "without --load, or with --load and --load-or-init",
            "A checkpoint has weights of its own.",
        )
