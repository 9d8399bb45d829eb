"""Find a valid checkpoint and restore a run from it, on any number of ranks, at any ZeRO stage."""

from __future__ import annotations

import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from megatron.checkpoint.compatibility import (
    check_same_run,
    check_same_schedule,
    warn_of_changes,
)
from megatron.checkpoint.content import (
    read_config,
    read_state,
    with_typed_expert_options,
    with_typed_gate_options,
)
from megatron.checkpoint.directory import (
    CheckpointEntry,
    CheckpointSelection,
    find_newest_valid,
    is_hf_folder,
    select_checkpoints,
)
from megatron.checkpoint.gate_code import require_known_gates, warn_of_changed_gates
from megatron.checkpoint.manifest import CorruptCheckpointError, check_files
from megatron.checkpoint.metadata import RunMetadata, TrainingProgress
from megatron.checkpoint.origin_files import with_found_files
from megatron.checkpoint.shards import CheckpointReader, rank_file_name
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.fields import require, shortened
from megatron.config.schema import RunConfig, TrainConfig
from megatron.engine.engine import Engine
from megatron.engine.zero_shards import GlobalLayout, fill_weights
from megatron.log import get_logger, warn_on_rank0
from megatron.parallel import rng
from megatron.parallel.background import BackgroundTask
from megatron.parallel.groups import Groups, broadcast_from_rank0

_LARGEST_POSITION_TABLE = 1 << 30
"""Elements of the largest table of rotations that is built for a checkpoint's configuration"""


class LoadedCheckpoint:
    """A valid checkpoint that the run starts from. Made by `find_checkpoint`.

    Args:
        path: Directory of the checkpoint, whose files were verified.
        options: How it is loaded.
        corrupt: Newer checkpoints whose files turned out to be damaged.

    Raises:
        CorruptCheckpointError: A file has not the content that this version expects.
        ValueError: The configuration in run.json is refused.
    """

    def __init__(self, path: Path, options: CheckpointConfig, corrupt: list[Path]):
        self.path = path
        self.options = options
        self.corrupt = corrupt
        state = read_state(path)
        require_known_gates(state.get("gates", {}), str(path))
        config = with_typed_gate_options(read_config(path), path)
        config = with_typed_expert_options(config, path)
        config = replace(config, tokenizer=with_found_files(config.tokenizer, path))
        self.metadata = RunMetadata.from_state(config, state)
        self.progress = TrainingProgress()
        if not options.finetune:
            self.progress = TrainingProgress.from_state(state)
        self._optimizer_steps = state["optimizer"]["steps"]
        self._loss_scaler = state["optimizer"]["scaler"]
        self._counters = state["optimizer"]["counters"]
        self.reader = CheckpointReader(path)

    @property
    def continued_from(self) -> Path | None:
        """The checkpoint whose run continues; None with --finetune, which starts a new run."""
        if self.options.finetune:
            return None
        return self.path

    @property
    def _loads_optimizer(self) -> bool:
        return self.options.load_optim and not self.options.finetune

    def keep_global_batch(self, config: RunConfig, groups: Groups) -> RunConfig:
        """Return the configuration with the checkpoint's global batch and its ramp-up.

        It is unchanged with --finetune and with another --global-batch-size, which ends the
        checkpoint's ramp-up; a ramp-up that is set is kept.

        Raises:
            ValueError: The global batch, or a batch of the checkpoint's ramp-up, is not a
                multiple of micro-batch x ranks.
        """
        train = config.train
        saved_batch = self.metadata.global_batch_size
        samples_per_micro_step = train.micro_batch_size * groups.world_size
        if self.options.finetune or not saved_batch:
            return config
        if train.global_batch_size not in (0, saved_batch):
            self._log_dropped_rampup(train)
            return config
        if not train.rampup_batch_size:
            rampup = self._unfinished_rampup()
            self._check_rampup(rampup, train.micro_batch_size, groups)
            train = replace(train, rampup_batch_size=rampup)
        if train.global_batch_size or samples_per_micro_step == saved_batch:
            return replace(config, train=train)
        require(
            saved_batch % samples_per_micro_step == 0,
            "the global batch of the checkpoint",
            saved_batch,
            f"a multiple of --micro-batch-size {train.micro_batch_size} "
            f"x {groups.world_size} ranks",
            "Start another number of ranks, or set --global-batch-size.",
        )
        get_logger().info(
            "the global batch stays at the checkpoint's %d samples; --global-batch-size changes it",
            saved_batch,
        )
        return replace(config, train=replace(train, global_batch_size=saved_batch))

    def _unfinished_rampup(self) -> tuple[int, ...]:
        """Return --rampup-batch-size of the checkpoint's run if its ramp-up has not ended."""
        rampup = self.metadata.config.train.rampup_batch_size
        if rampup and self.progress.consumed_samples > rampup[2]:
            return ()
        return rampup

    def _log_dropped_rampup(self, train: TrainConfig) -> None:
        """Log that another global batch ends the ramp-up of the checkpoint's run."""
        rampup = self._unfinished_rampup()
        if not rampup or train.rampup_batch_size:
            return
        get_logger().info(
            "the checkpoint's ramp-up, --rampup-batch-size %s, is dropped: --global-batch-size "
            "%d replaces the checkpoint's %d",
            " ".join(map(str, rampup)),
            train.global_batch_size,
            self.metadata.global_batch_size,
        )

    def _check_rampup(
        self, rampup: tuple[int, ...], micro_batch_size: int, groups: Groups
    ) -> None:
        samples_per_micro_step = micro_batch_size * groups.world_size
        require(
            not any(size % samples_per_micro_step for size in rampup[:2]),
            "the unfinished ramp-up of the checkpoint",
            list(rampup),
            "a first batch and an increment that are multiples of --micro-batch-size "
            f"{micro_batch_size} x {groups.world_size} ranks",
            "Start another number of ranks, or set --rampup-batch-size, or a --global-batch-size "
            f"other than {self.metadata.global_batch_size}, which drops the ramp-up.",
        )

    def check(self, current: RunMetadata) -> None:
        """Check that the current run may start from this checkpoint, before anything is built.

        Raises:
            ValueError: The model, the experts, the tokenizer or (unless --override-lr-schedule,
                --finetune or --skip-train is set) the schedule differ.
        """
        check_same_run(self.metadata, current, str(self.path))
        warn_of_changed_gates(self.metadata.gates, current.gates)
        warn_of_changed_gates(self.metadata.expert_types, current.expert_types, "expert type")
        if self.options.finetune or current.config.train.skip_train:
            return
        if not self.metadata.has_schedule:
            return
        if not self.options.override_lr_schedule:
            check_same_schedule(self.metadata, current, str(self.path))
        warn_of_changes(self.metadata, current)

    def check_sizes(self) -> None:
        """Check that the checkpoint's own configuration describes a model of a possible size.

        Raises:
            CorruptCheckpointError: It has more layers than tensors, or a huge table of positions.
        """
        model = self.metadata.config.model
        head_size = self.metadata.config.attention.rotary_head_size(model)
        num_tensors = len(self.reader.shapes)
        if model.num_layers > num_tensors:
            raise CorruptCheckpointError(
                f"{self.path / 'run.json'} has {model.num_layers} layers; allowed: up to the "
                f"{num_tensors} tensors in index.json"
            )
        if model.max_positions * head_size > _LARGEST_POSITION_TABLE:
            raise CorruptCheckpointError(
                f"{self.path / 'run.json'} has {model.max_positions} positions; allowed: up to "
                f"{_LARGEST_POSITION_TABLE // head_size}"
            )

    def check_model(self, model: nn.Module, groups: Groups) -> None:
        """Check that the checkpoint has the tensors of a model, which may be on `meta`.

        Raises:
            CorruptCheckpointError: Names or shapes of tensors differ.
        """
        self._require_same_tensors(GlobalLayout.of(model, groups), model)

    def load_weights(self, model: nn.Module, groups: Groups) -> None:
        """Fill a finished fp32 model with the weights and buffers of the checkpoint.

        Call it before the engine is built, which makes its own copies of the weights.

        Raises:
            CorruptCheckpointError: Names or shapes of tensors differ from the model's.
        """
        layout = GlobalLayout.of(model, groups)
        self._require_same_tensors(layout, model)
        fill_weights(model, layout, self._read_weight, self.reader.buffer)

    def _require_same_tensors(self, layout: GlobalLayout, model: nn.Module) -> None:
        buffers = model.state_dict()
        expected = {name: tuple(shape) for name, shape in layout.shapes.items()}
        expected |= {name: tuple(buffers[name].shape) for name in layout.buffers}
        stored = {name: tuple(shape) for name, shape in self.reader.shapes.items()}
        for name in self.reader.buffers:
            stored[name] = tuple(self.reader.buffer_spec(name).shape)
        for name in sorted({*expected, *stored}):
            if expected.get(name) == stored.get(name):
                continue
            theirs = f"has shape {shortened(stored[name])}" if name in stored else "is missing"
            ours = f"has shape {expected[name]}" if name in expected else "does not exist"
            raise CorruptCheckpointError(
                f"{self.path / 'index.json'} does not fit the model: {shortened(name)} {theirs} "
                f"in the checkpoint, but {ours} in the model. If the code of the model or of a "
                "gate has changed, use that of the checkpoint"
            )

    def _read_weight(self, name: str, start: int, length: int) -> torch.Tensor:
        return self.reader.read("weight", name, start, length)

    def restore(self, engine: Engine, groups: Groups) -> TrainingProgress:
        """Restore the engine: fp32 weights, moments, counters and random states.

        With --finetune only the fp32 weights are restored; without --load-optim no moments and no
        loss scale; without --load-rng the random streams stay as they were seeded.

        Returns:
            The progress of the run.
        """
        zero_shards = engine.zero_shards()
        state_keys = ["weight"]
        if self._optimizer_steps and self._loads_optimizer:
            state_keys += zero_shards.moments
            zero_shards.initialize_moments(self._optimizer_steps)
        if len(state_keys) > 1:
            self._log_changed_moments(engine.layout)
        for shard in zero_shards.shards:
            for state_key in state_keys:
                if state_key != "weight" and shard.name in self.reader.frozen:
                    continue  # trained from now on: the moments are 0
                values = self.reader.read(state_key, shard.name, shard.start, shard.length)
                zero_shards.get(shard, state_key).copy_(values)
        if self.options.finetune:
            get_logger().info(
                "loaded the weights of %s; the optimizer and the data start from scratch",
                self.path,
            )
            return self.progress
        engine.set_counters(self._counters)
        if self._loads_optimizer:
            zero_shards.set_loss_scaler_state(self._loss_scaler)
        else:
            get_logger().info("the optimizer starts from scratch, as --no-load-optim sets")
        if not self.metadata.has_schedule:
            pass  # the random streams start as they were seeded
        elif not self.options.load_rng:
            get_logger().info("random streams start from --seed, as --no-load-rng sets")
        elif self.metadata.topology["ranks"] == groups.world_size:
            self._restore_random_states(groups.rank)
        else:
            # Random streams that no rank of the saved run has used.
            seed = self.metadata.config.train.seed + self.progress.iteration
            rng.seed_rank(seed, groups.rank)
        get_logger().info("resumed from %s at iteration %d", self.path, self.progress.iteration)
        return self.progress

    def _log_changed_moments(self, layout: GlobalLayout) -> None:
        """Log which moments start at 0 and which are dropped, if frozen parameters differ."""
        started = [name for name in self.reader.frozen if name not in layout.frozen]
        dropped = [name for name in layout.frozen if name not in self.reader.frozen]
        if started:
            get_logger().info(
                "%d parameters that were frozen in %s are trained, such as %s: their moments "
                "start at zero",
                len(started),
                self.path,
                min(started),
            )
        if dropped:
            get_logger().info(
                "%d parameters that were trained in %s are frozen, such as %s: their moments are "
                "not loaded",
                len(dropped),
                self.path,
                min(dropped),
            )

    def _restore_random_states(self, rank: int) -> None:
        states = self.reader.rng(rank)
        try:
            rng.set_state(states)
        except RuntimeError as error:
            raise CorruptCheckpointError(
                f"{self.path / rank_file_name(rank)} has a random state that torch refuses: "
                f"{str(error).splitlines()[0]}"
            ) from None


class RunStart(NamedTuple):
    """What a run starts from."""

    loaded: LoadedCheckpoint | None
    """The checkpoint, None for a run from scratch"""
    config: RunConfig
    """The configuration, with the global batch that the run continues with"""
    progress: TrainingProgress
    """Progress of the run so far"""


def load_for_run(config: RunConfig, groups: Groups) -> RunStart:
    """Find the checkpoint that --load names, and adapt the configuration to it.

    Raises like `find_checkpoint` and `LoadedCheckpoint.keep_global_batch`.
    """
    loaded = find_checkpoint(config.checkpoint, groups)
    if loaded is None:
        return RunStart(None, config, TrainingProgress())
    return RunStart(loaded, loaded.keep_global_batch(config, groups), loaded.progress)


def find_checkpoint(
    options: CheckpointConfig, groups: Groups, *, required: bool = False
) -> LoadedCheckpoint | None:
    """Find the newest valid checkpoint that --load and --load-step name.

    Every rank verifies its share of the files, and all ranks choose the same checkpoint. Each
    checkpoint that is not valid is logged.

    Args:
        required: Whether the program cannot do without one; then no message suggests to leave
            out --load.

    Returns:
        The checkpoint. None without --load, or with --load-or-init when there is no checkpoint.

    Raises:
        FileNotFoundError: There is no checkpoint, none is valid, or that of --load-step is not;
            or --load is the folder of a Hugging Face model, also with --load-or-init.
        ValueError: The single checkpoint that --load names is corrupt.
    """
    if not options.load:
        return None
    selection = broadcast_from_rank0(
        lambda: select_checkpoints(Path(options.load), options.load_step), groups
    )
    may_start = options.load_or_init and not options.load_step
    if selection.is_empty and may_start and not is_hf_folder(selection.path):
        get_logger().info(
            "%s holds no checkpoint: the run starts from scratch, as --load-or-init allows",
            options.load,
        )
        return None
    if selection.note:
        get_logger().info("%s", selection.note)
    for problem in selection.problems:
        warn_on_rank0("%s; not used", problem)
    found = find_newest_valid(
        selection, partial(_verify_on_all_ranks, groups), _advice(selection, required)
    )
    return LoadedCheckpoint(found.path, options, found.corrupt)


def _advice(selection: CheckpointSelection, required: bool) -> str:
    if selection.step:
        return "Set --load-step to the iteration of another checkpoint, or leave it out"
    if required and selection.is_empty:
        return (
            "Give the directory given to --save of a training run, or the folder of a downloaded "
            "Hugging Face model"
        )
    if required:
        return "Restore its files from a copy, or point --load at the directory of another run"
    if selection.is_empty and is_hf_folder(selection.path):
        return "To start from this Hugging Face model, give it as --init-from-hf instead"
    if selection.is_empty:
        return (
            "Point --load at the directory given to --save of an earlier run, leave it out, or "
            "add --load-or-init"
        )
    return (
        "Restore its files from a copy, point --load at the directory of another run, or leave "
        "it out to start a new run"
    )


def _verify_on_all_ranks(groups: Groups, entry: CheckpointEntry) -> list[str]:
    """Verify all files of a checkpoint, each rank its share; the result is equal on all ranks."""
    names = sorted(entry.manifest["files"])[groups.rank :: groups.world_size]
    task = BackgroundTask(f"verifying {entry.path}", partial(_first_problem, entry, names))
    task.start()
    task.wait_for_all(groups)
    problems = []
    for outcome in task.outcomes(groups):
        if outcome.error or outcome.result:
            problems.append(outcome.error or outcome.result)
    if problems:
        warn_on_rank0("%s; not used", "; ".join(problems))
    return problems


def _first_problem(entry: CheckpointEntry, names: list[str]) -> str:
    try:
        check_files(entry.path, names, entry.manifest)
    except CorruptCheckpointError as error:
        return f"{error} (found by {socket.gethostname()})"
    return ""
