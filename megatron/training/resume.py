"""Finding a checkpoint that is whole, and restoring a run from it: on any number of ranks, at any ZeRO stage."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.config import cli
from megatron.config.checkpoints import CheckpointConfig
from megatron.config.schema import RunConfig
from megatron.log import get_logger
from megatron.parallel import rng
from megatron.parallel.groups import Groups, from_first, gather
from megatron.training import store
from megatron.training.engine import Engine
from megatron.training.partitions import MOMENTS, Layout, load_weights
from megatron.training.record import (
    Progress,
    Record,
    check_same_run,
    check_same_schedule,
    progress_of,
    warn_of_changes,
)
from megatron.training.shards import Shards


class Source:
    """A checkpoint whose files were found whole. Made by `find`."""

    def __init__(self, path: Path, options: CheckpointConfig):
        self.path, self.options = path, options
        self.state: dict[str, Any] = store.read_json(path / "state.json")
        self.record = Record.from_state(cli.read_run_json(path / "run.json"), self.state)
        self.shards = Shards(path)

    def adopt(self, config: RunConfig, groups: Groups) -> RunConfig:
        """The configuration of the run that goes on: without --global-batch-size, the checkpoint's global batch."""
        train, batch = config.train, self.record.global_batch_size
        if self.options.finetune or train.global_batch_size or train.global_batch(groups.world_size) == batch:
            return config
        get_logger().info("the global batch stays at the checkpoint's %d samples; --global-batch-size changes it",
                          batch)
        return replace(config, train=replace(train, global_batch_size=batch))

    def check(self, record: Record) -> None:
        """Whether the run that `record` describes can go on from here: to be asked before anything is built.

        Raises:
            ValueError: the checkpoint contradicts the model, the experts, the tokenizer, or (unless
                --override-lr-schedule or --finetune is set) the schedule.
        """
        check_same_run(self.record, record, str(self.path))
        if not self.options.finetune:
            if not self.options.override_lr_schedule:
                check_same_schedule(self.record, record, str(self.path))
            warn_of_changes(self.record, record)

    def load_weights(self, model: nn.Module, groups: Groups) -> None:
        """Fill a finished fp32 model, before the engine gets it: the engine then makes its own copies from it."""
        load_weights(model, Layout.of(model, groups), self._weight, self.shards.buffer)

    def _weight(self, name: str, start: int, length: int) -> torch.Tensor:
        return self.shards.read("weight", name, start, length)

    def restore(self, engine: Engine, groups: Groups) -> Progress:
        """Everything but the weights: fp32 copies, moments, counters, random state; returns how far the run was.

        With --finetune nothing of it: the run begins.
        """
        if self.options.finetune:
            get_logger().info("took the weights of %s; the optimizer and the data start anew", self.path)
            return Progress()
        parts, steps = engine.partitions(), self.state["optimizer"]["steps"]
        if steps:
            parts.start_moments(steps)
        for piece in parts.pieces:
            for kind in ("weight", *(MOMENTS if steps else ())):
                parts.get(piece, kind).copy_(self.shards.read(kind, piece.name, piece.start, piece.length))
        parts.set_scaler(self.state["optimizer"]["scaler"])
        engine.set_counters(self.state["optimizer"]["counters"])
        progress = progress_of(self.state)
        if self.record.topology["ranks"] == groups.world_size:
            rng.set_state(self.shards.rng(groups.rank))
        else:
            # Streams that no rank has drawn from yet.
            rng.seed_rank(self.record.config.train.seed + progress.iteration, groups.rank)
        get_logger().info("resumed from %s at iteration %d", self.path, progress.iteration)
        return progress


def find(options: CheckpointConfig, groups: Groups) -> Source | None:
    """The checkpoint that --load and --load-step ask for, verified: the newest whole one, with a warning for each that
    is not. None without --load, or with --load-or-init when there is no checkpoint.

    Every rank verifies its share of the files, and all take the same one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: none is whole, or the one of --load-step is not there or not whole.
    """
    if not options.load:
        return None
    listed = from_first(lambda: store.choose(options), groups)
    for path, manifest in listed:
        names = sorted(manifest["files"])[groups.rank::groups.world_size]
        problems = [p for p in gather(_problem(path, names, manifest), groups) if p]
        if not problems:
            return Source(path, options)
        if options.load_step:
            raise ValueError(f"--load-step is {options.load_step}: {problems[0]}. Use another checkpoint of "
                             f"{options.load}")
        get_logger().warning("%s; falling back to the checkpoint before it", "; ".join(problems))
    if not listed:
        get_logger().info("%s holds no checkpoint: the run starts anew, as --load-or-init says", options.load)
        return None
    raise ValueError(f"--load is {options.load!r}, in which no checkpoint is whole: {problems[0]}. Restore its files "
                     "from a copy, or start a new run without --load")


def _problem(path: Path, names: list[str], manifest: dict[str, Any]) -> str:
    try:
        store.check_files(path, names, manifest)
    except store.Broken as error:
        return f"{error} (seen by {socket.gethostname()})"
    return ""
