"""The folder `hf/` of a checkpoint: what a Hugging Face model had besides our tensors.

config.json, generation_config.json and files of the tokenizer, as they were
layout.json         files, names, dtypes and order of the source's tensors
kept.safetensors    tensors that our model does not have, such as those of layers that predict
                    further tokens; written back on export
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.manifest import (
    CorruptCheckpointError,
    copy_with_digest,
    write_with_digest,
)
from megatron.config.fields import shortened
from megatron.interop.hf.file_tensor import FileTensor, read_file_tensors
from megatron.interop.hf.source import CONFIG, HFSource
from megatron.interop.hf.weights import slices
from megatron.io.atomic_write import fsync_directory
from megatron.io.safetensors_writer import (
    SAFETENSORS_DTYPES,
    TORCH_DTYPES,
    SafetensorsWriter,
    TensorSpec,
)
from megatron.io.sha256 import FileDigest
from megatron.io.untrusted import read_json_file

LAYOUT = "layout.json"
KEPT = "kept.safetensors"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of tokenizers, of which every model has a few"""
COPIED_FILES = (GENERATION_CONFIG, *TOKENIZER_FILES)
_FORMAT = "moe-megatron hf layout 1"


@dataclass(frozen=True)
class StoredLayout:
    """Content of layout.json."""

    family: str
    files: dict[str, list[tuple[str, torch.dtype]]]
    """Name and dtype of the tensors of each file, in order"""
    index_metadata: dict[str, Any] | None
    """"metadata" of the index; None: there is no index"""

    @staticmethod
    def of(source: HFSource, dropped: Sequence[str]) -> StoredLayout:
        """Describe a source, without the tensors that are dropped."""
        files: dict[str, list[tuple[str, torch.dtype]]] = {name: [] for name in source.files}
        for name, tensor in source.tensors.items():
            if name not in dropped:
                files[tensor.file].append((name, tensor.dtype))
        return StoredLayout(source.family.name, files, source.index_metadata)

    def to_json(self) -> str:
        """Return the content of the file."""
        files = {}
        for file, tensors in self.files.items():
            files[file] = [[name, SAFETENSORS_DTYPES[dtype]] for name, dtype in tensors]
        content = {
            "format": _FORMAT,
            "family": self.family,
            "index_metadata": self.index_metadata,
            "files": files,
        }
        return json.dumps(content, indent=1) + "\n"


def read_layout(path: Path) -> StoredLayout:
    """Read layout.json.

    Raises:
        CorruptCheckpointError: It has not the content that this version writes.
    """
    try:
        content = read_json_file(path)
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {shortened(content['format'])}")
        files = {}
        for file, tensors in content["files"].items():
            if "/" in file or not file.endswith(".safetensors"):
                raise ValueError(f"it names the file {shortened(file)}")
            files[file] = [(str(name), TORCH_DTYPES[dtype]) for name, dtype in tensors]
        return StoredLayout(str(content["family"]), files, content["index_metadata"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error}") from None


def files_to_copy(folder: Path, names: Sequence[str] = COPIED_FILES) -> list[str]:
    """Return which of some files a folder has."""
    return [name for name in names if (folder / name).is_file()]


def write_hf_folder(
    target: Path, source: HFSource, kept: Sequence[str], dropped: Sequence[str]
) -> dict[str, FileDigest]:
    """Write the folder of a source.

    Args:
        target: The folder, which is made.
        kept: Names of the tensors that are kept aside.
        dropped: Names of the tensors that are dropped.

    Returns:
        The digest of every file by name.
    """
    target.mkdir()
    config = {key: v for key, v in source.config.items() if key != "quantization_config"}
    layout = StoredLayout.of(source, dropped)
    digests = {
        CONFIG: write_with_digest(target / CONFIG, json.dumps(config, indent=2) + "\n"),
        LAYOUT: write_with_digest(target / LAYOUT, layout.to_json()),
    }
    for name in files_to_copy(source.folder):
        digests[name] = copy_with_digest(source.folder / name, target / name)
    if kept:
        digests[KEPT] = _write_kept(target / KEPT, source, kept)
    fsync_directory(target)
    return digests


def _write_kept(path: Path, source: HFSource, names: Sequence[str]) -> FileDigest:
    specs = []
    for name in names:
        tensor = source.tensors[name]
        specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
    with SafetensorsWriter(path, specs, {"format": "pt"}) as writer:
        for spec in writer.specs:
            tensor = source.tensors[spec.name]
            numel = spec.nbytes // spec.dtype.itemsize
            writer.write_parts(tensor.read(*part).to(spec.dtype) for part in slices(numel))
        return writer.finish()


def read_kept(folder: Path) -> Mapping[str, FileTensor]:
    """Return the tensors that are kept aside, by name."""
    if not (folder / KEPT).is_file():
        return {}
    return read_file_tensors(folder / KEPT)
