"""config.json and our configuration: values, rotary positions, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron.config.schema import ModelConfig, MoEConfig, RunConfig
from megatron.interop.hf.config_map import (
    config_json_of,
    first_difference,
    run_config_of,
    settings_of,
)
from megatron.interop.hf.config_rules import Fixed
from megatron.interop.hf.export_config import merged_config
from megatron.interop.hf.registry import choose_family, find_family

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 8192,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}


def settings(content):
    return settings_of(find_family(content["model_type"]), content)


def test_mixtral_becomes_our_flags():
    """The coefficient of the balance loss is multiplied by k; a sample is not 8192 tokens."""
    run = run_config_of(find_family("mixtral"), {**MIXTRAL, "router_aux_loss_coef": 0.02})
    assert run.model.num_query_groups == 2
    assert run.model.max_positions == 8192 and run.model.seq_length == 4096
    assert run.model.rotary_base == 1e6
    assert run.model.padded_vocab(64) == 64
    assert run.model.untie_embeddings_and_output_weights
    assert run.moe.moe_ffn_hidden_size == 48 and run.moe.num_experts == 4
    options = run.gate_options["topk"]
    assert options["topk"] == 2 and options["norm_topk_prob"]
    assert options["loss_coeff"] == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"), (None, "fp32")],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_the_compute_precision(key, dtype, precision):
    run = run_config_of(find_family("llama"), {**LLAMA, key: dtype})
    assert run.optimizer.precision == precision


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"model.rotary_base": 10000.0, "rotary.rope_scaling": "none"}),
        ({"rope_theta": 5.0}, {"model.rotary_base": 5.0}),
        ({"rope_scaling": None, "rope_parameters": None}, {"model.rotary_base": 10000.0}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7.0},
            {
                "rotary.rope_scaling": "linear",
                "rotary.rope_scaling_factor": 2.0,
                "model.rotary_base": 7.0,
            },
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 3.0}},
            {"rotary.rope_scaling": "yarn", "rotary.rope_original_max_positions": 8192},
        ),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": None, "truncate": False},
                "original_max_position_embeddings": 2048,
            },
            {
                "rotary.rope_scaling_factor": 4.0,
                "rotary.rope_original_max_positions": 2048,
                "rotary.yarn_truncate": False,
            },
        ),
    ],
)
def test_rotary_positions_of_all_versions(keys, expected):
    found = settings({**LLAMA, **keys})
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'; allowed"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type is"),
        ({"rope_scaling": "yarn"}, "rope_parameters is 'yarn'; allowed: an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope factor is None"),
        ({"rope_parameters": {"mrope_section": [1]}}, "rope parameter 'mrope_section'"),
        ({"new_attention": True}, "'new_attention' is True; allowed: no such key"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: \"silu\""),
        ({"mlp_bias": True}, "mlp_bias is True; allowed: false. Dense layers"),
        ({"hidden_size": ["32"]}, "model.hidden_size"),
        ({"hidden_size": 30}, "--num-attention-heads"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; allowed: true or false"),
        ({"vocab_size": None}, "model.vocab_size"),
    ],
)
def test_bad_values_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        run_config_of(find_family("llama"), {**LLAMA, **keys})


def test_missing_key_is_named():
    """The family has no default for it."""
    family = replace(find_family("llama"), defaults={})
    with pytest.raises(ValueError, match="config.json has no key 'num_hidden_layers'"):
        settings_of(family, {"model_type": "llama"})


def test_true_is_not_one():
    """1 and 1.0 are equal to true in Python; in a config.json they are mistakes."""
    rule = Fixed("switch", (True,))
    assert rule.to_ours({"switch": True}) == {}
    with pytest.raises(ValueError, match="switch is 1; allowed: true"):
        rule.to_ours({"switch": 1})


# Export


def ours(**changes):
    """Return our configuration of a small Mixtral."""
    run = run_config_of(find_family("mixtral"), MIXTRAL)
    for section, values in changes.items():
        if section == "gate_options":
            options = {"topk": {**run.gate_options["topk"], **values}}
            run = replace(run, gate_options=options)
        else:
            run = replace(run, **{section: replace(getattr(run, section), **values)})
    return run


def test_equal_models_in_other_words_are_expressed():
    """Defaults that mean a value, and settings of training alone, make no difference."""
    run = ours(
        model={
            "kv_channels": 8,
            "seq_length": 16,
            "hidden_dropout": 0.1,
            "activation": "gelu",
            "swiglu": True,
        },
        moe={
            "moe_train_capacity_factor": 2.0,
            "moe_backend": "reference",
            "moe_layers": (0, 1),
        },
        gate_options={"z_loss_coeff": 0.1, "balance_scope": "sequence"},
    )
    assert first_difference(find_family("mixtral"), run) == ""
    content = config_json_of(find_family("mixtral"), run)
    assert content["intermediate_size"] == 48 and content["num_key_value_heads"] == 2


def test_default_widths_are_spelled_out():
    """0 means a width that follows from others, in our configuration only."""
    model = ModelConfig(activation="swiglu", hidden_size=48)
    content = config_json_of(find_family("llama"), RunConfig(model=model))
    assert content["intermediate_size"] == model.ffn_size == 128
    content = config_json_of(find_family("moe_megatron"), RunConfig(model=model))
    assert content["run"]["model"]["ffn_hidden_size"] == 0
    run = ours(model={"ffn_hidden_size": 40}, moe={"moe_ffn_hidden_size": 0})
    assert config_json_of(find_family("mixtral"), run)["intermediate_size"] == 40


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"model": {"activation": "geglu"}}, "--activation is 'geglu'"),
        ({"model": {"normalization": "LayerNorm"}}, "--normalization"),
        ({"model": {"position_embedding_type": "learned"}}, "--position-embedding-type"),
        ({"moe": {"moe_layers": (1,)}}, r"--gate is \[None, 'topk'\]"),
        ({"moe": {"moe_shared_experts": 1}}, "--moe-shared-expert-intermediate-size is 48"),
        ({"moe": {"moe_weight_on_input": True}}, "--moe-weight-on-input"),
        ({"gate_options": {"norm_topk_prob": False}}, "--norm-topk-prob is False"),
        ({"gate_options": {"bias_rule": "quantile"}}, "--bias-rule is 'sign'"),
        ({"attention": {"add_qkv_bias": True}}, "--add-qkv-bias"),
    ],
)
def test_what_mixtral_lacks_is_named(changes, flag):
    run = ours(**changes)
    with pytest.raises(ValueError, match=f"{flag}.*--family moe_megatron"):
        config_json_of(find_family("mixtral"), run)


def test_original_keys_keep_their_spelling():
    """Only what training has changed is written again."""
    family = find_family("mixtral")
    original = {
        **MIXTRAL,
        "rope_theta": 5e4,
        "torch_dtype": "bfloat16",
        "eos_token_id": 7,
        "num_experts_per_tok": 3,
        "router_aux_loss_coef": 0.001,
    }
    run = run_config_of(family, original)
    assert merged_config(family, original, run) == original
    run = replace(run, model=replace(run.model, max_position_embeddings=100, seq_length=64))
    merged = merged_config(family, original, run)
    assert merged == {**original, "max_position_embeddings": 100}


def test_family_is_chosen_for_the_model():
    dense = RunConfig(model=ModelConfig(activation="swiglu"))
    assert choose_family("auto", dense).name == "llama"
    problem = first_difference(find_family("mixtral"), dense)
    assert problem.startswith("--num-experts is 0; allowed in the family mixtral: 1 or more.")
    assert choose_family("auto", ours()).name == "mixtral"
    assert choose_family("auto", ours(), origin="mixtral").name == "mixtral"
    with pytest.raises(ValueError, match="--family is 'gpt9'; allowed"):
        choose_family("gpt9", dense)


def test_experts_are_no_part_of_llama():
    run = RunConfig(
        model=ModelConfig(activation="swiglu"), moe=MoEConfig(num_experts=4, gate="topk")
    )
    problem = first_difference(find_family("llama"), run)
    assert problem.startswith("--num-experts is 4; allowed in the family llama: 0.")


@pytest.mark.parametrize("gate", ["threshold", "remoe", "peer", "moepp"])
def test_another_gate_is_the_reason(gate):
    """Not an option that this gate does not have."""
    run = RunConfig(
        model=ModelConfig(activation="swiglu"), moe=MoEConfig(num_experts=4, gate=gate)
    )
    problem = first_difference(find_family("mixtral"), run)
    assert problem.startswith(f"--gate is {gate!r}; allowed in the family mixtral: 'topk'.")


def test_nan_is_named_as_the_value():
    with pytest.raises(ValueError, match="nan") as caught:
        run_config_of(find_family("mixtral"), {**MIXTRAL, "rms_norm_eps": float("nan")})
    assert "other name" not in str(caught.value)
