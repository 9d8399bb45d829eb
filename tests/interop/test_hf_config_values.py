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
    ],
)
def test_refused_value_is_named(model_type, key, value):
    """`num_experts` is another name of a key that the configuration has, with another value."""
    family, config = family_and_config(model_type)
    if key == "rotary_dim":
        del config["rope_parameters"]
    with pytest.raises(ValueError, match=f"config.json.*{key}"):
        run_config_of(family, {**config, key: value})
