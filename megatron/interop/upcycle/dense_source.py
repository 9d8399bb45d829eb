"""The dense model that is upcycled: a checkpoint of ours or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.directory import is_hf_folder
from megatron.checkpoint.loader import find_checkpoint
from megatron.checkpoint.manifest import HF_FOLDER
from megatron.checkpoint.metadata import RunMetadata
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.engine.zero_shards import GlobalLayout, fill_weights
from megatron.interop.hf.convert import open_hf_model
from megatron.interop.hf.weights import ReadRange
from megatron.interop.model_specs import build_meta_model
from megatron.model.builder import build_run_config_model
from megatron.model.gpt import GPT
from megatron.parallel.groups import Groups
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer


@dataclass(frozen=True)
class DenseSource:
    """A dense model, of which no tensor has been read."""

    path: Path
    """the checkpoint, or the Hugging Face folder"""
    config: RunConfig
    tokenizer: Tokenizer
    vocab_size: int
    """size of the model's vocabulary before padding"""
    shapes: Mapping[str, tuple[int, ...]]
    read: ReadRange
    hf_folder: Path | None = None
    """Hugging Face folder with files of a tokenizer, which the result gets, too"""


def build_dense_model(source: DenseSource) -> GPT:
    """Build the dense model with its weights in fp32, on the GPU if there is one."""
    model = build_run_config_model(source.config, source.vocab_size)
    layout = GlobalLayout.of(model, Groups())
    assert not layout.buffers, f"a dense model has the buffers {layout.buffers}"
    fill_weights(model, layout, source.read, model.state_dict().__getitem__)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def open_dense_source(path: str | Path) -> DenseSource:
    """Open a dense model and check everything but the values of its tensors.

    Args:
        path: directory of checkpoints, of which the newest is taken, one checkpoint, or a Hugging
            Face folder.
    Raises:
        ValueError: the model is not dense, or a file is malformed.
        OSError: a file cannot be read, or there is no valid checkpoint.
    """
    path = Path(path)
    if is_hf_folder(path):
        return _open_hf_folder(path)
    options = CheckpointConfig(load=str(path), finetune=True)
    groups = Groups()
    checkpoint = find_checkpoint(options, groups, required=True)
    config = checkpoint.metadata.config
    _require_dense(config)
    tokenizer = build_tokenizer(config.tokenizer)
    checkpoint.check(RunMetadata.of(config, groups, tokenizer))
    checkpoint.check_sizes()
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    checkpoint.check_model(build_meta_model(config, vocab_size), groups)
    reader = checkpoint.reader

    def read(name: str, start: int, length: int) -> Tensor:
        return reader.read("weight", name, start, length)

    hf_folder = checkpoint.path / HF_FOLDER
    return DenseSource(
        checkpoint.path,
        config,
        tokenizer,
        vocab_size,
        reader.shapes,
        read,
        hf_folder=hf_folder if hf_folder.is_dir() else None,
    )


def _open_hf_folder(path: Path) -> DenseSource:
    model = open_hf_model(path)
    _require_dense(model.config)
    vocab_size = model.config.model.vocab_size
    return DenseSource(
        path,
        model.config,
        model.tokenizer,
        vocab_size,
        model.specs.shapes,
        model.weights.read,
        hf_folder=path,
    )


def _require_dense(config: RunConfig) -> None:
    moe = config.moe
    require(
        moe.num_experts == 0,
        "the number of experts of the model",
        moe.num_experts,
        "0, a dense model",
        f"It is an MoE model with the gate {moe.gate} already; continue its training with --load.",
    )
