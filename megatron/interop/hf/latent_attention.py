"""Rules of multi-head latent attention in config.json and among tensors, as DeepSeek names them.

Their rotated features are interleaved pairs; ours are two halves, so that the rows of
projections to rotated features are in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.interop.hf.config_rules import Always, Converted, Same
from megatron.interop.hf.family import ConfigRule, Settings, TensorRule, same_names
from megatron.interop.hf.transforms import half_rotated_rows, ordered_rows


def _query_rows(run: RunConfig) -> Tensor:
    """Return the row of a projection to queries for each of ours: [nope, rope] of every head."""
    nope = run.attention.qk_nope_head_dim
    rope = run.attention.qk_rope_head_dim
    return half_rotated_rows(run.model.num_attention_heads, nope + rope, nope, rope)


def _key_rows(run: RunConfig) -> Tensor:
    """Return the row of the projection to latents and shared keys for each of ours."""
    latent = run.attention.kv_lora_rank
    rope = run.attention.qk_rope_head_dim
    return half_rotated_rows(1, latent + rope, latent, rope)


_QUERIES = ordered_rows("rotated features of each head in halves", _query_rows)
_KEYS = ordered_rows("rotated features in halves", _key_rows)
_PREFIX = "layers.{layer}.self_attn"


def _reordered(name: str, transform: Any) -> TensorRule:
    return TensorRule(f"{_PREFIX}.{name}", f"model.{_PREFIX}.{name}", transform)


LATENT_ATTENTION_TENSORS = (
    *same_names(
        "self_attn",
        "q_a_proj.weight",
        "q_a_proj.bias",
        "q_a_layernorm.weight",
        "kv_a_layernorm.weight",
        "kv_b_proj.weight",
        "o_proj.weight",
        "o_proj.bias",
    ),
    _reordered("q_proj.weight", _QUERIES),
    _reordered("q_b_proj.weight", _QUERIES),
    _reordered("kv_a_proj_with_mqa.weight", _KEYS),
    _reordered("kv_a_proj_with_mqa.bias", _KEYS),
)
"""Tensors with and without latents of queries and biases"""


def _head_settings(config: Mapping[str, Any]) -> Settings:
    heads = config["num_attention_heads"]
    rope = config["qk_rope_head_dim"]
    equal = {
        "num_key_value_heads": heads,
        "head_dim": rope,
        "qk_head_dim": rope + config["qk_nope_head_dim"],
    }
    for key, expected in equal.items():
        value = config.get(key)
        allowed = f"{expected}, as its other keys say"
        require(value in (None, expected), f"config.json: {key}", value, allowed)
    return {"model.num_attention_heads": heads}


def _head_keys(run: RunConfig) -> dict[str, Any]:
    options = run.attention
    return {
        "num_attention_heads": run.model.num_attention_heads,
        "num_key_value_heads": run.model.num_attention_heads,
        "head_dim": options.qk_rope_head_dim,
        "qk_head_dim": options.qk_rope_head_dim + options.qk_nope_head_dim,
    }


def _bias_settings(config: Mapping[str, Any]) -> Settings:
    value = config["attention_bias"]
    return {"attention.add_qkv_bias": value, "attention.attention_output_bias": value}


def _bias_keys(run: RunConfig) -> dict[str, Any]:
    return {"attention_bias": run.attention.add_qkv_bias}


LATENT_ATTENTION_RULES: tuple[ConfigRule, ...] = (
    Always({"attention.attention": "mla"}),
    Same("q_lora_rank", "attention.q_lora_rank", zero_for_none=True),
    Same("kv_lora_rank", "attention.kv_lora_rank"),
    Same("qk_rope_head_dim", "attention.qk_rope_head_dim"),
    Same("qk_nope_head_dim", "attention.qk_nope_head_dim"),
    Same("v_head_dim", "attention.v_head_dim"),
    Converted(
        ("num_attention_heads", "num_key_value_heads", "head_dim", "qk_head_dim"),
        _head_settings,
        _head_keys,
    ),
    Converted(("attention_bias",), _bias_settings, _bias_keys),
)
"""Sizes of heads and latents"""
