"""ERNIE 4.5 (Baidu 2025): softmax scores with selection biases, and interleaved rotary pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.schema import RunConfig
from megatron.interop.hf.block_rules import (
    Accepted,
    SharedExperts,
    has_moe_layer,
    moe_layer_settings,
    number_of,
)
from megatron.interop.hf.config_rules import (
    HEAD_RULE,
    MODEL_RULES,
    Converted,
    Fixed,
    Ignored,
    Router,
    Same,
)
from megatron.interop.hf.family import (
    ATTENTION_TENSORS,
    DECODER_TENSORS,
    DENSE_TENSORS,
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
from megatron.interop.hf.transforms import ONE_ROW, Transform, half_rotated_rows, ordered_rows

_BIAS = "layers.{layer}.mlp.gate.expert_bias"


def _layer_settings(config: Mapping[str, Any]) -> Settings:
    num_layers = config["num_hidden_layers"]
    first = number_of(config, "moe_layer_start_index", 0, num_layers)
    last = number_of(config, "moe_layer_end_index", -1, num_layers)
    interval = number_of(config, "moe_layer_interval", 1, num_layers)
    if last == -1:
        last = num_layers - 1
    is_moe = []
    for layer in range(num_layers):
        is_moe.append(first <= layer <= last and (layer + 1) % interval == 0)
    return moe_layer_settings(is_moe, "moe_layer_start_index")


def _layer_keys(run: RunConfig) -> dict[str, Any]:
    """Return the range and the interval of the MoE layers, if they have one."""
    layers = [layer for layer, is_moe in enumerate(has_moe_layer(run)) if is_moe]
    if not layers:
        return {}
    interval = 1
    if len(layers) > 1:
        interval = layers[1] - layers[0]
    return {
        "moe_layer_start_index": layers[0],
        "moe_layer_end_index": layers[-1],
        "moe_layer_interval": interval,
    }


def _rotary_rows(num_heads: str) -> Transform:
    """Return the transform of a projection whose heads have interleaved rotary pairs.

    Args:
        num_heads: Attribute of the model's configuration with the number of its heads.
    """
    return ordered_rows(
        "rows of interleaved rotary pairs",
        lambda run: half_rotated_rows(
            getattr(run.model, num_heads), run.model.head_size, 0, run.model.head_size
        ),
    )


_ATTENTION = (
    *ATTENTION_TENSORS[2:],
    TensorRule(
        "layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.q_proj.weight",
        _rotary_rows("num_attention_heads"),
    ),
    TensorRule(
        "layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        _rotary_rows("query_groups"),
    ),
)


def _statics(theirs: str) -> TensorRule:
    """Return the rule of the selection biases, a tensor [1, E]."""
    name = f"model.layers.{{layer}}.{theirs}.moe_statics.e_score_correction_bias"
    return TensorRule(_BIAS, name, ONE_ROW)


ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    config=(
        *MODEL_RULES,
        HEAD_RULE,
        Rope(default_base=500000.0),
        Router("ernie4_5_moe/Ernie4_5_MoeTopKRouter", loss_key="router_aux_loss_coef"),
        Same("num_experts", "moe.num_experts"),
        Same("intermediate_size", "model.ffn_hidden_size"),
        Same("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
        SharedExperts("moe_num_shared_experts", may_be_none=True),
        Converted(
            ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
            _layer_settings,
            _layer_keys,
        ),
        Fixed("use_bias", (False,), reason="Biases of MLPs are not supported."),
        # Keys of the released files.
        Accepted("moe_gate", ("topk",)),
        Accepted("moe_use_aux_free", (True,)),
        Accepted("use_rmsnorm", (True,)),
        Accepted("compression_ratio", (1.0,)),
        Ignored(("moe_capacity", "num_nextn_predict_layers", "fuse_rope", "ignored_index")),
    ),
    tensors=(
        *DECODER_TENSORS,
        *_ATTENTION,
        *DENSE_TENSORS,
        *router_tensors("mlp.gate"),
        *shared_expert_tensors("mlp.shared_experts"),
    ),
    layouts=(
        TensorLayout("per expert", (*expert_tensors("mlp"), _statics("mlp"))),
        TensorLayout("fused", (*fused_expert_tensors(), _statics("mlp.gate"))),
    ),
    aliases={"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"},
    unmapped=(
        UnmappedTensors(r"model\.mtp_.+", "layers that predict further tokens", kept=True),
    ),
    defaults={
        "vocab_size": 103424,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "num_experts_per_tok": 6,
        "num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "router_aux_loss_coef": 0.001,
    },
)

FAMILIES = (ERNIE4_5_MOE,)
