"""gpt-oss: the released config.json, and experts in MXFP4."""

from megatron.interop.hf.config_map import run_config_of
from megatron.interop.hf.registry import find_family

RELEASED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
"""Keys and values of gpt-oss-20b's config.json, without quantization_config"""


def test_released_config_is_understood():
    config = run_config_of(find_family("gpt_oss"), RELEASED)
    attention = config.attention
    assert attention.attention_sinks and attention.add_qkv_bias
    assert attention.window_size == 128 and attention.window_layers == (*range(0, 24, 2),)
    rotary = config.rotary
    assert (rotary.rope_scaling, rotary.rope_scaling_factor) == ("yarn", 32.0)
    assert rotary.rope_original_max_positions == 4096 and not rotary.yarn_truncate
    assert config.gate_options["topk"]["topk"] == 4
    assert config.gate_options["topk"]["router_bias"]
    assert config.expert_options["limit"] == 7.0


def test_missing_rope_and_layer_types_have_defaults():
    """As in transformers: YaRN, and windows in every second block from the first one on."""
    explicit = run_config_of(find_family("gpt_oss"), RELEASED)
    missing = {
        key: value
        for key, value in RELEASED.items()
        if key not in ("rope_scaling", "layer_types", "rope_theta", "swiglu_limit")
    }
    assert run_config_of(find_family("gpt_oss"), missing) == explicit
