"""Save checkpoints: each rank writes its shards, optionally in the background; rank 0 commits.

A checkpoint is either complete or absent, see megatron.checkpoint.directory. Ranks write
safetensors files, everything else is JSON, see megatron.checkpoint.shards. Loading is in
megatron.checkpoint.loader.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint import directory
from megatron.checkpoint.loader import LoadedCheckpoint
from megatron.checkpoint.manifest import HF_FOLDER, write_with_digest
from megatron.checkpoint.metadata import RunMetadata, TrainingProgress
from megatron.checkpoint.origin_files import copy_hf_folder
from megatron.checkpoint.shards import (
    ShardRange,
    make_index,
    rank_file_name,
    write_tensors,
)
from megatron.checkpoint.weights_only import ExtraFiles
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.format_version import with_version
from megatron.config.run_json import run_json_text
from megatron.engine.engine import Engine
from megatron.engine.zero_shards import ZeroShards
from megatron.io.atomic_write import fsync_directory
from megatron.io.disk_space import require_disk_space
from megatron.io.safetensors_writer import TensorSpec, in_file_order
from megatron.io.sha256 import FileDigest
from megatron.io.staging_dir import StagingDir, StagingDirLocked, lock_holder
from megatron.log import get_logger
from megatron.parallel import rng
from megatron.parallel.background import BackgroundTask
from megatron.parallel.groups import Groups, all_gather_objects, broadcast_from_rank0

_ALIGNMENT = 64
"""Bytes to which tensors in the staging buffer are aligned"""


class Checkpointer:
    """Context manager that writes the checkpoints of a run and locks their directory.

    Args:
        options: --save and the flags that belong to it; without --save nothing is written.
        metadata: Description of the run for every checkpoint.
        loaded: The checkpoint that the run started from, if any. Checkpoints that were found
            corrupt before it do not count for --keep-last, and its folder `hf/` is copied.
        write_origin: Writes the folder `hf/` of the first checkpoint, for a run that started
            from a Hugging Face model.

    Raises:
        ValueError: Another run writes to the directory, or it has checkpoints of a run that this
            one does not continue, or the optimizer state cannot be saved.
        OSError: The directory cannot be written.
    """

    def __init__(
        self,
        options: CheckpointConfig,
        engine: Engine,
        metadata: RunMetadata,
        groups: Groups,
        loaded: LoadedCheckpoint | None = None,
        write_origin: ExtraFiles | None = None,
    ):
        self._write_origin = write_origin
        if loaded is not None and (loaded.path / HF_FOLDER).is_dir():
            self._write_origin = partial(copy_hf_folder, loaded.path)
        self.options = options
        self.engine = engine
        self.metadata = metadata
        self.groups = groups
        self.directory = Path(options.save)
        self.failures = 0
        """Number of checkpoints that could not be written"""
        self.on_commit: Callable[[Path], None] | None = None
        """Called on rank 0 with each checkpoint that is complete, between two steps"""
        self._last_saved = ""
        self._corrupt: set[str] = set()
        continued_from = None
        if loaded is not None:
            self._corrupt = {path.name for path in loaded.corrupt}
            continued_from = loaded.continued_from
        if continued_from is not None:
            self._last_saved = str(continued_from)
        self._pending: _PendingSave | None = None
        self._must_succeed = True
        self._staging_buffer = PinnedStagingBuffer(groups.device)
        self._staging_dir: StagingDir | None = None
        if options.save:
            engine.zero_shards().check()  # fail now rather than at the first save
            broadcast_from_rank0(partial(self._open_directory, continued_from), groups)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._staging_dir is None:
            return
        # A failing rank does not wait for its background write. The thread ends with the
        # process, and so does the lock, which must be held as long as it writes.
        if self._pending is None or not self._pending.task.is_running:
            self._staging_dir.release()

    def _open_directory(self, continued_from: Path | None) -> None:
        """Lock the directory and remove the leftovers of a killed run. Runs on rank 0."""
        entries, _ = directory.list_with_newer_versions(self.directory)
        if entries and not self._is_own_directory(continued_from):
            raise ValueError(
                f"--save is {self.options.save!r}, which has {entries[0].path.name}; allowed: a "
                "directory without checkpoints, or that of the run that continues. Add --load, "
                "or choose another directory"
            )
        prefix = str(self.directory / "checkpoint")
        try:
            self._staging_dir = StagingDir(prefix)
        except StagingDirLocked:
            raise ValueError(
                f"--save is {self.options.save!r}, to which another run writes, "
                f"{lock_holder(prefix)}; wait for it, or choose another directory"
            ) from None
        fsync_directory(self.directory.resolve().parent)
        for unfinished in self._staging_dir.path.glob("iter_*"):
            shutil.rmtree(unfinished)
        directory.remove_stale(self.directory)

    def _is_own_directory(self, continued_from: Path | None) -> bool:
        if continued_from is None:
            return False
        return continued_from.resolve().parent == self.directory.resolve()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint was begun and is not committed yet."""
        return self._pending is not None

    def last_saved_message(self) -> str:
        """Describe the newest checkpoint that this run wrote or started from, for messages."""
        if not self._last_saved:
            return "no checkpoint was saved"
        return f"the last good checkpoint is {self._last_saved}"

    def save(self, progress: TrainingProgress, last: bool = False) -> None:
        """Write a checkpoint; with --async-save, return as soon as the state is copied.

        Args:
            last: Whether it is the last checkpoint of the run, which must not be lost.

        Raises:
            OSError: It cannot be written; raised on every rank. With --on-save-error continue
                the error is logged instead, unless it is the last checkpoint.
        """
        self.finish()
        self._must_succeed = last or self.options.on_save_error == "stop"
        started = time.monotonic()
        try:
            self._pending = self._begin(progress)
        except OSError as error:
            self._handle_failure(error)
            return
        self._pending.task.start()
        if not self.options.async_save:
            self.finish()
            return
        get_logger().info(
            "copied the state of iteration %d in %.2f s; it is written in the background",
            progress.iteration,
            time.monotonic() - started,
        )

    def poll(self) -> None:
        """Advance a save in the background; call it on all ranks after every step.

        Raises like `save`.
        """
        if self._pending is None:
            return
        if not self._pending.task.running_on_any_rank(self.groups):
            self._advance()

    def finish(self) -> None:
        """Wait until a save in the background is committed. Raises like `save`."""
        while self._pending is not None:
            self._pending.task.wait_for_all(self.groups)
            self._advance()

    def _begin(self, progress: TrainingProgress) -> _PendingSave:
        """Prepare a save on all ranks: check for space, make the index, copy the state."""
        zero_shards = self.engine.zero_shards()
        tensors = self._local_tensors(zero_shards)
        specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
        specs = in_file_order(specs)
        nbytes = sum(spec.nbytes for spec in specs)
        ranges = []
        if self._writes_shards(zero_shards):
            shards = [*zero_shards.shards, *self.engine.frozen_weights.shards]
            ranges = [ShardRange(s.name, s.start, s.length) for s in shards]
        all_ranges_and_nbytes = all_gather_objects((ranges, nbytes), self.groups)
        total_nbytes = sum(nbytes for _, nbytes in all_ranges_and_nbytes)
        prepare = partial(self._prepare_directory, progress.iteration, total_nbytes)
        unfinished = Path(broadcast_from_rank0(prepare, self.groups))
        json_files = {}
        if self.groups.is_rank0:
            all_ranges = [ranges for ranges, _ in all_ranges_and_nbytes]
            json_files = self._json_files(progress, zero_shards, all_ranges)
        if self.options.async_save:
            tensors = self._staging_buffer.copy(tensors, specs)
        rank_file = rank_file_name(self.groups.rank)
        task = BackgroundTask(
            f"writing {unfinished / rank_file}",
            partial(_write_rank_file, unfinished, rank_file, specs, tensors),
        )
        return _PendingSave(unfinished, progress.iteration, json_files, task)

    def _writes_shards(self, zero_shards: ZeroShards) -> bool:
        """Return whether this rank writes its shards: replicated ones are written by rank 0."""
        return self.groups.is_rank0 or not zero_shards.replicated

    def _local_tensors(self, zero_shards: ZeroShards) -> dict[str, Tensor]:
        """Return the tensors of this rank's file by their names in it."""
        tensors = {}
        for device, state in rng.get_state().items():
            tensors[f"rng/{device}"] = state
        if self._writes_shards(zero_shards):
            for state_key in zero_shards.state_keys():
                for shard in zero_shards.shards:
                    tensors[f"{state_key}/{shard.name}"] = zero_shards.get(shard, state_key)
            for frozen in self.engine.frozen_weights.shards:
                tensors[f"weight/{frozen.name}"] = frozen.weight()
        if self.groups.is_rank0:
            buffers = dict(self.engine.model.named_buffers())
            for name in self.engine.layout.buffers:
                tensors[f"buffer/{name}"] = buffers[name]
        return tensors

    def _json_files(
        self,
        progress: TrainingProgress,
        zero_shards: ZeroShards,
        all_ranges: list[list[ShardRange]],
    ) -> dict[str, str]:
        """Return the text of the JSON files, as of now, by name."""
        layout = self.engine.layout
        index = make_index(
            all_ranges, layout.shapes, zero_shards.state_keys(), layout.buffers, layout.frozen
        )
        state = self.metadata.to_state()
        state["progress"] = progress.to_state()
        state["optimizer"] = {
            "steps": zero_shards.steps,
            "counters": self.engine.counters(),
            "scaler": zero_shards.loss_scaler_state(),
        }
        return {
            "run.json": run_json_text(self.metadata.config),
            "state.json": json.dumps(with_version(state), indent=1) + "\n",
            "index.json": json.dumps(with_version(index)) + "\n",
        }

    def _prepare_directory(self, iteration: int, nbytes: int) -> str:
        """Check for space on the disk and make an empty staging directory. Runs on rank 0."""
        assert self._staging_dir is not None
        unfinished = self._staging_dir.path / directory.checkpoint_name(iteration)
        shutil.rmtree(unfinished, ignore_errors=True)
        require_disk_space(
            self.directory / directory.checkpoint_name(iteration),
            nbytes,
            "Free some space, lower --keep-last, or save elsewhere",
        )
        unfinished.mkdir()
        return str(unfinished)

    def _advance(self) -> None:
        """Take the next step of a save, on all ranks, when no rank's task is running.

        After all ranks have written their files, rank 0 commits; then the save is complete.
        """
        pending = self._pending
        assert pending is not None
        outcomes = pending.task.outcomes(self.groups)
        errors = [outcome.error for outcome in outcomes if outcome.error]
        if errors:
            self._pending = None
            if self.groups.is_rank0:
                shutil.rmtree(pending.unfinished, ignore_errors=True)
            self._handle_failure(OSError(errors[0]))
        elif pending.is_committing:
            self._pending = None
            self._last_saved = outcomes[0].result
            if self.on_commit is not None and self.groups.is_rank0:
                self.on_commit(Path(self._last_saved))
        else:
            files = {}
            for rank, outcome in enumerate(outcomes):
                files[rank_file_name(rank)] = outcome.result
            pending.is_committing = True
            pending.task = BackgroundTask(
                f"committing {pending.unfinished}", partial(self._commit, pending, files)
            )
            if self.groups.is_rank0:
                pending.task.start()

    def _commit(self, pending: _PendingSave, files: dict[str, FileDigest]) -> str:
        """Commit a checkpoint whose rank files are written, and return its path.

        Runs on rank 0, in the background.
        """
        for name, text in pending.json_files.items():
            files[name] = write_with_digest(pending.unfinished / name, text)
        if self._write_origin is not None:
            files |= self._write_origin(pending.unfinished)
        target = directory.commit_checkpoint(
            pending.unfinished, self.directory, pending.iteration, files
        )
        self._corrupt.discard(target.name)
        if self._write_origin is not None:
            # The checkpoint or the folder that the run started from may be deleted.
            self._write_origin = partial(copy_hf_folder, target)
        get_logger().info(
            "saved %s: %.1f MB in %.1f s",
            target,
            sum(digest.nbytes for digest in files.values()) / 1e6,
            time.monotonic() - pending.started,
        )
        deleted = directory.apply_retention(
            self.directory, self.options.keep_last, self.options.keep_every, self._corrupt
        )
        if deleted:
            get_logger().info("deleted %s, as --keep-last requires", ", ".join(deleted))
        return str(target)

    def _handle_failure(self, error: OSError) -> None:
        """Raise or log the error of a save, as --on-save-error sets; equal on all ranks."""
        self.failures += 1
        if self._must_succeed:
            raise OSError(f"{error}; {self.last_saved_message()}") from None
        if self.groups.is_rank0:
            get_logger().error(
                "%s. The training continues, as --on-save-error sets; %s",
                error,
                self.last_saved_message(),
            )


@dataclass
class _PendingSave:
    """A save that was begun: first every rank writes its file, then rank 0 commits."""

    unfinished: Path
    """Staging directory of the checkpoint"""
    iteration: int
    json_files: dict[str, str]
    """Text of the JSON files by name; empty on ranks other than 0"""
    task: BackgroundTask
    """The current work of this rank"""
    is_committing: bool = False
    started: float = field(default_factory=time.monotonic)


def _write_rank_file(
    unfinished: Path, name: str, specs: list[TensorSpec], tensors: dict[str, Tensor]
) -> FileDigest:
    """Write a rank's file and sync it to the disk."""
    if not unfinished.is_dir():
        raise OSError(
            f"{unfinished}, which rank 0 made, does not exist on {socket.gethostname()}; allowed "
            "for --save: a directory that all nodes see"
        )
    digest = write_tensors(unfinished / name, specs, tensors.__getitem__, {"format": "pt"})
    fsync_directory(unfinished)
    return digest


class PinnedStagingBuffer:
    """Host memory for the copy of the state that is written in the background.

    It is reused from one checkpoint to the next, and page-locked when the state is on a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: dict[str, Tensor], specs: list[TensorSpec]) -> dict[str, Tensor]:
        """Copy tensors to the host; the copies are complete when this returns.

        They are valid until the next call.
        """
        is_cuda = self.device.type == "cuda"
        offsets = {}
        total_bytes = 0
        for spec in specs:
            offsets[spec.name] = total_bytes
            total_bytes += -(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT
        if len(self._bytes) < total_bytes:
            self._bytes = torch.empty(total_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        copies = {}
        for spec in specs:
            start = offsets[spec.name]
            raw = self._bytes[start : start + spec.nbytes]
            copy = raw.view(spec.dtype).view(spec.shape)
            copy.copy_(tensors[spec.name], non_blocking=True)
            copies[spec.name] = copy
        if is_cuda:
            torch.cuda.current_stream(self.device).synchronize()
        return copies
