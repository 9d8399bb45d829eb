"""Values of config.json that make no sense: always one ValueError, whatever the key and family."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from helpers.hf_models import HFCase, families_under_test
from helpers.hf_variants import LLAMA3_ROPE
from megatron.config.rotary import RotaryConfig
from megatron.interop.hf.config_map import config_json_of, run_config_of
from megatron.interop.hf.registry import find_family

pytest.importorskip("transformers", reason="the reference implementations are not installed")

ODD_VALUES = (None, "x", -1, 0, 1.5, [], {}, 10**30, ["a"], float("nan"))


def family_and_config(model_type):
    from transformers import AutoConfig

    case = HFCase(model_type, "base")
    config = AutoConfig.for_model(model_type, **case.config).to_dict()
    return find_family(model_type), config


@pytest.mark.parametrize("model_type", families_under_test())
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
        ("qwen2", "layer_types", ["sliding_attention"] * 3),
        ("qwen2_moe", "layer_types", ["sliding_attention"] * 3),
        ("glm4_moe", "scoring_func", "softmax"),
        ("qwen3_moe", "num_experts", 7),
        ("minimax_m2", "attn_type_list", [1, 0, 1]),
        ("mixtral", "partial_rotary_factor", 0.5),
        ("deepseek_v3", "partial_rotary_factor", 0.5),
        ("olmoe", "clip_qkv", 0.0),
        ("deepseek_v2", "q_lora_rank", 0),
    ],
)
def test_refused_value_is_named(model_type, key, value):
    """`num_experts` is another name of a key that the configuration has, with another value."""
    family, config = family_and_config(model_type)
    if key == "rotary_dim":
        del config["rope_parameters"]
    with pytest.raises(ValueError, match=f"config.json.*{key}"):
        run_config_of(family, {**config, key: value})


def test_attention_factor_of_zero_is_refused():
    """It would make all logits equal; our 0 means that it follows from the factor."""
    family, config = family_and_config("llama")
    rope = {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}
    with pytest.raises(ValueError, match="rope attention_factor is 0.0"):
        run_config_of(family, {**config, "rope_parameters": rope})


EARLIER_ROPE = [
    ("mixtral", {"rope_theta": 50.0}),
    ("mixtral", {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("mixtral", {}),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}),
    ("llama", {"rope_scaling": {**LLAMA3_ROPE}}),
    ("glm4_moe", {"rope_theta": 50.0, "partial_rotary_factor": 1.0}),
    ("glm4_moe", {"rope_theta": 50.0, "rope_scaling": None}),
    ("minimax_m2", {"rotary_dim": 6}),
    ("minimax_m2", {"rotary_dim": 4, "partial_rotary_factor": 0.5}),
    ("gpt_oss", {"rope_theta": 50.0}),
    ("gpt_oss", {"rope_parameters": {}}),
]


@pytest.mark.parametrize("model_type, keys", EARLIER_ROPE)
def test_earlier_rope_keys_mean_the_same(model_type, keys):
    """They mean what transformers makes of them, which it writes as rope_parameters."""
    from transformers import AutoConfig

    family, config = family_and_config(model_type)
    del config["rope_parameters"]
    written = AutoConfig.for_model(**config, **copy.deepcopy(keys)).to_dict()
    theirs = run_config_of(family, {**config, "rope_parameters": written["rope_parameters"]})
    ours = run_config_of(family, {**config, **keys})
    assert ours.rotary == theirs.rotary
    assert ours.model.rotary_base == theirs.model.rotary_base


def test_partial_rotation_is_exported_where_it_is_read():
    """Most families of transformers ignore partial_rotary_factor without a word."""
    family, config = family_and_config("glm4_moe")
    run = run_config_of(family, config)
    assert run.rotary.rotary_percent == 0.5
    written = config_json_of(family, run)
    assert written["rope_parameters"].get("partial_rotary_factor", 0.5) == 0.5
    llama, config = family_and_config("llama")
    run = run_config_of(llama, config)
    half = dataclasses.replace(run, rotary=RotaryConfig(rotary_percent=0.5))
    with pytest.raises(ValueError, match="--rotary-percent is 0.5; allowed in .* llama: 1.0"):
        config_json_of(llama, half)
