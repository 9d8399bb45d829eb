"""Write a checkpoint of ours as a Hugging Face folder, a slice of a tensor at a time.

A checkpoint that came from a Hugging Face folder, or whose run did, is written with the files,
names, order and dtypes of that folder; another one as its family is usually stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.consolidate import (
    cast_checked,
    check_output,
    shard_file_name,
    split_into_files,
    total_bytes,
)
from megatron.checkpoint.content import (
    read_config,
    read_state,
    with_typed_expert_options,
    with_typed_gate_options,
)
from megatron.checkpoint.directory import ValidCheckpoint
from megatron.checkpoint.manifest import HF_FOLDER, copy_with_digest
from megatron.checkpoint.shards import CheckpointReader
from megatron.config.schema import RunConfig
from megatron.interop.hf.config_map import config_json_of
from megatron.interop.hf.export_config import merged_config
from megatron.interop.hf.export_tokenizer import special_token_ids, write_tokenizer
from megatron.interop.hf.family import Family
from megatron.interop.hf.file_tensor import FileTensor
from megatron.interop.hf.hf_folder import (
    GENERATION_CONFIG,
    LAYOUT,
    StoredLayout,
    files_to_copy,
    read_kept,
    read_layout,
)
from megatron.interop.hf.registry import choose_family
from megatron.interop.hf.source import CONFIG, INDEX, read_config_json
from megatron.interop.hf.tensor_map import TensorMap, find_layout, map_tensors
from megatron.interop.hf.weights import EMBEDDING, OUTPUT_WEIGHT, HFTensors, slices
from megatron.io.atomic_write import write_text
from megatron.io.disk_space import require_disk_space
from megatron.io.progress import ProgressCallback, no_progress
from megatron.io.safetensors_writer import SafetensorsWriter, TensorSpec
from megatron.io.staging_dir import staged_folder
from megatron.log import get_logger

_OTHER_FILES_BYTES = 64 << 20
"""Upper bound of the size of all files without tensors"""
_DTYPE_OF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ExportOptions:
    """What is written."""

    family: str = "auto"
    """model_type, or auto: that of the Hugging Face folder from which the checkpoint came, else
    the first that expresses the model"""
    dtype: torch.dtype | None = None
    """Dtype of the parameters; None: that of the folder from which the checkpoint came, else the
    compute dtype of the training. Buffers, such as expert biases, stay fp32"""
    max_shard_bytes: int | None = None
    """Largest size of a file, unless one tensor is larger; None: the files of the folder from
    which the checkpoint came, else 5 GB"""


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    family: str
    num_tensors: int
    files: list[str]
    """Names of the files of weights"""
    nbytes: int
    """Size of the tensors in bytes"""


DEFAULT_SHARD_BYTES = 5 * 1000**3


class ExportPlan:
    """Tensors and files of a Hugging Face folder for a checkpoint.

    Args:
        source: Directory of the checkpoint, whose files were verified.

    Raises:
        ValueError: The family cannot express the model.
    """

    def __init__(self, source: Path, options: ExportOptions):
        self.options = options
        self.reader = CheckpointReader(source)
        self.hf_folder = source / HF_FOLDER
        self.stored = self._stored_layout()
        self.config = _checkpoint_config(source, self.reader)
        stored_family = self.stored.family if self.stored else ""
        self.family: Family = choose_family(options.family, self.config, stored_family)
        if stored_family != self.family.name:
            self.stored = None
        if self.family.pads_vocabulary:
            self.config = _with_vocab_size(self.config, _unpadded_vocab_size(source))
        config_json_of(self.family, self.config)  # refuses what the family cannot express
        shapes = self._our_shapes()
        names = self._stored_names()
        layout = find_layout(self.family, shapes, names)
        self.map: TensorMap = map_tensors(self.family, layout, shapes)
        self.kept: Mapping[str, FileTensor] = {}
        if self.stored is not None:
            self.kept = read_kept(self.hf_folder)
        self.shapes = self._their_shapes(names)
        self.files = self._plan_files()
        """Tensors of every file, by its name"""
        self._tensors = HFTensors(self.map, self.config, self._read)

    def _stored_layout(self) -> StoredLayout | None:
        if not (self.hf_folder / LAYOUT).is_file():
            return None
        return read_layout(self.hf_folder / LAYOUT)

    def _stored_names(self) -> set[str]:
        names: set[str] = set()
        if self.stored is not None:
            for tensors in self.stored.files.values():
                names.update(name for name, _ in tensors)
        return names

    def _our_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = dict(self.reader.shapes)
        for name in self.reader.buffers:
            shapes[name] = self.reader.buffer_spec(name).shape
        return shapes

    def _their_shapes(self, stored_names: set[str]) -> dict[str, tuple[int, ...]]:
        shapes = dict(self.map.shapes)
        for name, tensor in self.kept.items():
            shapes[name] = tensor.shape
        if OUTPUT_WEIGHT in stored_names and OUTPUT_WEIGHT not in shapes:
            shapes[OUTPUT_WEIGHT] = shapes[self._embedding]
        return shapes

    @property
    def _embedding(self) -> str:
        return self.map.ours[EMBEDDING][0].theirs

    def _plan_files(self) -> dict[str, list[TensorSpec]]:
        if self.stored is not None and self._stored_names() != set(self.shapes):
            get_logger().info(
                "the tensors are not those of the folder from which the model came: "
                "they are written to files of their own"
            )
            self.stored = None
        specs = {}
        if self.stored is not None:
            for file, tensors in self.stored.files.items():
                specs[file] = [self._spec(name, dtype) for name, dtype in tensors]
            if self.options.max_shard_bytes is None:
                return specs
        ordered = [spec for tensors in specs.values() for spec in tensors]
        if not ordered:
            ordered = [self._spec(name) for name in self.shapes]
        limit = self.options.max_shard_bytes or DEFAULT_SHARD_BYTES
        files = split_into_files(ordered, limit)
        return {
            shard_file_name("model", number, len(files)): tensors
            for number, tensors in enumerate(files, 1)
        }

    def _spec(self, name: str, stored: torch.dtype | None = None) -> TensorSpec:
        return TensorSpec(name, self._dtype(name, stored), self.shapes[name])

    def _dtype(self, name: str, stored: torch.dtype | None) -> torch.dtype:
        if name in self.kept:
            return self.kept[name].dtype
        links = self.map.theirs.get(name, [])
        if links and links[0].ours in self.reader.buffers:
            return stored or self.reader.buffer_spec(links[0].ours).dtype
        if links and re.fullmatch(self.family.fp32_tensors, links[0].ours):
            return stored or torch.float32
        return self.options.dtype or stored or self.default_dtype

    @property
    def default_dtype(self) -> torch.dtype:
        """Dtype of the training's computation."""
        return _DTYPE_OF_PRECISION[self.config.optimizer.precision]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(total_bytes(specs) for specs in self.files.values())

    def config_json(self) -> dict[str, Any]:
        """Return the content of config.json.

        Raises:
            ValueError: The family cannot express the model.
        """
        content = config_json_of(self.family, self.config)
        dtype = self.options.dtype or self.default_dtype
        content["dtype"] = str(dtype).removeprefix("torch.")
        if self.stored is None:
            return content | special_token_ids(self.config.tokenizer)
        original = read_config_json(self.hf_folder)
        merged = merged_config(self.family, original, self.config)
        if self.options.dtype is not None:
            merged.pop("torch_dtype", None)
            merged["dtype"] = content["dtype"]
        return merged

    def write_tensors(self, folder: Path, progress: ProgressCallback) -> None:
        """Write the files of weights, and their index if there are several or there was one."""
        weight_map = {}
        for file, specs in self.files.items():
            with SafetensorsWriter(folder / file, specs, {"format": "pt"}) as writer:
                for spec in writer.specs:
                    writer.write_parts(self._parts(spec, progress))
                writer.finish()
            weight_map |= {spec.name: file for spec in specs}
        metadata: dict[str, Any] = {}
        is_indexed = len(self.files) > 1
        if self.stored is not None and self.options.max_shard_bytes is None:
            metadata = self.stored.index_metadata or {}
            is_indexed = self.stored.index_metadata is not None
        if is_indexed:
            metadata = {**metadata, "total_size": self.nbytes}
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _parts(self, spec: TensorSpec, progress: ProgressCallback) -> Iterator[Tensor]:
        """Yield a tensor of theirs in consecutive ranges, in the dtype of its spec."""
        for values in self._values(spec):
            if values.dtype.is_floating_point and values.dtype != spec.dtype:
                values = cast_checked(values, spec)
            yield values
            progress(values.numel() * spec.dtype.itemsize)

    def _values(self, spec: TensorSpec) -> Iterator[Tensor]:
        if spec.name in self.kept:
            tensor = self.kept[spec.name]
            for start, length in slices(tensor.numel):
                yield tensor.read(start, length)
        elif spec.name in self.map.theirs:
            yield from self._tensors.parts(spec.name)
        else:  # the output layer, which is tied
            yield from self._tensors.parts(self._embedding)

    def _read(self, name: str, start: int, length: int) -> Tensor:
        if name in self.reader.buffers:
            return self.reader.buffer(name).reshape(-1)[start : start + length]
        return self.reader.read("weight", name, start, length)


def _checkpoint_config(source: Path, reader: CheckpointReader) -> RunConfig:
    """Return the configuration of a checkpoint with the vocabulary size of its model."""
    config = with_typed_gate_options(read_config(source), source)
    config = with_typed_expert_options(config, source)
    vocab_size = _unpadded_vocab_size(source)
    if EMBEDDING in reader.shapes:
        vocab_size = reader.shapes[EMBEDDING][0]
    return _with_vocab_size(config, vocab_size)


def _unpadded_vocab_size(source: Path) -> int:
    """Return the vocabulary size of a checkpoint's model before padding."""
    stored = read_config(source).model.vocab_size
    return stored or read_state(source)["identity"]["tokenizer_vocab_size"]


def _with_vocab_size(config: RunConfig, vocab_size: int) -> RunConfig:
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def convert_to_hf(
    source: ValidCheckpoint,
    output: str | Path,
    options: ExportOptions,
    progress: ProgressCallback = no_progress,
    planned: ProgressCallback = no_progress,
) -> ExportResult:
    """Write a checkpoint as a Hugging Face folder, which appears when it is complete.

    Args:
        source: The checkpoint, see `consolidate.find_verified_checkpoint`.
        progress: Called with the bytes that were written since the last call.
        planned: Called once before, with the bytes that will be written.

    Raises:
        ValueError: The family cannot express the model, the directory is not empty, or a weight
            is too large for the dtype.
        OSError: The directory cannot be written, or the disk is too full for it.
    """
    output = Path(output).resolve()
    check_output(output)
    plan = ExportPlan(source.path, options)
    config_json = plan.config_json()
    require_disk_space(output, plan.nbytes + _OTHER_FILES_BYTES)
    planned(plan.nbytes)
    with staged_folder(output) as partial:
        plan.write_tensors(partial, progress)
        write_text(partial / CONFIG, json.dumps(config_json, indent=2) + "\n")
        for name in files_to_copy(plan.hf_folder, (GENERATION_CONFIG,)):
            copy_with_digest(plan.hf_folder / name, partial / name)
        write_tokenizer(plan.config.tokenizer, plan.hf_folder, partial)
    return ExportResult(plan.family.name, len(plan.shapes), list(plan.files), plan.nbytes)
