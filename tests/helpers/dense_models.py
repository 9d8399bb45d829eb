"""Dense models and their checkpoints, for tests of upcycling and conversion."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron.checkpoint.weights_only import WeightsSource, write_weights_checkpoint
from megatron.config.model import ModelConfig
from megatron.config.schema import RunConfig
from megatron.config.tokenizer import TokenizerConfig
from megatron.interop.model_specs import model_specs
from megatron.model.builder import build_run_config_model
from megatron.model.gpt import GPT
from megatron.tokenizer.build import build_tokenizer

VOCAB_SIZE = 257


def dense_config(**model) -> RunConfig:
    """Return the configuration of a tiny dense model of bytes."""
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 2,
        "seq_length": 32,
        "activation": "swiglu",
        "init_method_std": 0.1,
        "make_vocab_size_divisible_by": 1,
        "untie_embeddings_and_output_weights": True,
    }
    return RunConfig(
        model=ModelConfig(**{**sizes, **model}), tokenizer=TokenizerConfig("ByteTokenizer")
    )


def build(config: RunConfig, vocab_size: int = VOCAB_SIZE) -> GPT:
    """Build the model of a configuration with its initial weights."""
    return build_run_config_model(config, vocab_size)


def save(model: GPT, config: RunConfig, directory: Path) -> Path:
    """Write a checkpoint of iteration 0 with the weights of a model; the directory."""
    specs = model_specs(config, VOCAB_SIZE)
    state = model.state_dict()

    def read(name: str, start: int, length: int) -> torch.Tensor:
        return state[name].flatten()[start : start + length]

    source = WeightsSource(specs.shapes, specs.buffers, read, state.__getitem__)
    tokenizer = build_tokenizer(config.tokenizer)
    write_weights_checkpoint(directory, config, tokenizer, source)
    return directory


def write_text(path: Path, documents: int = 12) -> Path:
    """Write a JSONL file of text."""
    lines = []
    for i in range(documents):
        text = f"Document {i}: the quick brown fox jumps over {i * i} lazy dogs. " * 3
        lines.append(json.dumps({"text": text}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
