"""Routing of DeepSeek-V3 with grouped-query attention: families that differ in names and switches.

    GLM-4.5      glm4_moe     biases of queries, keys and values; half of a head's features rotate
    dots.llm1    dots1        normalised heads, windows in the last blocks
    Solar Open   solar_open   experts in every block
    Hunyuan 3    hy_v3        normalised heads, names of its own
    MiniMax-M2   minimax_m2   norms over all heads, names of Mixtral

The biases that select experts stay in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.interop.hf.block_rules import (
    ATTENTION_BIAS,
    FIRST_DENSE,
    FURTHER_LAYERS,
    FURTHER_TOKENS,
    MLP_LAYER_TYPES,
    Accepted,
    LayerWindows,
    SharedExperts,
    flag_of,
)
from megatron.interop.hf.config_rules import (
    HEAD_RULE,
    MODEL_RULES,
    Always,
    Converted,
    Fixed,
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
    ConfigRule,
    Family,
    Settings,
    TensorLayout,
    TensorRule,
    UnmappedTensors,
    expert_tensors,
    fused_expert_tensors,
    router_tensors,
    shared_expert_tensors,
)
from megatron.interop.hf.rope import Rope

_BIAS = "layers.{layer}.mlp.gate.expert_bias"
_PER_EXPERT = TensorLayout("per expert", expert_tensors("mlp"))
_FUSED = TensorLayout("fused", fused_expert_tensors())
_V3_TENSORS = (
    *DECODER_TENSORS,
    *ATTENTION_TENSORS,
    *DENSE_TENSORS,
    *router_tensors("mlp.gate", expert_bias="e_score_correction_bias"),
    *shared_expert_tensors("mlp.shared_experts"),
)
_V3_RULES: tuple[ConfigRule, ...] = (
    *MODEL_RULES,
    HEAD_RULE,
    Same("n_routed_experts", "moe.num_experts"),
    Same("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
    SharedExperts("n_shared_experts"),
    Accepted("scoring_func", ("sigmoid", "noaux_tc")),
    Accepted("topk_method", ("noaux_tc",)),
    Accepted("moe_layer_freq", (1,)),
    Ignored(("pretraining_tp", "ep_size")),
)
_PREDICTION_LAYERS = UnmappedTensors(
    r"model\.layers\.(?P<layer>\d+)\..+",
    "layers that predict further tokens",
    kept=True,
    num_layers_key="num_hidden_layers",
)
_V3_DEFAULTS = {
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "moe_intermediate_size": 1408,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}


def _slides(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a block of dots1 has a window: the last ones."""
    return bool(config["sliding_window"]) and layer >= config["max_window_layers"]


def _head_norm_settings(config: Mapping[str, Any]) -> Settings:
    return {"attention.qk_norm": "head" if flag_of(config, "use_qk_norm") else "none"}


def _head_norm_keys(run: RunConfig) -> dict[str, Any]:
    return {"use_qk_norm": run.attention.qk_norm == "head"}


def _full_attention(config: Mapping[str, Any]) -> Settings:
    """Check that all blocks of MiniMax have full attention (1), none linear attention (0)."""
    kinds = config.get("attn_type_list") or []
    is_full = isinstance(kinds, list) and all(kind == 1 for kind in kinds)
    require(is_full, "config.json: attn_type_list", kinds, "a list of 1")
    return {}


GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    config=(
        *_V3_RULES,
        Rope(is_partial=True, default_share=0.5),
        Router("glm4_moe/Glm4MoeTopkRouter"),
        Same("intermediate_size", "model.ffn_hidden_size"),
        Same("attention_bias", "attention.add_qkv_bias"),
        Converted(("use_qk_norm",), _head_norm_settings, _head_norm_keys),
        FIRST_DENSE,
        FURTHER_LAYERS,
    ),
    tensors=(*_V3_TENSORS, *ATTENTION_BIASES[:3], *HEAD_NORMS),
    layouts=(_PER_EXPERT, _FUSED),
    aliases={
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    unmapped=(FURTHER_TOKENS,),
    defaults={
        **_V3_DEFAULTS,
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "num_nextn_predict_layers": 1,
    },
)

DOTS1 = Family(
    name="dots1",
    architecture="Dots1ForCausalLM",
    config=(
        *_V3_RULES,
        Rope(),
        Router("dots1/Dots1TopkRouter"),
        Same("intermediate_size", "model.ffn_hidden_size"),
        ATTENTION_BIAS,
        FIRST_DENSE,
        LayerWindows(_slides, other_keys=("max_window_layers",)),
        Accepted("use_sliding_window", (False,)),
        Always({"attention.qk_norm": "head"}),
    ),
    tensors=(*_V3_TENSORS, *ATTENTION_BIASES, *HEAD_NORMS),
    layouts=(_PER_EXPERT, _FUSED),
    aliases={"num_local_experts": "n_routed_experts"},
    defaults={
        **_V3_DEFAULTS,
        "rms_norm_eps": 1e-6,
        "vocab_size": 152064,
        "hidden_size": 4608,
        "intermediate_size": 10944,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "layer_types": None,
    },
)

SOLAR_OPEN = Family(
    name="solar_open",
    architecture="SolarOpenForCausalLM",
    config=(
        *_V3_RULES,
        Rope(default_base=1e6, is_partial=True),
        Router("solar_open/SolarOpenTopkRouter"),
        Same("attention_bias", "attention.add_qkv_bias"),
        # Released files name the dense blocks that other families have.
        Accepted("first_k_dense_replace", (0,)),
        Accepted("use_qk_norm", (False,)),
        Ignored(("intermediate_size", "num_nextn_predict_layers")),
        Always({"moe.moe_first_k_dense": 0}),
    ),
    tensors=(*_V3_TENSORS, *ATTENTION_BIASES[:3]),
    layouts=(_PER_EXPERT, _FUSED),
    aliases={"num_local_experts": "n_routed_experts"},
    defaults={
        **_V3_DEFAULTS,
        "vocab_size": 196608,
        "hidden_size": 4096,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1280,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "norm_topk_prob": True,
    },
)

_HY_RELEASED = TensorLayout(
    "per expert",
    (
        *expert_tensors("mlp"),
        *router_tensors("mlp.router.gate"),
        TensorRule(_BIAS, "model.layers.{layer}.mlp.expert_bias"),
        *shared_expert_tensors("mlp.shared_mlp"),
    ),
)
_HY_FUSED = TensorLayout(
    "fused",
    (
        *fused_expert_tensors(),
        *router_tensors("mlp.gate"),
        TensorRule(_BIAS, "model.layers.{layer}.mlp.e_score_correction_bias"),
        *shared_expert_tensors("mlp.shared_experts"),
    ),
)

HY_V3 = Family(
    name="hy_v3",
    architecture="HYV3ForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        Rope(default_base=11_158_840.0),
        Router("hy_v3/HYV3TopKRouter"),
        Same("num_experts", "moe.num_experts"),
        Same("intermediate_size", "model.ffn_hidden_size"),
        Same("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
        SharedExperts("num_shared_experts"),
        ATTENTION_BIAS,
        MLP_LAYER_TYPES,
        Fixed("mlp_bias", (False,)),
        # Whether shared and routed outputs are added in fp32: equal in fp32.
        Ignored(("enable_moe_fp32_combine", "num_nextn_predict_layers")),
        Always({"attention.qk_norm": "head"}),
    ),
    tensors=(
        *DECODER_TENSORS,
        *ATTENTION_TENSORS,
        *ATTENTION_BIASES,
        *HEAD_NORMS,
        *DENSE_TENSORS,
    ),
    layouts=(_HY_RELEASED, _HY_FUSED),
    aliases={"num_local_experts": "num_experts"},
    unmapped=(_PREDICTION_LAYERS,),
    defaults={
        "vocab_size": 120832,
        "hidden_size": 4096,
        "intermediate_size": 13312,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.006,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "num_experts": 192,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 1536,
        "router_scaling_factor": 2.826,
        "enable_moe_fp32_combine": True,
        "mlp_layer_types": None,
    },
)

MINIMAX_M2 = Family(
    name="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        Rope(default_base=5e6, is_partial=True, size_key="rotary_dim"),
        Router("minimax_m2/MiniMaxM2TopKRouter"),
        Same("num_local_experts", "moe.num_experts"),
        Same("intermediate_size", "moe.moe_ffn_hidden_size"),
        Fixed("router_jitter_noise", (0.0,), reason="It would change the experts' inputs."),
        # Its loss takes the softmax of logits that the router passes through a sigmoid.
        Ignored(("router_aux_loss_coef",)),
        # Keys of the released files, which have layers that predict further tokens.
        Ignored(
            (
                "use_mtp",
                "num_mtp_modules",
                "mtp_transformer_layers",
                "mlp_intermediate_size",
                "shared_moe_mode",
                "layernorm_linear_attention_beta",
            )
        ),
        Accepted("scoring_func", ("sigmoid",)),
        Accepted("use_routing_bias", (True,)),
        Accepted("use_qk_norm", (True,)),
        Accepted("qk_norm_type", ("per_layer",)),
        Accepted("attention_bias", (False,)),
        Accepted("sliding_window", (None,)),
        Accepted("shared_intermediate_size", (0,)),
        Converted(("attn_type_list",), _full_attention, lambda run: {}),
        Accepted("layernorm_full_attention_beta", (1.0,)),
        Accepted("layernorm_mlp_beta", (1.0,)),
        Always({"attention.qk_norm": "all-heads", "moe.moe_first_k_dense": 0}),
    ),
    tensors=(*DECODER_TENSORS, *ATTENTION_TENSORS, *HEAD_NORMS),
    layouts=(
        TensorLayout(
            "per expert",
            (
                *expert_tensors("block_sparse_moe", gate="w1", up="w3", down="w2"),
                *router_tensors("block_sparse_moe.gate"),
                TensorRule(
                    _BIAS, "model.layers.{layer}.block_sparse_moe.e_score_correction_bias"
                ),
            ),
        ),
        TensorLayout(
            "fused",
            (
                *fused_expert_tensors(),
                *router_tensors("mlp.gate"),
                TensorRule(_BIAS, "model.layers.{layer}.mlp.e_score_correction_bias"),
            ),
        ),
    ),
    aliases={"num_experts": "num_local_experts"},
    unmapped=(_PREDICTION_LAYERS,),
    defaults={
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 196608,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "num_experts_per_tok": 8,
        "num_local_experts": 256,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    },
)

FAMILIES = (GLM4_MOE, DOTS1, SOLAR_OPEN, HY_V3, MINIMAX_M2)
