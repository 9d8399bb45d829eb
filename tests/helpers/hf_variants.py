"""Tiny configurations of the Hugging Face families that are converted, as data.

Sizes differ wherever two tensors could be confused: a transposed or permuted tensor has another
shape or other values. Every family has a base configuration, and variants that change a few of
its keys, so that each branch of the family's code is run once.

The keys are those of the family's configuration class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB = 57
HIDDEN = 32

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_HEAD = {"head_dim": 12}
_DENSE = {"intermediate_size": 40}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
}
_V3 = {
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 200.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0}


ONE = {"num_hidden_layers": 1}


@dataclass(frozen=True)
class HFFamily:
    """A family and the configurations in which it is tested."""

    base: Mapping[str, Any]
    """configuration of the variant "base\""""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """changed keys by the name of the variant"""
    one_moe_layer: Mapping[str, Any] | None = None
    """changed keys for a model with a single layer, which has experts, if transformers' pooled
    balance loss of it equals ours"""
    kept: tuple[str, ...] = ()
    """tensors that a source may have, and that are kept aside"""
    refused: tuple[tuple[Mapping[str, Any], str], ...] = ()
    """keys of config.json that conversion refuses, and a text that its error contains"""

    @property
    def has_balance_loss(self) -> bool:
        """Whether transformers' balance loss can be compared."""
        return self.one_moe_layer is not None


FAMILIES: dict[str, HFFamily] = {
    "mixtral": HFFamily(
        {
            **_SHAPE,
            **_DENSE,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.02,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        },
        {
            "tied": {"tie_word_embeddings": True, "head_dim": 12},
            "window": {"sliding_window": 5, "rope_parameters": LINEAR_ROPE},
        },
        one_moe_layer=ONE,
        refused=(
            ({"hidden_act": "tanh"}, "hidden_act"),
            ({"num_experts_per_tok": 9}, "--topk"),
        ),
    ),
    "qwen2_moe": HFFamily(
        {
            **_SHAPE,
            **_DENSE,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.02,
            "mlp_only_layers": [1],
        },
        {
            "sparse_step": {
                "num_hidden_layers": 4,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [],
                "norm_topk_prob": True,
                "qkv_bias": False,
            },
            "window": {
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 2,
                "mlp_only_layers": [],
                "tie_word_embeddings": True,
                "rope_parameters": YARN_ROPE,
            },
        },
        one_moe_layer={**ONE, "mlp_only_layers": []},
        refused=(
            ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
            ({"mlp_only_layers": [7]}, "mlp_only_layers"),
            ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ),
    ),
    "qwen3_moe": HFFamily(
        {
            **_SHAPE,
            **_HEAD,
            **_DENSE,
            "moe_intermediate_size": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.02,
            "mlp_only_layers": [1],
        },
        {
            "bias": {
                "attention_bias": True,
                "mlp_only_layers": [],
                "norm_topk_prob": False,
                "tie_word_embeddings": True,
                "rope_parameters": YARN_ROPE,
            },
            "window": {
                "use_sliding_window": True,
                "sliding_window": 5,
                "mlp_only_layers": [],
                "decoder_sparse_step": 2,
            },
        },
        one_moe_layer={**ONE, "mlp_only_layers": []},
        refused=(({"rope_parameters": {"rope_type": "longrope"}}, "rope"),),
    ),
    "olmoe": HFFamily(
        {
            **_SHAPE,
            "intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.02,
        },
        {
            "clipped": {
                "clip_qkv": 0.7,
                "attention_bias": True,
                "norm_topk_prob": True,
                "tie_word_embeddings": True,
            },
        },
        one_moe_layer=ONE,
        refused=(({"clip_qkv": -1.0}, "--clip-qkv"),),
    ),
    "gpt_oss": HFFamily(
        {
            **_SHAPE,
            **_HEAD,
            "intermediate_size": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "router_aux_loss_coef": 0.02,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                **YARN_ROPE,
                "truncate": False,
            },
        },
        {
            "no_bias": {
                "attention_bias": False,
                "layer_types": ["full_attention", "full_attention", "sliding_attention"],
                "swiglu_alpha": 1.1,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 90.0},
            },
        },
        one_moe_layer=ONE,
        refused=(
            ({"layer_types": ["full_attention"]}, "layer_types"),
            ({"swiglu_limit": 0.0}, "--expert-limit"),
            ({"sliding_window": None}, "sliding_window"),
        ),
    ),
    "glm4_moe": HFFamily(
        {
            **_SHAPE,
            **_HEAD,
            **_V3,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_nextn_predict_layers": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 600.0,
                "partial_rotary_factor": 0.5,
            },
        },
        {
            "plain": {
                "use_qk_norm": False,
                "attention_bias": False,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": False,
                "tie_word_embeddings": True,
                "first_k_dense_replace": 0,
            },
        },
        kept=("model.layers.3.eh_proj.weight", "model.layers.3.self_attn.q_proj.weight"),
        refused=(
            ({"topk_group": 9}, "--topk-group"),
            ({"num_nextn_predict_layers": None}, "num_nextn_predict_layers"),
        ),
    ),
    "dots1": HFFamily(
        {**_SHAPE, **_HEAD, **_V3, "sliding_window": None, "max_window_layers": 3},
        {
            "window": {
                "sliding_window": 5,
                "max_window_layers": 1,
                "attention_bias": True,
                "first_k_dense_replace": 2,
            },
        },
    ),
    "solar_open": HFFamily(
        {
            key: value
            for key, value in {**_SHAPE, **_HEAD, **_V3}.items()
            if key not in ("intermediate_size", "first_k_dense_replace")
        },
        {
            "biased": {
                "attention_bias": True,
                "rope_parameters": YARN_ROPE,
                "n_shared_experts": 1,
            }
        },
    ),
    "ernie4_5_moe": HFFamily(
        {
            **_SHAPE,
            **_HEAD,
            **_DENSE,
            "moe_intermediate_size": 24,
            "moe_num_experts": 6,
            "moe_num_shared_experts": 2,
            "moe_k": 2,
            "moe_layer_start_index": 1,
            "moe_norm_min": 0.4,
            "router_aux_loss_coef": 0.02,
        },
        {
            "interval": {
                "num_hidden_layers": 4,
                "moe_layer_interval": 2,
                "moe_layer_start_index": 0,
                "moe_layer_end_index": 2,
                "moe_num_shared_experts": 0,
                "tie_word_embeddings": True,
            },
        },
        one_moe_layer={**ONE, "moe_layer_start_index": 0},
        kept=("model.mtp_block.0.self_attn.q_proj.weight",),
        refused=(({"use_bias": True}, "use_bias"),),
    ),
    "hy_v3": HFFamily(
        {
            **_SHAPE,
            **_HEAD,
            **_DENSE,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_shared_experts": 2,
            "moe_intermediate_size": 24,
            "router_scaling_factor": 1.7,
        },
        {
            "pattern": {
                "mlp_layer_types": ["sparse", "dense", "sparse"],
                "attention_bias": True,
                "tie_word_embeddings": True,
            },
        },
        refused=(({"mlp_bias": True}, "mlp_bias"),),
    ),
    "minimax_m2": HFFamily(
        {
            **_SHAPE,
            **_HEAD,
            "intermediate_size": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 600.0,
                "partial_rotary_factor": 0.5,
            },
        },
        {"tied": {"tie_word_embeddings": True, "rope_parameters": LINEAR_ROPE}},
        refused=(({"router_jitter_noise": 0.1}, "router_jitter_noise"),),
    ),
    "deepseek_v2": HFFamily(
        {
            **_SHAPE,
            **_V3,
            **_LATENT,
            "norm_topk_prob": False,
            "topk_method": "group_limited_greedy",
            "rope_parameters": {**YARN_ROPE, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        {
            "greedy": {
                "topk_method": "greedy",
                "n_group": None,
                "topk_group": None,
                "q_lora_rank": None,
                "attention_bias": True,
                "first_k_dense_replace": 0,
                "tie_word_embeddings": True,
                "rope_parameters": LINEAR_ROPE,
            },
        },
        refused=(
            ({"topk_method": "noaux_tc"}, "topk_method"),
            ({"mlp_bias": True}, "mlp_bias"),
            ({"num_key_value_heads": 2}, "num_key_value_heads"),
            ({"n_shared_experts": 0}, "n_shared_experts"),
            ({"seq_aux": 1}, "seq_aux"),
            ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ),
    ),
    "deepseek_v3": HFFamily(
        {
            **_SHAPE,
            **_V3,
            **_LATENT,
            "rope_parameters": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        {
            "plain": {
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": False,
                "q_lora_rank": None,
                "attention_bias": True,
                "first_k_dense_replace": 0,
                "tie_word_embeddings": True,
                "rope_parameters": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.5},
            },
        },
        kept=("model.layers.3.eh_proj.weight", "model.layers.3.self_attn.q_a_proj.weight"),
        refused=(
            ({"rope_interleave": False}, "rope_interleave"),
            ({"scoring_func": "softmax"}, "scoring_func"),
            ({"qk_head_dim": 7}, "qk_head_dim"),
            ({"kv_lora_rank": 0}, "--kv-lora-rank"),
        ),
    ),
    "glm4_moe_lite": HFFamily(
        {
            **{
                key: v
                for key, v in {**_SHAPE, **_V3, **_LATENT}.items()
                if "first_k" not in key
            },
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
        },
        {"plain": {"n_group": 1, "topk_group": 1, "mlp_layer_types": None}},
        kept=("model.layers.3.eh_proj.weight",),
    ),
    "llama": HFFamily(
        {**_SHAPE, **_DENSE, "head_dim": 8},
        {
            "llama3": {
                "head_dim": 12,
                "attention_bias": True,
                "tie_word_embeddings": True,
                "rope_parameters": LLAMA3_ROPE,
            },
            "yarn": {"rope_parameters": YARN_ROPE},
            "linear": {"rope_parameters": LINEAR_ROPE},
        },
        refused=(({"mlp_bias": True}, "mlp_bias"),),
    ),
    "qwen2": HFFamily(
        {**_SHAPE, **_DENSE},
        {
            "window": {
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 1,
                "tie_word_embeddings": True,
            },
        },
    ),
    "qwen3": HFFamily(
        {**_SHAPE, **_DENSE, **_HEAD},
        {
            "bias": {
                "attention_bias": True,
                "tie_word_embeddings": True,
                "rope_parameters": YARN_ROPE,
            },
            "window": {
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 1,
            },
        },
    ),
}
