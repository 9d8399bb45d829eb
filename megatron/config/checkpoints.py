"""Flags of saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import option, require, require_choices


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run, and from what it starts."""

    save: str = ""
    """folder for checkpoints, which all nodes must see; empty: none are written"""
    save_interval: int = 0
    """steps between checkpoints; 0: only at the end"""
    async_save: bool = False
    """write checkpoints beside the training, which waits only while the state is copied in memory"""
    keep_last: int = 0
    """checkpoints that are kept; older ones are deleted when a newer one is complete; 0: all"""
    keep_every: int = 0
    """checkpoints of iterations divisible by this are kept whatever --keep-last says; 0: none of them"""
    on_save_error: str = option("stop", choices=("stop", "continue"))
    """whether a checkpoint that cannot be written (a full disk) ends the run; the one at its end is never given up"""
    load: str = ""
    """folder to resume from: its newest complete checkpoint; or one checkpoint in it. The number of ranks,
    --moe-expert-parallel-size and --zero-stage may be others than when it was saved"""
    load_step: int = 0
    """resume from the checkpoint of this iteration; 0: from the newest"""
    load_or_init: bool = False
    """start anew when the folder of --load holds no checkpoint; otherwise that is an error"""
    finetune: bool = False
    """take only the weights from --load: a new optimizer, iteration 0, the data from its start"""
    override_lr_schedule: bool = False
    """with --load: allow a learning rate, schedule, warm-up or length of the run other than the checkpoint's"""

    def check_checkpoints(self) -> None:
        for name in ("save_interval", "keep_last", "keep_every", "load_step"):
            require(
                getattr(self, name) >= 0,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "0 or more",
            )
        require_choices(self)
        for name in ("load_step", "load_or_init", "finetune", "override_lr_schedule"):
            require(
                bool(self.load) or not getattr(self, name),
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "only with --load",
                "Name the folder of the checkpoints.",
            )
        require(
            not self.keep_every or self.keep_last > 0,
            "--keep-every",
            self.keep_every,
            "only with --keep-last",
            "Without it every checkpoint is kept.",
        )
