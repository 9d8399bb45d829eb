"""Released models in their full sizes: their config.json, and the names and shapes of tensors.

Nothing is allocated: both models are on `meta`.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import pytest
import torch

from helpers.hf_models import families_under_test
from helpers.hf_released import RELEASED
from megatron.config.effect import reset_without_effect
from megatron.interop.hf.config_map import (
    COMMON_KEYS,
    first_difference,
    run_config_of,
)
from megatron.interop.hf.export_config import merged_config
from megatron.interop.hf.registry import find_family
from megatron.interop.hf.tensor_map import map_tensors
from megatron.interop.model_specs import model_specs

pytest.importorskip("transformers", reason="the reference implementations are not installed")

NAMES = [
    name for name in RELEASED if RELEASED[name].config["model_type"] in families_under_test()
]
every_release = pytest.mark.parametrize("name", NAMES)
BLOCKS = 4
SECTIONS = ("attention", "rotary", "moe", "gate_options", "expert_options")


def released_config(name, blocks=None):
    """Keys of a released config.json, with all blocks or the first ones."""
    config = {**RELEASED[name].config}
    if blocks:
        config["num_hidden_layers"] = blocks
        for key in ("layer_types", "attn_type_list"):
            if key in config:
                config[key] = config[key][:blocks]
    return config


def family_of_release(name):
    return find_family(RELEASED[name].config["model_type"])


def our_config(name, blocks=None):
    return run_config_of(family_of_release(name), released_config(name, blocks))


def their_config(name, blocks=None):
    from transformers import AutoConfig

    config = released_config(name, blocks)
    config.pop("quantization_config", None)
    return AutoConfig.for_model(**config)


@every_release
def test_unchanged_model_has_an_unchanged_config(name):
    """A training run resets settings without effect, such as the width of absent dense layers."""
    family = family_of_release(name)
    content = released_config(name)
    run = run_config_of(family, content)
    for trained in (run, reset_without_effect(run)):
        assert merged_config(family, content, trained) == content


def their_shapes(name, blocks):
    """Shapes of the tensors of transformers' model, whose experts are fused, by name."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(their_config(name, blocks))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@cache
def our_shapes(name, blocks):
    config = our_config(name, blocks)
    return model_specs(config, config.model.vocab_size).all_shapes


@cache
def mapped_shapes(name, layout, blocks):
    """Shapes of their tensors as our rules have them."""
    family = family_of_release(name)
    chosen = [candidate for candidate in family.layouts if candidate.name == layout]
    shapes = our_shapes(name, blocks)
    return map_tensors(family, chosen[0] if chosen else None, shapes).shapes


def with_head_size(config):
    """Return the model's settings with the size of heads that 0 means."""
    return dataclasses.replace(config.model, kv_channels=config.model.head_size)


@every_release
def test_config_means_what_transformers_reads(name):
    """Earlier keys are understood as transformers does, which writes them in its present form."""
    family = family_of_release(name)
    written = their_config(name).to_dict()
    known = family.known_keys | COMMON_KEYS
    theirs = run_config_of(family, {k: v for k, v in written.items() if k in known})
    ours = our_config(name)
    assert with_head_size(ours) == with_head_size(theirs)
    for section in SECTIONS:
        assert getattr(ours, section) == getattr(theirs, section), section
    assert ours.optimizer.bf16


@every_release
def test_released_model_can_be_exported(name):
    family = family_of_release(name)
    assert first_difference(family, our_config(name)) == ""


@every_release
def test_tensors_are_those_of_transformers(name):
    """Names and shapes in the first blocks, dense ones and others."""
    assert mapped_shapes(name, "fused", BLOCKS) == their_shapes(name, BLOCKS)


@pytest.mark.slow
@every_release
def test_full_model_has_all_parameters(name):
    theirs = their_shapes(name, None)
    assert mapped_shapes(name, "fused", None) == theirs
    billions = sum(math.prod(shape) for shape in theirs.values()) / 1e9
    assert billions == pytest.approx(RELEASED[name].billions, rel=0.01)


@pytest.mark.parametrize(
    "name, tensor, shape",
    [
        ("Mixtral-8x7B", "model.layers.3.block_sparse_moe.experts.7.w2.weight", (4096, 14336)),
        ("Mixtral-8x7B", "model.layers.0.block_sparse_moe.gate.weight", (8, 4096)),
        ("Qwen1.5-MoE-A2.7B", "model.layers.0.mlp.experts.59.up_proj.weight", (1408, 2048)),
        ("Qwen1.5-MoE-A2.7B", "model.layers.0.mlp.shared_expert_gate.weight", (1, 2048)),
        ("Qwen3-30B-A3B", "model.layers.3.self_attn.q_norm.weight", (128,)),
        ("Qwen3-30B-A3B", "model.layers.0.mlp.experts.127.gate_proj.weight", (768, 2048)),
        ("OLMoE-1B-7B", "model.layers.0.self_attn.k_norm.weight", (2048,)),
        ("OLMoE-1B-7B", "model.layers.0.mlp.experts.63.down_proj.weight", (2048, 1024)),
        ("DeepSeek-V2-Lite", "model.layers.0.self_attn.q_proj.weight", (3072, 2048)),
        ("DeepSeek-V2-Lite", "model.layers.0.mlp.gate_proj.weight", (10944, 2048)),
        ("DeepSeek-V2", "model.layers.1.mlp.shared_experts.up_proj.weight", (3072, 5120)),
        ("DeepSeek-V2", "model.layers.0.self_attn.kv_b_proj.weight", (32768, 512)),
        ("DeepSeek-V3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (576, 7168)),
        ("DeepSeek-V3", "model.layers.3.mlp.gate.e_score_correction_bias", (256,)),
        ("DeepSeek-V3", "model.layers.3.mlp.experts.255.down_proj.weight", (7168, 2048)),
        ("gpt-oss-20b", "model.layers.0.mlp.experts.gate_up_proj_bias", (32, 5760)),
        ("gpt-oss-20b", "model.layers.3.self_attn.sinks", (64,)),
        ("GLM-4.5-Air", "model.layers.3.mlp.experts.127.down_proj.weight", (4096, 1408)),
        ("MiniMax-M2", "model.layers.0.block_sparse_moe.e_score_correction_bias", (256,)),
        ("MiniMax-M2", "model.layers.3.block_sparse_moe.experts.255.w1.weight", (1536, 3072)),
    ],
)
def test_released_names_are_known(name, tensor, shape):
    """Tensors of released files, which have one tensor per expert and projection."""
    assert mapped_shapes(name, "per expert", BLOCKS)[tensor] == shape
