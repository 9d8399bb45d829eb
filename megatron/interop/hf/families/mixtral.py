"""Mixtral (Jiang et al. 2024): top-k experts in every layer, weights normalised over the k."""

from __future__ import annotations

from megatron.interop.hf.block_rules import EveryWindow
from megatron.interop.hf.config_rules import HEAD_RULE, MODEL_RULES, Always, Router, Same
from megatron.interop.hf.family import (
    ATTENTION_TENSORS,
    DECODER_TENSORS,
    ROTARY_FREQUENCIES,
    Family,
    TensorLayout,
    expert_tensors,
    fused_expert_tensors,
    router_tensors,
)
from megatron.interop.hf.rope import Rope

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        Rope(default_base=1e6),
        Router("mixtral/MixtralTopKRouter", loss_key="router_aux_loss_coef"),
        Same("num_local_experts", "moe.num_experts"),
        Same("intermediate_size", "moe.moe_ffn_hidden_size"),
        Same("router_jitter_noise", "gate.jitter"),
        EveryWindow(),
        Always({"moe.expert_type": "mlp"}),
    ),
    tensors=(*DECODER_TENSORS, *ATTENTION_TENSORS),
    layouts=(
        TensorLayout(
            "per expert",
            (
                *router_tensors("block_sparse_moe.gate"),
                *expert_tensors("block_sparse_moe", gate="w1", up="w3", down="w2"),
            ),
        ),
        TensorLayout("fused", (*router_tensors("mlp.gate"), *fused_expert_tensors())),
    ),
    unmapped=(ROTARY_FREQUENCIES,),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    },
)

FAMILIES = (MIXTRAL,)
