"""Convert a Hugging Face folder to a checkpoint of ours, a slice of a tensor at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.manifest import HF_FOLDER, copy_with_digest
from megatron.checkpoint.weights_only import (
    ExtraFiles,
    WeightsSource,
    require_no_checkpoints,
    write_weights_checkpoint,
)
from megatron.config.fields import require
from megatron.config.schema import RunConfig, TokenizerConfig
from megatron.interop.hf.config_map import run_config_of
from megatron.interop.hf.family import Family
from megatron.interop.hf.hf_folder import (
    COPIED_FILES,
    TOKENIZER_FILES,
    files_to_copy,
    write_hf_folder,
)
from megatron.interop.hf.source import HFSource
from megatron.interop.hf.tokenizer_choice import build_checked, choose_tokenizer, moved
from megatron.interop.hf.weights import HFWeights
from megatron.interop.model_specs import ModelSpecs, model_specs
from megatron.io.progress import ProgressCallback, no_progress
from megatron.io.sha256 import FileDigest
from megatron.tokenizer.base import Tokenizer

_LARGEST_EXCESS = 4
"""A model with this many times the parameters that its files hold is a mistake of config.json"""
_SMALL_MODEL = 1 << 24


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face folder whose config and tensors have been mapped; no tensor is read yet."""

    source: HFSource
    config: RunConfig
    """Configuration of the model; its tokenizer has the folder's files"""
    tokenizer: Tokenizer
    specs: ModelSpecs
    weights: HFWeights
    """Our tensors, read from the folder"""

    def write_origin(self, checkpoint: Path) -> dict[str, FileDigest]:
        """Write what a checkpoint needs to be exported as its origin was: the folder `hf/`.

        Args:
            checkpoint: Unfinished directory of the checkpoint.

        Returns:
            The digest of every file by path in the checkpoint.

        Raises:
            OSError: A file cannot be read or written.
        """
        unused = self.weights.unused
        target = checkpoint / HF_FOLDER
        digests = write_hf_folder(target, self.source, unused.kept, unused.dropped)
        return {f"{HF_FOLDER}/{name}": digest for name, digest in digests.items()}


@dataclass(frozen=True)
class ConvertResult:
    """What was written."""

    path: Path
    """Directory of the checkpoint"""
    family: str
    num_tensors: int
    """Number of tensors of the source that the checkpoint has"""
    num_parameters: int
    kept: list[str]
    """Tensors that are kept aside"""
    dropped: list[str]
    """Tensors that are dropped, as the family says"""


def folder_config(
    folder: Path,
    family: Family,
    content: Mapping[str, Any],
    tokenizer: TokenizerConfig | None = None,
) -> RunConfig:
    """Return the configuration of a folder's model, with the tokenizer of its files.

    Args:
        content: Content of its config.json.
        tokenizer: Another tokenizer than the folder's.

    Raises:
        ValueError: A key of config.json is missing, unknown or has a value that is refused.
    """
    config = run_config_of(family, content, tokenizer)
    if tokenizer is not None:
        return config
    vocab = {"vocab_size": config.model.vocab_size}
    return replace(
        config, tokenizer=choose_tokenizer(folder, {**content, **vocab}, config.tokenizer)
    )


def open_hf_model(folder: str | Path, tokenizer: TokenizerConfig | None = None) -> HFModel:
    """Open a Hugging Face folder and check everything but the values of its tensors.

    Args:
        tokenizer: Another tokenizer than the folder's.

    Raises:
        ValueError: A file, a key of config.json or a tensor is missing, malformed or unknown.
        OSError: A file cannot be read.
    """
    source = HFSource(folder)
    config = folder_config(source.folder, source.family, source.config, tokenizer)
    vocab_size = config.model.vocab_size
    built = build_checked(config.tokenizer, vocab_size)
    specs = model_specs(config, vocab_size)
    _require_possible_size(specs, source)
    weights = HFWeights(source, config, specs.all_shapes)
    return HFModel(source, config, built, specs, weights)


def _require_possible_size(specs: ModelSpecs, source: HFSource) -> None:
    """Refuse a config.json whose model is far larger than its files, before it is mapped.

    Smaller differences are missing tensors, which are found and named one by one.
    """
    held = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    require(
        specs.num_parameters <= _LARGEST_EXCESS * held + _SMALL_MODEL,
        "the model of config.json",
        f"{specs.num_parameters} parameters",
        f"about the {held} elements that its files hold",
        "Correct config.json, or download the model's files again.",
    )


def convert_from_hf(
    folder: str | Path,
    output: str | Path,
    progress: ProgressCallback = no_progress,
    planned: ProgressCallback = no_progress,
) -> ConvertResult:
    """Convert a Hugging Face folder to a new directory of checkpoints with one of iteration 0.

    Args:
        progress: Called with the bytes that were written since the last call.
        planned: Called once before, with the bytes that will be written.

    Raises:
        ValueError: As `open_hf_model`, or the output is not empty.
        OSError: A file cannot be read or written, or the disk is too full.
    """
    output = Path(output).resolve()
    require_no_checkpoints(output)
    model = open_hf_model(folder)
    unused = model.weights.unused
    source = WeightsSource(
        model.specs.shapes, model.specs.buffers, model.weights.read, model.weights.buffer
    )

    planned(source.nbytes)
    path = write_converted_checkpoint(
        output,
        model.config,
        model.tokenizer,
        source,
        tokenizer_source=model.source.folder,
        extra_files=model.write_origin,
        extra_bytes=_extra_bytes(model),
        progress=progress,
    )
    return ConvertResult(
        path,
        model.source.family.name,
        len(model.weights.map.shapes),
        model.specs.num_parameters,
        unused.kept,
        unused.dropped,
    )


def write_converted_checkpoint(
    output: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    source: WeightsSource,
    *,
    tokenizer_source: Path | None,
    extra_files: ExtraFiles,
    extra_bytes: int,
    progress: ProgressCallback = no_progress,
) -> Path:
    """Write a new directory of checkpoints with one of iteration 0 and the tokenizer.

    The tokenizer's files are copied to `OUTPUT/tokenizer`, because a training run that continues
    there may delete the checkpoint of iteration 0.

    Args:
        output: Absolute path of a directory without checkpoints.
        tokenizer_source: Folder whose tokenizer files the configuration names; None if it names
            files elsewhere, which are not copied.
        extra_files: Writes further files into the unfinished checkpoint and returns their digests.
        extra_bytes: Size of those files.

    Returns:
        The directory of the checkpoint.

    Raises:
        ValueError: The directory is not empty, or another process writes to it.
        OSError: A file cannot be read or written, or the disk is too full.
    """
    folder = output / "tokenizer"
    if tokenizer_source is not None:
        config = replace(config, tokenizer=moved(config.tokenizer, folder))

    with ExitStack() as on_failure:

        def write_files(partial: Path) -> dict[str, FileDigest]:
            names = files_to_copy(tokenizer_source, TOKENIZER_FILES) if tokenizer_source else []
            if names:
                folder.mkdir()
                on_failure.callback(shutil.rmtree, folder, ignore_errors=True)
            for name in names:
                copy_with_digest(tokenizer_source / name, folder / name)
            return extra_files(partial)

        path = write_weights_checkpoint(
            output,
            config,
            tokenizer,
            source,
            extra_files=write_files,
            extra_bytes=extra_bytes,
            progress=progress,
        )
        on_failure.pop_all()
    return path


def _extra_bytes(model: HFModel) -> int:
    """Return the size of the files that are copied, and of the tensors that are kept aside."""
    total = 0
    for name in files_to_copy(model.source.folder, COPIED_FILES):
        total += (model.source.folder / name).stat().st_size
    for name in model.weights.unused.kept:
        tensor = model.source.tensors[name]
        size = tensor.dtype.itemsize
        for length in tensor.shape:
            size *= length
        total += size
    return total
