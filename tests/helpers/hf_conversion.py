"""Our models from Hugging Face folders and back, for comparisons with transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.consolidate import find_verified_checkpoint
from megatron.checkpoint.weights_only import WeightsSource, write_weights_checkpoint
from megatron.config.schema import RunConfig
from megatron.interop.hf.convert import HFModel, open_hf_model
from megatron.interop.hf.export import ExportOptions, convert_to_hf
from megatron.interop.hf.weights import HFWeights, read_from
from megatron.model.builder import build_run_config_model
from megatron.model.gpt import GPT


@dataclass(frozen=True)
class Imported:
    """Our model of a Hugging Face folder."""

    source: HFModel
    model: GPT

    @property
    def weights(self) -> HFWeights:
        """Our tensors in the folder."""
        return self.source.weights


def import_model(folder: Path) -> Imported:
    """Build our model of a folder with its weights, in fp32."""
    source = open_hf_model(folder)
    model = build_our_model(source.config)
    load_weights(model, source.weights)
    return Imported(source, model)


def build_our_model(config: RunConfig, vocab_size: int = 0) -> GPT:
    """Build a model with initial weights, by default of the vocabulary of its configuration."""
    return build_run_config_model(config, vocab_size or config.model.vocab_size)


@torch.no_grad()
def load_weights(model: GPT, weights: HFWeights) -> None:
    """Copy the tensors of a folder into a model."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.copy_(read_tensor(weights, name))


def read_tensor(weights: HFWeights, name: str) -> Tensor:
    """Return a full tensor of ours."""
    shape = weights.shapes[name]
    return weights.read(name, 0, math.prod(shape)).view(shape)


def our_logits(model: GPT, tokens_BS: Tensor) -> Tensor:
    """Return the logits [B, S, V] in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(tokens_BS).logits


def our_gradients(model: GPT, tokens_BS: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the mean next-token cross-entropy by name of the parameter."""
    model.train()
    model.zero_grad()
    labels_BS = tokens_BS.roll(-1, dims=1)
    mask_BS = torch.ones(tokens_BS.shape)
    mask_BS[:, -1] = 0
    model(tokens_BS, labels_BS, loss_mask_BS=mask_BS).lm_loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def save_ours(source: HFModel, tensors: Mapping[str, Tensor], directory: Path) -> Path:
    """Write a checkpoint of a folder's model with other tensors, and nothing of the folder."""
    write_weights_checkpoint(
        directory,
        source.config,
        source.tokenizer,
        WeightsSource(
            source.specs.shapes,
            source.specs.buffers,
            read_from(tensors),
            lambda name: tensors[name],
        ),
    )
    return directory


def export_hf(checkpoint: Path, output: Path, **options) -> Path:
    """Write a checkpoint as a Hugging Face folder."""
    convert_to_hf(find_verified_checkpoint(checkpoint), output, ExportOptions(**options))
    return output
