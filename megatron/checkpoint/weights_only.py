"""Write a checkpoint that has weights and no training state, a slice at a time.

It is the checkpoint of iteration 0 of a run that has no length yet: a run that loads it starts with
its weights, an optimizer without moments, and a schedule of its own.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.directory import (
    checkpoint_name,
    commit_checkpoint,
    iteration_of,
    list_with_newer_versions,
    remove_stale,
)
from megatron.checkpoint.manifest import write_with_digest
from megatron.checkpoint.metadata import RunMetadata, TrainingProgress
from megatron.checkpoint.shards import SLICE_ELEMENTS, ShardRange, make_index, rank_file_name
from megatron.config.fields import require
from megatron.config.format_version import with_version
from megatron.config.run_json import run_json_text
from megatron.config.schema import RunConfig
from megatron.io.atomic_write import fsync_directory
from megatron.io.disk_space import require_disk_space
from megatron.io.progress import ProgressCallback, no_progress
from megatron.io.safetensors_writer import SafetensorsWriter, TensorSpec
from megatron.io.sha256 import FileDigest
from megatron.io.staging_dir import StagingDir
from megatron.parallel.groups import Groups
from megatron.tokenizer.base import Tokenizer

_JSON_FILES_BYTES = 64 << 20
"""Upper bound of the size of all files without tensors"""

ExtraFiles = Callable[[Path], dict[str, FileDigest]]
"""Writes further files of a checkpoint into its unfinished directory, synced to the disk, and
returns their digests by path in it"""


@dataclass(frozen=True)
class WeightsSource:
    """The tensors of a model, read by ranges."""

    shapes: Mapping[str, tuple[int, ...]]
    """Full shapes of the parameters by name"""
    buffers: Mapping[str, TensorSpec]
    """Dtypes and shapes of the buffers in the model's state by name"""
    read: Callable[[str, int, int], Tensor]
    """Returns elements `start` to `start + length` of a flattened parameter by (name, start,
    length); they are stored in fp32"""
    buffer: Callable[[str], Tensor]
    """Returns a buffer by name, of the dtype and shape of its spec"""

    @property
    def nbytes(self) -> int:
        """Size of the stored tensors in bytes."""
        return sum(spec.nbytes for spec in self.stored_specs())

    def stored_specs(self) -> list[TensorSpec]:
        """Return dtype and shape of all tensors under their names in the file."""
        specs = []
        for name, shape in self.shapes.items():
            specs.append(TensorSpec(f"weight/{name}", torch.float32, (math.prod(shape),)))
        for name, spec in self.buffers.items():
            specs.append(TensorSpec(f"buffer/{name}", spec.dtype, spec.shape))
        return specs


def require_no_checkpoints(directory: Path) -> None:
    """Check that a directory may become the directory of a new run's checkpoints.

    Raises:
        ValueError: It has files, or lies inside a checkpoint.
    """
    advice = "Remove it, or write to another one."
    is_empty = not directory.exists() or (
        directory.is_dir() and all(path.suffix == ".partial" for path in directory.iterdir())
    )
    require(is_empty, "the output", str(directory), "a new or an empty directory", advice)
    parents = (directory, *directory.parents)
    require(
        not any(iteration_of(path) is not None for path in parents),
        "the output",
        str(directory),
        "a directory that is no checkpoint of a run and in none",
    )


def write_weights_checkpoint(
    directory: str | Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    source: WeightsSource,
    *,
    extra_files: ExtraFiles | None = None,
    extra_bytes: int = 0,
    progress: ProgressCallback = no_progress,
) -> Path:
    """Write a checkpoint of iteration 0 to a new directory of checkpoints.

    It appears when it is complete. Memory: a slice of a tensor, and what `source.read` needs.

    Args:
        directory: New or empty.
        config: Configuration of the model, stored as run.json.
        extra_files: Writes further files.
        extra_bytes: Upper bound of their size.
        progress: Called with the bytes that were written since the last call.

    Returns:
        The directory of the checkpoint, `<directory>/iter_0000000`.

    Raises:
        ValueError: The directory is not empty, or another process writes to it.
        OSError: It cannot be written, or the disk is too full.
    """
    directory = Path(directory).resolve()
    require_no_checkpoints(directory)
    existed = directory.exists()
    require_disk_space(directory, source.nbytes + extra_bytes + _JSON_FILES_BYTES)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with StagingDir(directory / "checkpoint") as staging_dir:
            partial = staging_dir.path / checkpoint_name(0)
            shutil.rmtree(partial, ignore_errors=True)  # of a killed program
            partial.mkdir()
            try:
                files = {rank_file_name(0): _write_tensors(partial, source, progress)}
                files |= _write_json_files(partial, config, tokenizer, source)
                if extra_files is not None:
                    files |= extra_files(partial)
                remove_stale(directory)
                return commit_checkpoint(partial, directory, 0, files)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        if not existed and not list_with_newer_versions(directory)[0]:
            shutil.rmtree(directory, ignore_errors=True)


def _write_tensors(
    partial: Path, source: WeightsSource, progress: ProgressCallback
) -> FileDigest:
    specs = source.stored_specs()
    with SafetensorsWriter(partial / rank_file_name(0), specs, {"format": "pt"}) as writer:
        for spec in writer.specs:
            kind, _, name = spec.name.partition("/")
            if kind == "weight":
                writer.write_parts(_slices(name, spec, source, progress))
            else:
                writer.write(source.buffer(name).to(spec.dtype))
                progress(spec.nbytes)
        digest = writer.finish()
    fsync_directory(partial)
    return digest


def _slices(
    name: str, spec: TensorSpec, source: WeightsSource, progress: ProgressCallback
) -> Iterator[Tensor]:
    (total,) = spec.shape
    for start in range(0, total, SLICE_ELEMENTS):
        values = source.read(name, start, min(SLICE_ELEMENTS, total - start))
        yield values.to(spec.dtype)
        progress(len(values) * spec.dtype.itemsize)


def _write_json_files(
    partial: Path, config: RunConfig, tokenizer: Tokenizer, source: WeightsSource
) -> dict[str, FileDigest]:
    ranges = []
    for name, shape in source.shapes.items():
        if math.prod(shape):
            ranges.append(ShardRange(name, 0, math.prod(shape)))
    index = make_index([ranges], dict(source.shapes), ["weight"], list(source.buffers))
    state = RunMetadata.of(config, Groups(), tokenizer).to_state()
    state["progress"] = TrainingProgress().to_state()
    counters = {"global_steps": 0, "skipped_steps": 0, "global_samples": 0}
    state["optimizer"] = {"steps": 0, "counters": counters, "scaler": {}}
    texts = {
        "run.json": run_json_text(config),
        "state.json": json.dumps(with_version(state), indent=1) + "\n",
        "index.json": json.dumps(with_version(index)) + "\n",
    }
    return {name: write_with_digest(partial / name, text) for name, text in texts.items()}
