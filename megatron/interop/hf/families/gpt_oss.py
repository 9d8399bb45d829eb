"""gpt-oss (OpenAI 2025): sinks, windows in every second block, and experts with biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.interop.hf.block_rules import ATTENTION_BIAS, LayerWindows
from megatron.interop.hf.config_rules import (
    HEAD_RULE,
    MODEL_RULES,
    Always,
    Ignored,
    Router,
    Same,
)
from megatron.interop.hf.family import (
    ATTENTION_BIASES,
    ATTENTION_TENSORS,
    DECODER_TENSORS,
    Family,
    Settings,
    TensorRule,
    router_tensors,
    same_names,
)
from megatron.interop.hf.rope import Rope
from megatron.interop.hf.transforms import EVEN_ROWS, ODD_ROWS, TRANSPOSED, transposed

_OURS = "layers.{layer}.mlp.experts"
_THEIRS = "model.layers.{layer}.mlp.experts"
_GATE_UP = f"{_THEIRS}.gate_up_proj"
_EXPERT_TENSORS = (
    TensorRule(f"{_OURS}.w1", _GATE_UP, transposed(EVEN_ROWS), stacked=True),
    TensorRule(f"{_OURS}.w3", _GATE_UP, transposed(ODD_ROWS), stacked=True),
    TensorRule(f"{_OURS}.w2", f"{_THEIRS}.down_proj", TRANSPOSED, stacked=True),
    TensorRule(f"{_OURS}.b1", f"{_GATE_UP}_bias", EVEN_ROWS, stacked=True),
    TensorRule(f"{_OURS}.b3", f"{_GATE_UP}_bias", ODD_ROWS, stacked=True),
    TensorRule(f"{_OURS}.b2", f"{_THEIRS}.down_proj_bias"),
)
"""gate_up_proj [E, D, 2H] has the gate's and the up projection's columns in turn, down_proj is
[E, H, D]"""


def _every_second_layer(config: Mapping[str, Any], layer: int) -> bool:
    return layer % 2 == 0


_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class _DefaultYarn(Rope):
    """Rotary positions that are scaled by YaRN if config.json says nothing."""

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        if not config.get("rope_scaling") and config.get("rope_parameters") is None:
            config = {**config, "rope_parameters": _YARN}
        return super().to_ours(config)


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        _DefaultYarn(default_base=150000.0),
        ATTENTION_BIAS,
        LayerWindows(_every_second_layer),
        Router("gpt_oss/GptOssTopKRouter", loss_key="router_aux_loss_coef"),
        Same("num_local_experts", "moe.num_experts"),
        Same("intermediate_size", "moe.moe_ffn_hidden_size"),
        Same("swiglu_limit", "expert.limit"),
        Same("swiglu_alpha", "expert.alpha"),
        # The length of the first training, which rope_scaling has, too.
        Ignored(("initial_context_length",)),
        Always(
            {
                "attention.attention_sinks": True,
                "moe.expert_type": "swiglu_clamped",
                "expert.linear_offset": 1.0,
                "expert.linear_bias": True,
            }
        ),
    ),
    tensors=(
        *DECODER_TENSORS,
        *ATTENTION_TENSORS,
        *ATTENTION_BIASES,
        *same_names("self_attn", "sinks"),
        *router_tensors("mlp.router", router__bias="bias"),
        *_EXPERT_TENSORS,
    ),
    aliases={"experts_per_token": "num_experts_per_tok", "num_experts": "num_local_experts"},
    defaults={
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "router_aux_loss_coef": 0.001,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    },
)

FAMILIES = (GPT_OSS,)
