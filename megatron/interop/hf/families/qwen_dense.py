"""Dense Qwen2 (biases of queries, keys and values) and Qwen3 (their heads are normalised)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.interop.hf.block_rules import ATTENTION_BIAS, Accepted, LayerWindows
from megatron.interop.hf.config_rules import HEAD_RULE, MODEL_RULES, Always, Same
from megatron.interop.hf.family import (
    ATTENTION_BIASES,
    ATTENTION_TENSORS,
    DECODER_TENSORS,
    DENSE_TENSORS,
    HEAD_NORMS,
    ROTARY_FREQUENCIES,
    Family,
)
from megatron.interop.hf.rope import Rope


def _is_sliding(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a block has a window: those from `max_window_layers` on, if any has."""
    has_window = config["use_sliding_window"] and config["sliding_window"]
    return bool(has_window) and layer >= config["max_window_layers"]


_WINDOWS = LayerWindows(
    _is_sliding, switch="use_sliding_window", other_keys=("max_window_layers",)
)
_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        Rope(),
        Same("intermediate_size", "model.ffn_hidden_size"),
        Always({"attention.add_qkv_bias": True}),
        _WINDOWS,
        # Positions in three dimensions, of models that see images.
        Accepted("use_mrope", (False,)),
    ),
    tensors=(*DECODER_TENSORS, *ATTENTION_TENSORS, *ATTENTION_BIASES[:3], *DENSE_TENSORS),
    unmapped=(ROTARY_FREQUENCIES,),
    defaults={**_DEFAULTS, "head_dim": None},
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        Rope(),
        Same("intermediate_size", "model.ffn_hidden_size"),
        ATTENTION_BIAS,
        Always({"attention.qk_norm": "head"}),
        _WINDOWS,
    ),
    tensors=(
        *DECODER_TENSORS,
        *ATTENTION_TENSORS,
        *ATTENTION_BIASES,
        *HEAD_NORMS,
        *DENSE_TENSORS,
    ),
    unmapped=(ROTARY_FREQUENCIES,),
    defaults={**_DEFAULTS, "head_dim": 128, "attention_bias": False},
)

FAMILIES = (QWEN2, QWEN3)
