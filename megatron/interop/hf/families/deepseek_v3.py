"""DeepSeek-V3 (DeepSeek-AI 2024): latent attention, and experts that are balanced by biases.

GLM-4.7-Flash (glm4_moe_lite) differs in the names of dense blocks.
"""

from __future__ import annotations

from megatron.interop.hf.block_rules import (
    FIRST_DENSE,
    FURTHER_LAYERS,
    FURTHER_TOKENS,
    MLP_LAYER_TYPES,
    SharedExperts,
)
from megatron.interop.hf.config_rules import (
    MODEL_RULES,
    Always,
    Fixed,
    Ignored,
    Router,
    Same,
)
from megatron.interop.hf.family import (
    DECODER_TENSORS,
    DENSE_TENSORS,
    ROTARY_FREQUENCIES,
    ConfigRule,
    Family,
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

_RULES: tuple[ConfigRule, ...] = (
    *MODEL_RULES,
    *LATENT_ATTENTION_RULES,
    Rope(),
    Fixed("rope_interleave", (True,), reason="Other orders of rows are not converted."),
    Fixed("topk_method", ("noaux_tc",)),
    Fixed("scoring_func", ("sigmoid",)),
    Same("n_routed_experts", "moe.num_experts"),
    SharedExperts("n_shared_experts"),
    Same("moe_intermediate_size", "moe.moe_ffn_hidden_size"),
    Same("intermediate_size", "model.ffn_hidden_size"),
    FURTHER_LAYERS,
    Always({"moe.expert_type": "mlp"}),
)
_TENSORS = (
    *DECODER_TENSORS,
    *LATENT_ATTENTION_TENSORS,
    *DENSE_TENSORS,
    *router_tensors("mlp.gate", expert_bias="e_score_correction_bias"),
    *shared_expert_tensors("mlp.shared_experts"),
)
_LAYOUTS = (
    TensorLayout("per expert", expert_tensors("mlp")),
    TensorLayout("fused", fused_expert_tensors()),
)
_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}
_DEFAULTS = {
    "n_shared_experts": 1,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
}

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    config=(
        *_RULES,
        Router("deepseek_v3/DeepseekV3TopkRouter"),
        FIRST_DENSE,
        Fixed("moe_layer_freq", (1,)),
        # How the released code runs, and a balance loss that it does not compute.
        Ignored(("pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux")),
    ),
    tensors=_TENSORS,
    layouts=_LAYOUTS,
    aliases=_ALIASES,
    unmapped=(FURTHER_TOKENS, ROTARY_FREQUENCIES),
    defaults={
        **_DEFAULTS,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
    },
)

GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    config=(
        *_RULES,
        Router("glm4_moe_lite/Glm4MoeLiteTopkRouter"),
        MLP_LAYER_TYPES,
        Ignored(("pretraining_tp", "first_k_dense_replace")),
    ),
    tensors=_TENSORS,
    layouts=_LAYOUTS,
    aliases=_ALIASES,
    unmapped=(FURTHER_TOKENS, ROTARY_FREQUENCIES),
    defaults={
        **_DEFAULTS,
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.8,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "mlp_layer_types": None,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
    },
)

FAMILIES = (DEEPSEEK_V3, GLM4_MOE_LITE)
