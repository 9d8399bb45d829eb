"""A model of ours, and the same model as a class of transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megatron.config.schema import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    RotaryConfig,
    RunConfig,
)
from megatron.model.builder import build_model
from megatron.model.gpt import GPT
from megatron.moe.gate import gate_class
from megatron.parallel.groups import Groups

VOCAB = 41


def make_run(
    gate: str = "topk",
    options: dict[str, Any] | None = None,
    moe: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
    rotary: dict[str, Any] | None = None,
    expert_options: dict[str, Any] | None = None,
    **shape: Any,
) -> RunConfig:
    """Return the configuration of a tiny model with two MoE layers.

    Args:
        options: fields of the gate's Config; those that it does not have are left out.
        moe, attention, rotary: fields of these sections.
        expert_options: fields of the expert type's Config.
        shape: fields of the section model.
    """
    known = {f.name for f in dataclasses.fields(gate_class(gate).Config)}
    options = {name: value for name, value in (options or {}).items() if name in known}
    experts = {"num_experts": 4, "gate": gate, "moe_ffn_hidden_size": 16, **(moe or {})}
    shape = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 24,
        "init_method_std": 0.5,
        "make_vocab_size_divisible_by": 16,
        "untie_embeddings_and_output_weights": True,
        **shape,
    }
    return RunConfig(
        model=ModelConfig(**shape),
        attention=AttentionConfig(**(attention or {})),
        rotary=RotaryConfig(**(rotary or {})),
        moe=MoEConfig(**experts),
        gate_options={gate: options},
        expert_options=expert_options or {},
    )


def build(run: RunConfig, vocab_size: int = VOCAB, seed: int = 2) -> GPT:
    """Return the model of a run, with state of gates away from its initial values."""
    gpt = build_model(
        run.model,
        run.moe,
        run.gate_options,
        vocab_size=vocab_size,
        seed=seed,
        groups=Groups(),
        expert_options=run.expert_options,
        attention=run.attention,
        rotary=run.rotary,
    )
    for buffer in gpt.buffers():
        # Tables of rotations do not change, those of token ids are integers.
        if buffer.is_floating_point() and buffer.dim() < 2:
            buffer.add_(0.01)
    return gpt.eval()


def twin_state(gpt: GPT) -> dict[str, torch.Tensor]:
    """Return the tensors of a model by their names in transformers."""
    state = {}
    for name, tensor in gpt.state_dict().items():
        state[name if name.startswith("lm_head.") else f"model.{name}"] = tensor
    return state


def twins(run: RunConfig, vocab_size: int = VOCAB) -> tuple[GPT, Any]:
    """Return a model of ours, and the model of transformers with the same weights."""
    from megatron.interop.hf_model import MoEMegatronConfig, MoEMegatronForCausalLM

    gpt = build(run, vocab_size)
    model = MoEMegatronForCausalLM(MoEMegatronConfig.of(run, vocab_size)).eval()
    result = model.load_state_dict(twin_state(gpt), strict=False)
    assert result.missing_keys in ([], ["lm_head.weight"]) and not result.unexpected_keys
    return gpt, model


def with_aligned_weights(model: Any) -> Any:
    """Copy a loaded model's tensors to memory of their own, and return the model.

    `from_pretrained` maps them from the file, where they begin at any multiple of 4 bytes. Some
    CPUs' matrix products sum in another order then, and the results differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
