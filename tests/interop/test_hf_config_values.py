"""Values of config.json that make no sense: always one ValueError, whatever the key and family."""

from __future__ import annotations

import pytest

from helpers.hf_models import HFCase, tested_families
from megatron.interop.hf.config_map import run_config_of
from megatron.interop.hf.registry import find_family

pytest.importorskip("transformers", reason="the reference implementations are not installed")

ODD_VALUES = (None, "x", -1, 0, 1.5, [], {}, 10**30, ["a"], float("nan"))


def family_and_config(model_type):
    from transformers import AutoConfig

    case = HFCase(model_type, "base")
    config = AutoConfig.for_model(model_type, **case.config).to_dict()
    return find_family(model_type), config


@pytest.mark.parametrize("model_type", tested_families())
def test_odd_values_are_refused_or_harmless(model_type):
    """No other error than a ValueError of one line comes up."""
    family, config = family_and_config(model_type)
    refused = 0
    for key in sorted(family.known_keys):
        for value in ODD_VALUES:
            try:
                run_config_of(family, {**config, key: value})
            except ValueError as error:
                assert "\n" not in str(error), key
                refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    "model_type, key, value",
    [
        ("mixtral", "num_experts_per_tok", "x"),
        ("mixtral", "num_hidden_layers", 10**30),
        ("dots1", "norm_topk_prob", None),
        ("glm4_moe", "use_qk_norm", "no"),
        ("qwen3_moe", "use_sliding_window", "no"),
        ("ernie4_5_moe", "moe_layer_interval", 0),
        ("minimax_m2", "rotary_dim", "x"),
        ("hy_v3", "mlp_layer_types", ["sparse"]),
        ("hy_v3", "mlp_layer_types", ["dense"] * 3),
        ("dots1", "layer_types", ["chunked_attention"] * 3),
        ("glm4_moe", "scoring_func", "softmax"),
        ("qwen3_moe", "num_experts", 7),
        ("minimax_m2", "attn_type_list", [1, 0, 1]),
    ],
)
def test_refused_value_is_named(model_type, key, value):
    """`num_experts` is another name of a key that the configuration has, with another value."""
    family, config = family_and_config(model_type)
    if key == "rotary_dim":
        del config["rope_parameters"]
    with pytest.raises(ValueError, match=f"config.json.*{key}"):
        run_config_of(family, {**config, key: value})


RELEASED = {
    "qwen2_moe": {
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3_moe": {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "glm4_moe": {
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
        "vocab_size": 151552,
    },
    "minimax_m2": {
        "attn_type_list": [1] * 62,
        "head_dim": 128,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "rope_theta": 5000000,
        "rotary_dim": 64,
        "scoring_func": "sigmoid",
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
    },
}
"""Keys of the files that came with released models: transformers no longer writes all of them"""


@pytest.mark.parametrize("model_type", RELEASED)
def test_released_configuration_is_understood(model_type):
    """It means what transformers makes of it; earlier names of keys are understood, too."""
    from transformers import CONFIG_MAPPING

    family = find_family(model_type)
    ours = run_config_of(family, {"model_type": model_type, **RELEASED[model_type]})
    written = CONFIG_MAPPING[model_type](**RELEASED[model_type]).to_dict()
    known = {key: value for key, value in written.items() if key in family.known_keys}
    theirs = run_config_of(family, known)
    for section in ("model", "attention", "rotary", "moe", "gate_options"):
        assert getattr(ours, section) == getattr(theirs, section)
    assert ours.rotary.rotary_percent in (0.5, 1.0)
