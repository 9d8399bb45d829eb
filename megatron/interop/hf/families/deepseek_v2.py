"""DeepSeek-V2 (DeepSeek-AI 2024): latent attention, and experts in groups of devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.interop.hf.block_rules import FIRST_DENSE, SharedExperts
from megatron.interop.hf.config_rules import (
    MODEL_RULES,
    Always,
    Converted,
    Fixed,
    Ignored,
    Router,
    Same,
    get_setting,
)
from megatron.interop.hf.family import (
    DECODER_TENSORS,
    DENSE_TENSORS,
    ROTARY_FREQUENCIES,
    Family,
    Settings,
    TensorLayout,
    expert_tensors,
    fused_expert_tensors,
    router_tensors,
    shared_expert_tensors,
)
from megatron.interop.hf.latent_attention import (
    LATENT_ATTENTION_RULES,
    LATENT_ATTENTION_TENSORS,
)
from megatron.interop.hf.rope import Rope

_GREEDY = "greedy"
_GROUP_LIMITED = "group_limited_greedy"


def _method_settings(config: Mapping[str, Any]) -> Settings:
    """Check the method, which decides whether the router reads the groups."""
    method = config["topk_method"]
    allowed = f"{_GREEDY} or {_GROUP_LIMITED}"
    require(method in (_GREEDY, _GROUP_LIMITED), "config.json: topk_method", method, allowed)
    return {}


def _method_keys(run: RunConfig) -> dict[str, Any]:
    has_groups = (get_setting(run, "gate.n_group") or 1) > 1
    return {"topk_method": _GROUP_LIMITED if has_groups else _GREEDY}


def _loss_settings(config: Mapping[str, Any]) -> Settings:
    """Return the balance loss of the released code: over experts, not over devices."""
    is_per_sequence = config["seq_aux"]
    require(
        isinstance(is_per_sequence, bool), "config.json: seq_aux", is_per_sequence, "a bool"
    )
    return {
        "gate.loss_coeff": config["aux_loss_alpha"],
        "gate.balance_scope": "sequence" if is_per_sequence else "micro-batch",
        "gate.device_loss_coeff": 0.0,
        "gate.communication_loss_coeff": 0.0,
    }


def _loss_keys(run: RunConfig) -> dict[str, Any]:
    return {
        "aux_loss_alpha": get_setting(run, "gate.loss_coeff"),
        "seq_aux": get_setting(run, "gate.balance_scope") == "sequence",
    }


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    config=(
        *MODEL_RULES,
        *LATENT_ATTENTION_RULES,
        Rope(),
        Router("deepseek_v2/DeepseekV2TopkRouter"),
        Converted(("topk_method",), _method_settings, _method_keys),
        Converted(("aux_loss_alpha", "seq_aux"), _loss_settings, _loss_keys),
        Fixed("norm_topk_prob", (False,), reason="transformers does not compute it."),
        Fixed("scoring_func", ("softmax",)),
        Same("n_routed_experts", "moe.num_experts"),
        SharedExperts("n_shared_experts"),
        Same("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
        Same("intermediate_size", "model.ffn_hidden_size"),
        FIRST_DENSE,
        Fixed("moe_layer_freq", (1,)),
        Fixed("mlp_bias", (False,), reason="Dense layers and experts have no biases here."),
        Always({"moe.expert_type": "mlp"}),
        # How the released code runs.
        Ignored(("pretraining_tp", "ep_size")),
    ),
    tensors=(
        *DECODER_TENSORS,
        *LATENT_ATTENTION_TENSORS,
        *DENSE_TENSORS,
        *router_tensors("mlp.gate"),
        *shared_expert_tensors("mlp.shared_experts"),
    ),
    layouts=(
        TensorLayout("per expert", expert_tensors("mlp")),
        TensorLayout("fused", fused_expert_tensors()),
    ),
    unmapped=(ROTARY_FREQUENCIES,),
    defaults={
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_group": None,
        "topk_group": None,
        "topk_method": _GREEDY,
        "num_experts_per_tok": None,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
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

FAMILIES = (DEEPSEEK_V2,)
