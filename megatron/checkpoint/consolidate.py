"""One folder of whole tensors from a checkpoint of any number of ranks, a slice of a tensor in memory at a time.

<output>/model.safetensors          parameters and buffers under the model's own names; or, when there is more of
                                    them, model-00001-of-00003.safetensors ... and model.safetensors.index.json
<output>/optimizer.safetensors      if asked for: exp_avg/<name>, exp_avg_sq/<name>; split in the same way
<output>/run.json                   the run's configuration, fit for --config
<output>/consolidated.json          from what it was made, and the checkpoint's state.json
<output>/SHA256SUMS                 of all other files, for `sha256sum -c`
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import directory
from megatron.checkpoint.reader import CheckpointReader
from megatron.config.schema import require
from megatron.io.atomic_write import fsync_directory
from megatron.io.progress import ProgressCallback as Progress
from megatron.io.safetensors_writer import SafetensorsWriter, TensorSpec
from megatron.io.staging_dir import StagingDir

FORMAT = "moe-megatron consolidated 1"
SUMS = "SHA256SUMS"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL_FILES = 1 << 20  # bytes that all files without tensors surely fit in
UNITS = {
    "": 1,
    **{prefix + "B": 1000**i for i, prefix in enumerate(("", "K", "M", "G", "T"))},
    **{prefix + "iB": 1024**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)},
}


@dataclass(frozen=True)
class ConsolidateOptions:
    """What is written."""

    dtype: torch.dtype = torch.float32
    """of the parameters; buffers and moments stay what they are"""
    optimizer: bool = False
    """the two moments, too"""
    max_shard_bytes: int = 5 * 1000**3
    """of a file, unless one tensor is larger"""


@dataclass(frozen=True)
class ConsolidateResult:
    """What was written."""

    files: dict[str, int]
    """bytes of every file"""
    tensors: int
    """in the files of the model"""


def parse_size(text: str) -> int:
    """Bytes of "5GB" (10^9 each), "512MiB" (2^20 each) or "1000000".

    Raises:
        ValueError: it is none of these, or less than a byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = (
        {u.lower(): size for u, size in UNITS.items()}.get(found.group(2).lower())
        if found
        else None
    )
    size = int(float(found.group(1)) * unit) if unit else 0
    require(
        size > 0, "--max-shard-size", text, "a number of bytes, such as 5GB, 512MiB or 1000000"
    )
    return size


def find_valid_checkpoint(
    path: Path, step: int = 0, progress: Progress = lambda read: None
) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint that is meant, its files verified.

    Args:
        path: the folder of a run's checkpoints, of which the newest whole one is meant, or a checkpoint itself.
        step: iteration of the one in the folder; 0: the newest.
        progress: called with the bytes just verified.

    Returns:
        (the checkpoint, its manifest, what is wrong with those that were passed over).

    Raises:
        FileNotFoundError: there is no such folder, or no checkpoint in it.
        ValueError: the checkpoint is not whole, or no whole one is there.
    """
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder; allowed: the folder of --save, or a checkpoint in it"
        )
    if directory.is_checkpoint(path):
        require(
            not step,
            "--load-step",
            step,
            "only with the folder of the checkpoints",
            f"{path} is one checkpoint.",
        )
        path = path.resolve()
        manifest = directory.read_manifest(path)
        _verify(path, manifest, progress)
        return path, manifest, []
    good, bad = directory.list_checkpoints(path)
    if step:
        good = [found for found in good if found[1]["iteration"] == step]
        bad = [text for text in bad if directory.checkpoint_name(step) in text]
    for candidate, manifest in good:
        try:
            _verify(candidate, manifest, progress)
        except directory.CorruptCheckpointError as error:
            bad.append(str(error))
            continue
        return candidate, manifest, bad
    what = f"no whole checkpoint of iteration {step}" if step else "no whole checkpoint"
    why = f": {'; '.join(bad)}" if bad else ""
    raise FileNotFoundError(
        f"{path} has {what}{why}. Give the folder of --save of a run, or one checkpoint of it"
    )


def _verify(path: Path, manifest: dict[str, Any], progress: Progress) -> None:
    for name, (size, _) in manifest["files"].items():
        directory.check_files(path, [name], manifest)
        progress(size)


class ConsolidatedLayout:
    """Which tensors of a checkpoint go into which files.

    Raises:
        ValueError: the moments are asked for and there are none.
    """

    def __init__(self, source: Path, options: ConsolidateOptions):
        self.source, self.options, self.shards = source, options, CheckpointReader(source)
        shapes = self.shards.shapes
        model = [TensorSpec(name, options.dtype, shape) for name, shape in shapes.items()]
        model += [self.shards.buffer_entry(name) for name in self.shards.buffers]
        self.tensors = len(model)
        self.groups = {"model": _split(model, options.max_shard_bytes)}
        if options.optimizer:
            moments = [kind for kind in self.shards.kinds if kind != "weight"]
            require(
                bool(moments),
                "--optimizer",
                True,
                "only with a checkpoint that has moments",
                f"{source} was saved before the first optimizer step.",
            )
            entries = [
                TensorSpec(f"{kind}/{name}", self.shards.dtype(kind, name), shape)
                for kind in moments
                for name, shape in shapes.items()
            ]
            self.groups["optimizer"] = _split(entries, options.max_shard_bytes)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(
            e.nbytes for files in self.groups.values() for entries in files for e in entries
        )

    def write(self, folder: Path, progress: Progress) -> dict[str, tuple[int, str]]:
        """Write the files of tensors and their indices; returns (bytes, SHA-256) of each."""
        written = {}
        for stem, files in self.groups.items():
            where = {}
            for i, entries in enumerate(files):
                part = f"-{i + 1:05d}-of-{len(files):05d}" if len(files) > 1 else ""
                name = f"{stem}{part}.safetensors"
                where.update(dict.fromkeys((e.name for e in entries), name))
                with SafetensorsWriter(folder / name, entries, {"format": "pt"}) as writer:
                    for entry in writer.entries:
                        writer.write_parts(self._slices(entry, stem == "optimizer", progress))
                    written[name] = writer.finish()
            if len(files) > 1:
                total = sum(e.nbytes for entries in files for e in entries)
                index = {"metadata": {"total_size": total}, "weight_map": where}
                name = f"{stem}.safetensors.index.json"
                written[name] = directory.write_text(
                    folder / name, json.dumps(index, indent=2) + "\n"
                )
        return written

    def _slices(self, entry: TensorSpec, moment: bool, progress: Progress) -> Iterator[Tensor]:
        if entry.name in self.shards.buffers:
            yield self.shards.buffer(entry.name)
            progress(entry.nbytes)
            return
        kind, name = entry.name.split("/", 1) if moment else ("weight", entry.name)
        for values in self.shards.slices(kind, name):
            yield _cast(values, entry)
            progress(len(values) * entry.dtype.itemsize)


def _split(entries: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Consecutive tensors, as many to a file as fit; one that fits nowhere has its own. One file if there are none."""
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    return files


def _cast(values: Tensor, entry: TensorSpec) -> Tensor:
    cast = values.to(entry.dtype)
    if cast is not values and bool((cast.isinf() & values.isfinite()).any()):
        largest = values[values.isfinite()].abs().max().item()
        raise ValueError(
            f"--dtype {str(entry.dtype).removeprefix('torch.')} holds values up to "
            f"{torch.finfo(entry.dtype).max:.5g}, and {entry.name} has one of size {largest:.5g}. Use "
            f"{'bfloat16 or float32' if entry.dtype == torch.float16 else 'float32'}"
        )
    return cast


def check_output(output: Path) -> None:
    """Whether a folder may be written: it is not there or empty, and not a place where a run would trip over it.

    Raises:
        ValueError: it may not.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(
            f"{output} exists; allowed: a new or an empty folder. Remove it, or write to another one"
        )
    if any(directory.iteration_of(folder) is not None for folder in (output, *output.parents)):
        raise ValueError(
            f"{output} is a place that belongs to the checkpoints of a run; allowed: any other folder"
        )


def consolidate(
    source: Path,
    manifest: dict[str, Any],
    output: str | Path,
    options: ConsolidateOptions,
    progress: Progress = lambda written: None,
    planned: Progress = lambda total: None,
) -> ConsolidateResult:
    """Write the tensors of a checkpoint, whole, to a folder, which appears when all is in it.

    Args:
        source: the checkpoint, as `find` returns it.
        progress: called with the bytes just written.
        planned: called once before, with all bytes that will be.

    Raises:
        ValueError: the folder is not empty, the checkpoint has no moments, or a weight is too large for the dtype.
        OSError: the folder cannot be written, or the disk is too full for it.
    """
    output = Path(output).resolve()
    check_output(output)
    plan = ConsolidatedLayout(source, options)
    require_space(output, plan.nbytes + SMALL_FILES)
    planned(plan.nbytes)
    with StagingDir(output) as work:
        partial = work.path / "folder"
        shutil.rmtree(partial, ignore_errors=True)  # of a killed program
        partial.mkdir()
        try:
            files = plan.write(partial, progress)
            for name, text in (
                ("run.json", (source / "run.json").read_text(encoding="utf-8")),
                (
                    "consolidated.json",
                    json.dumps(_about(source, manifest, options), indent=1) + "\n",
                ),
            ):
                files[name] = directory.write_text(partial / name, text)
            directory.write_text(
                partial / SUMS,
                "".join(f"{sha}  {name}\n" for name, (_, sha) in sorted(files.items())),
            )
            fsync_directory(partial)
            os.rename(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    fsync_directory(output.parent)
    return ConsolidateResult({name: size for name, (size, _) in files.items()}, plan.tensors)


def require_space(output: Path, needed: int) -> None:
    """Raise OSError unless so many bytes fit on the disk of a folder that is yet to be made."""
    folder = next(parent for parent in output.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{output} needs {needed / 1e6:,.1f} MB, the disk of {folder} has {free / 1e6:,.1f} MB left. "
            "Make room there, or choose another disk"
        )


def _about(
    source: Path, manifest: dict[str, Any], options: ConsolidateOptions
) -> dict[str, Any]:
    """Content of consolidated.json."""
    return {
        "format": FORMAT,
        "checkpoint": source.name,
        "manifest_checksum": manifest["checksum"],
        "dtype": str(options.dtype).removeprefix("torch."),
        "optimizer": options.optimizer,
        "state": directory.read_json(source / "state.json"),
    }
