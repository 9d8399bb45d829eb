"""OLMoE (Muennighoff et al. 2024): norms over the queries and the keys of all heads, clipping."""

from __future__ import annotations

from megatron.interop.hf.block_rules import ATTENTION_BIAS
from megatron.interop.hf.config_rules import HEAD_RULE, MODEL_RULES, Always, Router, Same
from megatron.interop.hf.family import (
    ATTENTION_BIASES,
    ATTENTION_TENSORS,
    DECODER_TENSORS,
    HEAD_NORMS,
    Family,
    TensorLayout,
    expert_tensors,
    fused_expert_tensors,
    router_tensors,
)
from megatron.interop.hf.rope import Rope

OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        Rope(),
        Router("olmoe/OlmoeTopKRouter", loss_key="router_aux_loss_coef"),
        Same("num_experts", "moe.num_experts"),
        Same("intermediate_size", "moe.moe_ffn_hidden_size"),
        Same("clip_qkv", "attention.clip_qkv", zero_for_none=True),
        ATTENTION_BIAS,
        Always({"attention.qk_norm": "all-heads"}),
    ),
    tensors=(
        *DECODER_TENSORS,
        *ATTENTION_TENSORS,
        *ATTENTION_BIASES,
        *HEAD_NORMS,
        *router_tensors("mlp.gate"),
    ),
    layouts=(
        TensorLayout("per expert", expert_tensors("mlp")),
        TensorLayout("fused", fused_expert_tensors()),
    ),
    aliases={"num_local_experts": "num_experts"},
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "router_aux_loss_coef": 0.01,
        "norm_topk_prob": False,
    },
)

FAMILIES = (OLMOE,)
