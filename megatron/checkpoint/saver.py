"""Saving: each rank writes its pieces of the run's state, beside the training if asked to, and rank 0 publishes them.

A checkpoint is complete or not there: megatron.checkpoint.directory. What a rank writes is safetensors, the rest is JSON:
megatron.checkpoint.reader. Loading is megatron.checkpoint.loader.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint import directory
from megatron.checkpoint.loader import LoadedCheckpoint
from megatron.checkpoint.metadata import RunMetadata, TrainingProgress
from megatron.checkpoint.reader import make_index, shard_name, write_tensors
from megatron.config.checkpoint import CheckpointConfig
from megatron.engine.engine import Engine
from megatron.engine.zero_shards import ZeroShards
from megatron.io.atomic_write import fsync_directory
from megatron.io.safetensors_writer import TensorSpec, in_file_order
from megatron.io.staging_dir import StagingDir, StagingDirLocked, lock_holder
from megatron.log import get_logger
from megatron.parallel import rng
from megatron.parallel.background import BackgroundTask
from megatron.parallel.groups import Groups, all_gather_objects, broadcast_from_rank0

ALIGNMENT = 64


class Checkpointer:
    """The checkpoints of a run. A context manager: nobody else may write to the folder until it is left.

    Args:
        options: --save and what belongs to it; without --save nothing is ever written.
        record: what every checkpoint says of the run.
        source: the checkpoint that the run began with, if any. Those that were found damaged on the way to it do not
            count for --keep-last.

    Raises:
        ValueError: another run writes its checkpoints to the folder, or the folder has those of a run that this one
            does not go on from, or the optimizer's state cannot be saved.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        options: CheckpointConfig,
        engine: Engine,
        record: RunMetadata,
        groups: Groups,
        source: LoadedCheckpoint | None = None,
    ):
        self.options, self.engine, self.record, self.groups = options, engine, record, groups
        self.folder = Path(options.save)
        goes_on = source.goes_on if source else None
        self.newest = str(goes_on) if goes_on else ""
        self.failures = 0
        """checkpoints that could not be written"""
        self._damaged = {path.name for path in source.damaged} if source else set()
        self._pending: _Pending | None = None
        self._must = True
        self._memory = PinnedStagingBuffer(groups.device)
        self._work: StagingDir | None = None
        if options.save:
            engine.partitions().check()  # what cannot be saved is to be known now, not at the first save
            broadcast_from_rank0(lambda: self._open(goes_on), groups)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        # A rank that fails does not wait for its writing, which ends with the process, as the lock does.
        if self._work is not None and not (self._pending and self._pending.job.is_running):
            self._work.release()

    def _open(self, goes_on: Path | None) -> None:
        """On rank 0: take the folder, and remove what a killed run left half done."""
        there = directory.list_checkpoints(self.folder)[0]
        if there and (goes_on is None or goes_on.resolve().parent != self.folder.resolve()):
            raise ValueError(
                f"--save is {self.options.save!r}, which has {there[0][0].name}; allowed: a folder "
                "without checkpoints, or the one that the run goes on from. Add --load, or choose another"
            )
        try:
            self._work = StagingDir(self.folder / "checkpoint")
        except StagingDirLocked:
            other = lock_holder(str(self.folder / "checkpoint"))
            raise ValueError(
                f"--save is {self.options.save!r}, to which another run writes, {other}; wait for it, or "
                "choose another folder"
            ) from None
        fsync_directory(self.folder.resolve().parent)
        for half in self._work.path.glob("iter_*"):
            shutil.rmtree(half)
        directory.remove_stale(self.folder)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint has been begun and not yet been published."""
        return self._pending is not None

    def last_saved_message(self) -> str:
        """For messages: the newest checkpoint that this run wrote or started from."""
        return (
            f"the last good checkpoint is {self.newest}"
            if self.newest
            else "no checkpoint was saved"
        )

    def save(self, progress: TrainingProgress, last: bool = False) -> None:
        """Write a checkpoint; with --async-save return as soon as the state is copied.

        Args:
            last: of the run, which cannot go on without it.

        Raises:
            OSError: it cannot be written, on every rank; with --on-save-error continue that is logged instead, unless
                it is the last.
        """
        self.finish()
        self._must = last or self.options.on_save_error == "stop"
        started = time.monotonic()
        try:
            self._pending = self._begin(progress)
        except OSError as error:
            self._failed(error)
            return
        self._pending.job.start()
        if self.options.async_save:
            get_logger().info(
                "copied the state of iteration %d in %.2f s; writing goes on beside the training",
                progress.iteration,
                time.monotonic() - started,
            )
        else:
            self.finish()

    def poll(self) -> None:
        """Once per step, on all ranks: see to a checkpoint that is being written. Raises as `save` does."""
        if self._pending is not None and not self._pending.job.running_on_any_rank(self.groups):
            self._advance()

    def finish(self) -> None:
        """Wait for a checkpoint that is being written. Raises as `save` does."""
        while self._pending is not None:
            self._pending.job.wait_for_all(self.groups)
            self._advance()

    def _begin(self, progress: TrainingProgress) -> _Pending:
        parts = self.engine.partitions()
        tensors = self._tensors(parts)
        entries = in_file_order(
            [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
        )
        size = sum(e.nbytes for e in entries)
        owned = [(p.name, p.start, p.length) for p in parts.pieces] if self._owns(parts) else []
        told = all_gather_objects((owned, size), self.groups)
        partial = Path(
            broadcast_from_rank0(
                lambda: str(self._prepare(progress, sum(size for _, size in told))), self.groups
            )
        )
        layout = self.engine.layout
        texts = {}
        if self.groups.is_rank0:
            index = make_index(
                [pieces for pieces, _ in told], layout.shapes, parts.kinds(), layout.buffers
            )
            state = {
                **self.record.state(),
                "progress": asdict(progress),
                "optimizer": {
                    "steps": parts.steps,
                    "counters": self.engine.counters(),
                    "scaler": parts.scaler(),
                },
            }
            texts = {
                "run.json": json.dumps(self.record.config.to_dict(), indent=2),
                "state.json": json.dumps(state, indent=1),
                "index.json": json.dumps(index),
            }
        if self.options.async_save:
            tensors = self._memory.copy(tensors, entries)
        name = shard_name(self.groups.rank)
        job = BackgroundTask(
            f"writing {partial / name}", lambda: _write(partial, name, entries, tensors)
        )
        return _Pending(partial, progress.iteration, name, texts, job)

    def _owns(self, parts: ZeroShards) -> bool:
        """Whether this rank's pieces are to be written: of what all ranks have, only rank 0's."""
        return self.groups.is_rank0 or not parts.replicated

    def _tensors(self, parts: ZeroShards) -> dict[str, Tensor]:
        """What this rank writes, by name in its file."""
        tensors = {f"rng/{device}": state for device, state in rng.get_state().items()}
        if self._owns(parts):
            tensors |= {
                f"{kind}/{p.name}": parts.get(p, kind)
                for kind in parts.kinds()
                for p in parts.pieces
            }
        if self.groups.is_rank0:
            buffers = dict(self.engine.model.named_buffers())
            tensors |= {f"buffer/{name}": buffers[name] for name in self.engine.layout.buffers}
        return tensors

    def _prepare(self, progress: TrainingProgress, size: int) -> Path:
        """On rank 0: room on the disk, and an empty folder."""
        partial = self._work.path / directory.checkpoint_name(progress.iteration)
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise OSError(
                f"the checkpoint of iteration {progress.iteration} takes {size / 1e6:,.1f} MB, but "
                f"{self.folder} has {free / 1e6:,.1f} MB free. Free some space, lower --keep-last, or save "
                "elsewhere"
            )
        partial.mkdir()
        return partial

    def _advance(self) -> None:
        """On all ranks, when none is busy any more: when each has written rank 0 publishes, and then all are told."""
        now = self._pending
        results = all_gather_objects((now.name, now.job.result, now.job.error), self.groups)
        errors = [error for _, _, error in results if error]
        if errors:
            self._pending = None
            if self.groups.is_rank0:
                shutil.rmtree(now.partial, ignore_errors=True)
            self._failed(OSError(errors[0]))
        elif not now.publishing:
            files = {name: result for name, result, _ in results}
            now.publishing, now.job = (
                True,
                BackgroundTask(f"publishing {now.partial}", lambda: self._publish(now, files)),
            )
            if self.groups.is_rank0:
                now.job.start()
        else:
            self._pending, self.newest = None, results[0][1]

    def _publish(self, pending: _Pending, files: dict[str, tuple[int, str]]) -> str:
        """On rank 0; returns where the checkpoint is."""
        for name, text in pending.texts.items():
            files[name] = directory.write_text(pending.partial / name, text + "\n")
        target = directory.commit_checkpoint(
            pending.partial, self.folder, pending.iteration, files
        )
        self._damaged -= {target.name}
        get_logger().info(
            "saved %s: %.1f MB in %.1f s",
            target,
            sum(size for size, _ in files.values()) / 1e6,
            time.monotonic() - pending.started,
        )
        gone = directory.apply_retention(
            self.folder, self.options.keep_last, self.options.keep_every, self._damaged
        )
        if gone:
            get_logger().info("deleted %s, as --keep-last says", ", ".join(gone))
        return str(target)

    def _failed(self, error: OSError) -> None:
        """What --on-save-error says; every rank has the same error here."""
        self.failures += 1
        if self._must:
            raise OSError(f"{error}; {self.last_saved_message()}") from None
        get_logger().error(
            "%s. The training goes on, as --on-save-error says; %s",
            error,
            self.last_saved_message(),
        )


@dataclass
class _Pending:
    """A checkpoint that has been begun: first every rank has a job, to write its file, then rank 0, to publish."""

    partial: Path
    iteration: int
    name: str
    """of this rank's file"""
    texts: dict[str, str]
    """rank 0's small files"""
    job: BackgroundTask
    publishing: bool = False
    started: float = field(default_factory=time.monotonic)


def _write(
    partial: Path, name: str, entries: list[TensorSpec], tensors: dict[str, Tensor]
) -> tuple[int, str]:
    """Write a rank's file and sync it to the disk; its bytes and SHA-256."""
    if not partial.is_dir():
        raise OSError(
            f"{partial}, which rank 0 made, is not there on {socket.gethostname()}; allowed for --save: a "
            "folder that all nodes see"
        )
    result = write_tensors(partial / name, entries, tensors.__getitem__, {"format": "pt"})
    fsync_directory(partial)
    return result


class PinnedStagingBuffer:
    """Where the state is copied to before it is written beside the training: kept from one checkpoint to the next."""

    def __init__(self, device: torch.device):
        self.device, self._bytes = device, torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: dict[str, Tensor], entries: list[TensorSpec]) -> dict[str, Tensor]:
        """The same tensors on the host, as they are now."""
        places, end = {}, 0
        for e in entries:
            places[e.name], end = end, end + -(-e.nbytes // ALIGNMENT) * ALIGNMENT
        if len(self._bytes) < end:
            self._bytes = torch.empty(
                end, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
            )
        copies = {}
        for e in entries:
            place = self._bytes[places[e.name] : places[e.name] + e.nbytes]
            copies[e.name] = place.view(e.dtype).view(e.shape)
            copies[e.name].copy_(tensors[e.name], non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return copies
