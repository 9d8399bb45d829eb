"""Llama (Touvron et al. 2023) and models with its architecture: dense."""

from __future__ import annotations

from megatron.interop.hf.block_rules import ATTENTION_BIAS
from megatron.interop.hf.config_rules import (
    HEAD_RULE,
    MODEL_RULES,
    Fixed,
    Ignored,
    Same,
)
from megatron.interop.hf.family import (
    ATTENTION_BIASES,
    ATTENTION_TENSORS,
    DECODER_TENSORS,
    DENSE_TENSORS,
    ROTARY_FREQUENCIES,
    Family,
)
from megatron.interop.hf.rope import Rope

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        Rope(),
        Same("intermediate_size", "model.ffn_hidden_size"),
        ATTENTION_BIAS,
        Fixed("mlp_bias", (False,), reason="Dense layers have no biases here."),
        # Tensor-parallel slices of matrix products, which only change their rounding.
        Ignored(("pretraining_tp",)),
    ),
    tensors=(*DECODER_TENSORS, *ATTENTION_TENSORS, *ATTENTION_BIASES, *DENSE_TENSORS),
    unmapped=(ROTARY_FREQUENCIES,),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    },
)

FAMILIES = (LLAMA,)
