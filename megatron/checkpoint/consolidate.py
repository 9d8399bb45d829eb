"""Consolidate a checkpoint of any number of ranks into full tensors, a slice at a time.

<output>/model.safetensors          parameters and buffers under the model's own names; for a large
                                    model model-00001-of-00003.safetensors, ... and
                                    model.safetensors.index.json
<output>/optimizer.safetensors      with --optimizer: exp_avg/<name>, exp_avg_sq/<name>; split like
                                    the model
<output>/run.json                   the run's configuration, usable with --config
<output>/consolidated.json          the source, and the state.json of the checkpoint
<output>/SHA256SUMS                 hashes of all other files, for `sha256sum -c`
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.content import read_config, read_state
from megatron.checkpoint.directory import (
    CheckpointEntry,
    ValidCheckpoint,
    find_newest_valid,
    iteration_of,
    select_checkpoints,
)
from megatron.checkpoint.manifest import find_problems, write_with_digest
from megatron.checkpoint.shards import CheckpointReader
from megatron.config.fields import require
from megatron.config.run_json import run_json_text
from megatron.io.disk_space import require_disk_space
from megatron.io.progress import ProgressCallback, byte_progress_bar, no_progress
from megatron.io.safetensors_writer import SafetensorsWriter, TensorSpec
from megatron.io.sha256 import FileDigest
from megatron.io.staging_dir import staged_folder

WEIGHT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_FORMAT = "moe-megatron consolidated 1"
_SHA256SUMS = "SHA256SUMS"
_JSON_FILES_BYTES = 1 << 20
"""Upper bound of the size of all files without tensors"""
_DECIMAL_UNITS = {f"{prefix}B": 1000**i for i, prefix in enumerate(("", "K", "M", "G", "T"))}
_BINARY_UNITS = {f"{prefix}iB": 1024**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)}
_UNITS = {"": 1, **_DECIMAL_UNITS, **_BINARY_UNITS}


@dataclass(frozen=True)
class ConsolidateOptions:
    """What is written."""

    dtype: torch.dtype = torch.float32
    """Dtype of the parameters; buffers and moments keep theirs"""
    router_dtype: torch.dtype = torch.float32
    """Dtype of the gates' parameters, which training stores in fp32"""
    optimizer: bool = False
    """Whether the two moments of every trained parameter are written, too"""
    max_shard_bytes: int = 5 * 1000**3
    """Largest size of a file, unless one tensor is larger"""


@dataclass(frozen=True)
class ConsolidateResult:
    """What was written."""

    files: dict[str, int]
    """Size of every file in bytes"""
    num_tensors: int
    """Number of tensors in the files of the model"""


def parse_size(text: str) -> int:
    """Parse a size in bytes: "5GB" (10^9 bytes each), "512MiB" (2^20 bytes each) or "1000000".

    Raises:
        ValueError: The text has another form, or means less than a byte.
    """
    size = 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found:
        number, unit = found.groups()
        units = {name.lower(): nbytes for name, nbytes in _UNITS.items()}
        size = int(float(number) * units.get(unit.lower(), 0))
    require(
        size > 0, "--max-shard-size", text, "a number of bytes, such as 5GB, 512MiB or 1000000"
    )
    return size


def find_verified_checkpoint(
    path: Path, step: int = 0, progress: ProgressCallback = no_progress
) -> ValidCheckpoint:
    """Find the newest checkpoint whose files have the hashes of its manifest.

    Args:
        path: Directory of a run's checkpoints, or one checkpoint.
        step: Iteration of the checkpoint in the directory; 0: the newest.
        progress: Called with the bytes of each verified file.

    Raises:
        FileNotFoundError: There is no checkpoint, or none is valid.
        ValueError: The path is one checkpoint, and it is corrupt or a step is given.
    """

    def verify(entry: CheckpointEntry) -> list[str]:
        return find_problems(entry.path, entry.manifest, progress=progress)

    return find_newest_valid(select_checkpoints(path, step), verify)


def open_for_tool(path: str, step: int, prog: str) -> ValidCheckpoint:
    """Find the checkpoint that a program reads, with a progress bar and warnings on stderr.

    Args:
        step: Value of --load-step.
        prog: Name of the program.

    Raises:
        ValueError: The step is negative, or as `find_verified_checkpoint`.
        FileNotFoundError: As `find_verified_checkpoint`.
    """
    require(step >= 0, "--load-step", step, "0 or more")
    with byte_progress_bar("verify") as bar:
        source = find_verified_checkpoint(Path(path), step, bar.update)
    for problem in source.problems:
        print(f"{prog}: warning: {problem}; not used", file=sys.stderr)
    return source


class ConsolidationPlan:
    """Distribution of a checkpoint's tensors over output files.

    Raises:
        ValueError: The moments are requested, but the checkpoint has none.
    """

    def __init__(self, source: Path, options: ConsolidateOptions):
        self.source = source
        self.options = options
        self.reader = CheckpointReader(source)
        model = self._model_specs()
        self.num_tensors = len(model)
        self.files = {"model": split_into_files(model, options.max_shard_bytes)}
        """Tensors of every file, by the stem of its name"""
        if options.optimizer:
            moments = self._moment_specs()
            self.files["optimizer"] = split_into_files(moments, options.max_shard_bytes)

    def _model_specs(self) -> list[TensorSpec]:
        specs = []
        for name, shape in self.reader.shapes.items():
            specs.append(TensorSpec(name, self._weight_dtype(name), shape))
        for name in self.reader.buffers:
            specs.append(self.reader.buffer_spec(name))
        return specs

    def _weight_dtype(self, name: str) -> torch.dtype:
        if is_gate_parameter(name):
            return self.options.router_dtype
        return self.options.dtype

    def _moment_specs(self) -> list[TensorSpec]:
        moment_keys = [key for key in self.reader.state_keys if key != "weight"]
        require(
            bool(moment_keys),
            "--optimizer",
            True,
            "only with a checkpoint that has moments",
            f"{self.source} was saved before the first optimizer step.",
        )
        specs = []
        for key in moment_keys:
            for name, shape in self.reader.shapes.items():
                if name in self.reader.frozen:
                    continue
                specs.append(TensorSpec(f"{key}/{name}", self.reader.dtype(key, name), shape))
        return specs

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        total = 0
        for files in self.files.values():
            for specs in files:
                total += total_bytes(specs)
        return total

    def write(self, folder: Path, progress: ProgressCallback) -> dict[str, FileDigest]:
        """Write the files of tensors and their indices. Returns the digest of every file."""
        written = {}
        for stem, files in self.files.items():
            written |= self._write_files(folder, stem, files, progress)
        return written

    def _write_files(
        self, folder: Path, stem: str, files: list[list[TensorSpec]], progress: ProgressCallback
    ) -> dict[str, FileDigest]:
        written = {}
        weight_map = {}
        for number, specs in enumerate(files, 1):
            name = shard_file_name(stem, number, len(files))
            with SafetensorsWriter(folder / name, specs, {"format": "pt"}) as writer:
                for spec in writer.specs:
                    writer.write_parts(self._slices(spec, stem, progress))
                written[name] = writer.finish()
            for spec in specs:
                weight_map[spec.name] = name
        if len(files) > 1:
            total_size = sum(total_bytes(specs) for specs in files)
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            name = f"{stem}.safetensors.index.json"
            written[name] = write_with_digest(folder / name, json.dumps(index, indent=2) + "\n")
        return written

    def _slices(
        self, spec: TensorSpec, stem: str, progress: ProgressCallback
    ) -> Iterator[Tensor]:
        """Yield a tensor in consecutive slices, in the dtype of its spec."""
        if spec.name in self.reader.buffers:
            yield self.reader.buffer(spec.name)
            progress(spec.nbytes)
            return
        state_key = "weight"
        name = spec.name
        if stem == "optimizer":
            state_key, name = spec.name.split("/", 1)
        for values in self.reader.slices(state_key, name):
            yield cast_checked(values, spec)
            progress(len(values) * spec.dtype.itemsize)


def is_gate_parameter(name: str) -> bool:
    """Return whether a name of a model's parameter is that of a gate's."""
    return ".mlp.gate." in f".{name}"


def shard_file_name(stem: str, number: int, total: int) -> str:
    """Return the name of a file as Hugging Face names them."""
    if total == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{number:05d}-of-{total:05d}.safetensors"


def total_bytes(specs: Sequence[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs)


def split_into_files(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Fill files with consecutive tensors up to a size; a larger tensor has its own file.

    There is one empty file if there are no tensors.
    """
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if files[-1] and size + spec.nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.nbytes
    return files


def cast_checked(values: Tensor, spec: TensorSpec) -> Tensor:
    """Cast values to the dtype of the output.

    Raises:
        ValueError: A finite value becomes infinite.
    """
    cast = values.to(spec.dtype)
    if cast is values or not bool((cast.isinf() & values.isfinite()).any()):
        return cast
    largest = values[values.isfinite()].abs().max().item()
    alternative = "float32"
    if spec.dtype == torch.float16:
        alternative = "bfloat16 or float32"
    flag = "--router-dtype" if is_gate_parameter(spec.name) else "--dtype"
    raise ValueError(
        f"{flag} {str(spec.dtype).removeprefix('torch.')} holds values up to "
        f"{torch.finfo(spec.dtype).max:.5g}, and {spec.name} has one of size {largest:.5g}. "
        f"Use {alternative}"
    )


def check_output(output: Path) -> None:
    """Check that a directory may be written.

    Raises:
        ValueError: It is not empty, or lies where a run would take it for a checkpoint.
    """
    is_empty_directory = output.is_dir() and not any(output.iterdir())
    if output.exists() and not is_empty_directory:
        raise ValueError(
            f"{output} exists; allowed: a new or an empty directory. Remove it, or write to "
            "another one"
        )
    if any(iteration_of(path) is not None for path in (output, *output.parents)):
        raise ValueError(
            f"{output} has a name that belongs to the checkpoints of a run; allowed: any other "
            "directory"
        )


def consolidate(
    source: ValidCheckpoint,
    output: str | Path,
    options: ConsolidateOptions,
    progress: ProgressCallback = no_progress,
    planned: ProgressCallback = no_progress,
) -> ConsolidateResult:
    """Write the full tensors of a checkpoint to a directory, which appears when it is complete.

    Args:
        source: The checkpoint, see `find_verified_checkpoint`.
        progress: Called with the bytes that were written since the last call.
        planned: Called once before, with the bytes that will be written.

    Raises:
        ValueError: The directory is not empty, the checkpoint has no moments, or a weight is
            too large for the dtype.
        OSError: The directory cannot be written, or the disk is too full for it.
    """
    output = Path(output).resolve()
    check_output(output)
    plan = ConsolidationPlan(source.path, options)
    require_disk_space(output, plan.nbytes + _JSON_FILES_BYTES)
    planned(plan.nbytes)
    with staged_folder(output) as partial:
        files = plan.write(partial, progress)
        files |= _write_json_files(partial, source, options)
        _write_sha256sums(partial, files)
    sizes = {name: digest.nbytes for name, digest in files.items()}
    return ConsolidateResult(sizes, plan.num_tensors)


def _write_json_files(
    folder: Path, source: ValidCheckpoint, options: ConsolidateOptions
) -> dict[str, FileDigest]:
    """Write run.json and consolidated.json. Returns their digests."""
    about = _describe_source(source, options)
    texts = {
        "run.json": run_json_text(read_config(source.path)),
        "consolidated.json": json.dumps(about, indent=1) + "\n",
    }
    return {name: write_with_digest(folder / name, text) for name, text in texts.items()}


def _describe_source(source: ValidCheckpoint, options: ConsolidateOptions) -> dict[str, Any]:
    """Return the content of consolidated.json."""
    return {
        "format": _FORMAT,
        "checkpoint": source.path.name,
        "manifest_checksum": source.manifest["checksum"],
        "dtype": str(options.dtype).removeprefix("torch."),
        "router_dtype": str(options.router_dtype).removeprefix("torch."),
        "optimizer": options.optimizer,
        "state": read_state(source.path),
    }


def _write_sha256sums(folder: Path, files: dict[str, FileDigest]) -> None:
    lines = [f"{digest.sha256}  {name}\n" for name, digest in sorted(files.items())]
    write_with_digest(folder / _SHA256SUMS, "".join(lines))
