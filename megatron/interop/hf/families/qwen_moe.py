"""Qwen2-MoE (Qwen team 2024) and Qwen3-MoE (2025).

Qwen2-MoE has biases of queries, keys and values, and a shared expert whose output a sigmoid gate
multiplies. Qwen3-MoE normalises the queries and keys of each head, and has no shared expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.schema import RunConfig
from megatron.interop.hf.block_rules import (
    ATTENTION_BIAS,
    SPARSE_STEP,
    EveryWindow,
    LayerWindows,
    flag_of,
    number_of,
)
from megatron.interop.hf.config_rules import (
    HEAD_RULE,
    MODEL_RULES,
    Always,
    Converted,
    Ignored,
    Router,
    Same,
)
from megatron.interop.hf.family import (
    ATTENTION_BIASES,
    ATTENTION_TENSORS,
    DECODER_TENSORS,
    DENSE_TENSORS,
    HEAD_NORMS,
    Family,
    Settings,
    TensorLayout,
    TensorRule,
    expert_tensors,
    fused_expert_tensors,
    router_tensors,
    shared_expert_tensors,
)
from megatron.interop.hf.rope import Rope


def _slides(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a block of Qwen2-MoE has a window: every second one of the first blocks."""
    if not flag_of(config, "use_sliding_window"):
        return False
    return layer < config["max_window_layers"] and layer % 2 == 0


def _shared_settings(config: Mapping[str, Any]) -> Settings:
    width = number_of(config, "shared_expert_intermediate_size", 1, 1 << 40)
    return {
        "moe.moe_shared_experts": 1,
        "moe.moe_shared_expert_intermediate_size": width,
        "moe.moe_shared_expert_gate": True,
    }


def _shared_keys(run: RunConfig) -> dict[str, Any]:
    return {"shared_expert_intermediate_size": run.moe.shared_size(run.model.ffn_size)}


_LAYOUTS = (
    TensorLayout("per expert", expert_tensors("mlp")),
    TensorLayout("fused", fused_expert_tensors()),
)
_SHARED_RULE = Converted(("shared_expert_intermediate_size",), _shared_settings, _shared_keys)
_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
    "mlp_only_layers": None,
}

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        Rope(),
        Router("qwen2_moe/Qwen2MoeTopKRouter", loss_key="router_aux_loss_coef"),
        Same("num_experts", "moe.num_experts"),
        Same("intermediate_size", "model.ffn_hidden_size"),
        Same("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
        Same("qkv_bias", "attention.add_qkv_bias"),
        SPARSE_STEP,
        _SHARED_RULE,
        LayerWindows(_slides, switch="use_sliding_window", other_keys=("max_window_layers",)),
    ),
    tensors=(
        *DECODER_TENSORS,
        *ATTENTION_TENSORS,
        *ATTENTION_BIASES[:3],
        *DENSE_TENSORS,
        *router_tensors("mlp.gate"),
        *shared_expert_tensors("mlp.shared_expert"),
        TensorRule(
            "layers.{layer}.mlp.shared_gate.weight",
            "model.layers.{layer}.mlp.shared_expert_gate.weight",
        ),
    ),
    layouts=_LAYOUTS,
    defaults={
        **_DEFAULTS,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
        "layer_types": None,
    },
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        Rope(),
        Router("qwen3_moe/Qwen3MoeTopKRouter", loss_key="router_aux_loss_coef"),
        Same("num_experts", "moe.num_experts"),
        Same("intermediate_size", "model.ffn_hidden_size"),
        Same("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
        ATTENTION_BIAS,
        SPARSE_STEP,
        EveryWindow(switch="use_sliding_window"),
        # Released files have it; the window is that of all blocks.
        Ignored(("max_window_layers",)),
        Always({"attention.qk_norm": "head"}),
    ),
    tensors=(
        *DECODER_TENSORS,
        *ATTENTION_TENSORS,
        *ATTENTION_BIASES,
        *HEAD_NORMS,
        *DENSE_TENSORS,
        *router_tensors("mlp.gate"),
    ),
    layouts=_LAYOUTS,
    aliases={"num_local_experts": "num_experts"},
    defaults={
        **_DEFAULTS,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
)

FAMILIES = (QWEN2_MOE, QWEN3_MOE)
