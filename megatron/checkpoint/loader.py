"""Finding a checkpoint that is whole, and restoring a run from it: on any number of ranks, at any ZeRO stage."""

from __future__ import annotations

import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.checkpoint import directory
from megatron.checkpoint.compatibility import (
    check_same_run,
    check_same_schedule,
    warn_of_changes,
)
from megatron.checkpoint.metadata import RunMetadata, TrainingProgress, progress_of
from megatron.checkpoint.reader import CheckpointReader
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.run_json import read_run_json
from megatron.config.schema import RunConfig, require
from megatron.engine.engine import Engine
from megatron.engine.optimizer import MOMENTS
from megatron.engine.zero_shards import GlobalLayout, load_weights
from megatron.log import get_logger
from megatron.parallel import rng
from megatron.parallel.background import BackgroundTask
from megatron.parallel.groups import Groups, all_gather_objects, broadcast_from_rank0


class LoadedCheckpoint:
    """A checkpoint whose files were found whole. Made by `find`.

    Args:
        damaged: those that were found not to be, before it.

    Raises:
        Broken: its files are whole and do not say what those of a checkpoint say.
    """

    def __init__(self, path: Path, options: CheckpointConfig, damaged: list[Path]):
        self.path, self.options, self.damaged = path, options, damaged
        try:
            state = directory.read_json(path / "state.json")
            self.record = RunMetadata.from_state(read_run_json(path / "run.json"), state)
            self.progress = TrainingProgress() if options.finetune else progress_of(state)
            optimizer = state["optimizer"]
            self.steps, self.scaler, self.counters = (
                optimizer[n] for n in ("steps", "scaler", "counters")
            )
            self.shards = CheckpointReader(path)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise directory.CorruptCheckpointError(
                f"{path} is not a checkpoint that this version can read: {error!r}"
            ) from None

    @property
    def goes_on(self) -> Path | None:
        """The checkpoint that the run is a continuation of; --finetune begins another one."""
        return None if self.options.finetune else self.path

    def adopt(self, config: RunConfig, groups: Groups) -> RunConfig:
        """The configuration of the run that goes on: without --global-batch-size, the checkpoint's global batch.

        Raises:
            ValueError: it is not a multiple of micro-batch x ranks.
        """
        train, batch = config.train, self.record.global_batch_size
        step = train.micro_batch_size * groups.world_size
        if self.options.finetune or train.global_batch_size or step == batch:
            return config
        require(
            batch % step == 0,
            "the global batch of the checkpoint",
            batch,
            f"a multiple of --micro-batch-size {train.micro_batch_size} x {groups.world_size} ranks",
            "Start another number of ranks, or set --global-batch-size.",
        )
        get_logger().info(
            "the global batch stays at the checkpoint's %d samples; --global-batch-size changes it",
            batch,
        )
        return replace(config, train=replace(train, global_batch_size=batch))

    def check(self, record: RunMetadata) -> None:
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
        """Fill a finished fp32 model, before the engine gets it: the engine then makes its own copies from it.

        Raises:
            Broken: the checkpoint's tensors have other names or shapes than the model's.
        """
        layout = GlobalLayout.of(model, groups)
        if self.shards.shapes != layout.shapes or set(self.shards.buffers) != set(
            layout.buffers
        ):
            differ = {*layout.shapes.items(), *layout.buffers} ^ {
                *self.shards.shapes.items(),
                *self.shards.buffers,
            }
            raise directory.CorruptCheckpointError(
                f"{self.path / 'index.json'} does not fit the model: {sorted(map(str, differ))[0]}"
            )
        load_weights(model, layout, self._weight, self.shards.buffer)

    def _weight(self, name: str, start: int, length: int) -> torch.Tensor:
        return self.shards.read("weight", name, start, length)

    def restore(self, engine: Engine, groups: Groups) -> TrainingProgress:
        """Everything but the model's own weights: fp32 copies, moments, counters, random state; returns how far the run
        is. With --finetune the fp32 copies alone: the run begins.
        """
        parts = engine.partitions()
        moments = MOMENTS if self.steps and not self.options.finetune else ()
        if moments:
            parts.start_moments(self.steps)
        for piece in parts.pieces:
            for kind in ("weight", *moments):
                parts.get(piece, kind).copy_(
                    self.shards.read(kind, piece.name, piece.start, piece.length)
                )
        if self.options.finetune:
            get_logger().info(
                "took the weights of %s; the optimizer and the data start anew", self.path
            )
            return self.progress
        parts.set_scaler(self.scaler)
        engine.set_counters(self.counters)
        if self.record.topology["ranks"] == groups.world_size:
            rng.set_state(self.shards.rng(groups.rank))
        else:
            # Streams that no rank has drawn from yet.
            rng.seed_rank(self.record.config.train.seed + self.progress.iteration, groups.rank)
        get_logger().info("resumed from %s at iteration %d", self.path, self.progress.iteration)
        return self.progress


def load_for_run(
    config: RunConfig, groups: Groups
) -> tuple[LoadedCheckpoint | None, RunConfig, TrainingProgress]:
    """(the checkpoint that a run begins with, if any; the configuration that the run then has; how far it is).

    Raises as `find` and `Source.adopt` do.
    """
    source = find_checkpoint(config.checkpoint, groups)
    return (
        (source, source.adopt(config, groups), source.progress)
        if source
        else (None, config, TrainingProgress())
    )


def find_checkpoint(options: CheckpointConfig, groups: Groups) -> LoadedCheckpoint | None:
    """The checkpoint that --load and --load-step ask for, verified: the newest whole one, with a warning for each that
    is not. None without --load, or with --load-or-init when there is no checkpoint.

    Every rank verifies its share of the files, and all take the same one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: none is whole, or the one of --load-step is not there or not whole.
    """
    if not options.load:
        return None
    listed = broadcast_from_rank0(lambda: directory.select_checkpoints(options), groups)
    damaged: list[Path] = []
    for path, manifest in listed:
        names = sorted(manifest["files"])[groups.rank :: groups.world_size]
        job = BackgroundTask(f"verifying {path}", partial(_problem, path, names, manifest))
        job.start()
        job.wait_for_all(groups)
        problems = [p for p in all_gather_objects(job.error or job.result, groups) if p]
        if not problems:
            return LoadedCheckpoint(path, options, damaged)
        damaged.append(path)
        if options.load_step:
            raise ValueError(
                f"--load-step is {options.load_step}: {problems[0]}. Use another checkpoint of "
                f"{options.load}"
            )
        get_logger().warning(
            "%s; falling back to the checkpoint before it", "; ".join(problems)
        )
    if not listed:
        get_logger().info(
            "%s holds no checkpoint: the run starts anew, as --load-or-init says", options.load
        )
        return None
    raise ValueError(
        f"--load is {options.load!r}, in which no checkpoint is whole: {problems[0]}. Restore its files "
        "from a copy, or start a new run without --load"
    )


def _problem(path: Path, names: list[str], manifest: dict[str, Any]) -> str:
    try:
        directory.check_files(path, names, manifest)
    except directory.CorruptCheckpointError as error:
        return f"{error} (seen by {socket.gethostname()})"
    return ""
