"""Parameter counts by part, for dense, sharded and MoE models."""

import dataclasses

import pytest
import torch

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.model.parameter_count import ParameterCount, count_parameters, parameter_table
from megatron.moe.layer_sums import find_moe_layers
from megatron.parallel.groups import Groups

CONFIG = ModelConfig(
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=8,
    swiglu=True,
    make_vocab_size_divisible_by=32,
)
MOE = MoEConfig(
    num_experts=8,
    moe_ffn_hidden_size=24,
    moe_shared_experts=2,
    moe_first_k_dense=1,
    moe_expert_parallel_size=4,
)


def build(config=CONFIG, moe=MOE, *, device="meta", **groups):
    with torch.device(device):
        return build_model(config, moe, {}, vocab_size=50, seed=0, groups=Groups(**groups))


def build_varying(**kwargs):
    """Build a model whose tokens have 1 to 3 experts."""
    model = build(**kwargs)
    for layer in find_moe_layers(model):
        layer.gate.experts_per_token = lambda config, num_experts: (1, 3)
    return model


def test_parts_equal_counts_by_hand():
    expert = 3 * 16 * 24
    parts = {
        "embedding": 64 * 16,
        "attention": 3 * (2 * 16 * 16 + 2 * 8 * 16),
        "routed experts": 2 * 8 * expert,
        "latent layers": 0,
        "shared experts": 2 * 2 * expert,
        "router": 2 * 8 * 16,
        "dense ffn": 3 * 16 * 40,
        "norms": 7 * 16,
        "output layer": 0,
        "other": 0,
    }
    size = count_parameters(build_varying())
    assert size.parts == parts and size.total == sum(parts.values())
    assert size.active_min == size.total - parts["routed experts"] + 2 * 1 * expert
    assert size.active_max == size.total - parts["routed experts"] + 2 * 3 * expert
    assert count_parameters(build_varying(rank=1, world_size=4, ep_size=4)) == size, (
        "a slice should count as all experts"
    )
    assert count_parameters(build_varying(device="cpu")) == size


def test_active_experts_follow_each_layer():
    """A token has 1 expert of the hash layer and 3 of the top-k layer."""
    moe = MoEConfig(num_experts=8, moe_ffn_hidden_size=24, gate="dense@0,hash@1,topk@2")
    options = {"topk": {"topk": 3}}
    with torch.device("meta"):
        model = build_model(CONFIG, moe, options, vocab_size=50, seed=0, groups=Groups())
    size = count_parameters(model)
    expert = 3 * 16 * 24
    assert size.parts["routed experts"] == 2 * 8 * expert
    assert size.parts["router"] == 8 * 16, "the hash layer has none"
    assert size.active_min == size.active_max
    assert size.total - size.active_max == (7 + 5) * expert


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("untied", [False, True])
def test_dense_model_is_all_active(position, untied):
    config = dataclasses.replace(
        CONFIG, position_embedding_type=position, untie_embeddings_and_output_weights=untied
    )
    model = build(config, MoEConfig())
    size = count_parameters(model)
    assert (
        size.total
        == size.active_min
        == size.active_max
        == sum(p.numel() for p in model.parameters())
    )
    assert size.parts["embedding"] == 64 * 16 + (8 * 16 if position == "learned" else 0)
    assert size.parts["output layer"] == (64 * 16 if untied else 0)


def test_unknown_parameter_counts_as_other():
    model = build(moe=MoEConfig())
    model.temperature = torch.nn.Parameter(torch.ones(3))
    assert count_parameters(model).parts["other"] == 3


def test_parameter_table_formats_counts():
    size = ParameterCount(
        3_512_000_000,
        {"embedding": 12_000_000, "routed experts": 3_500_000_000, "router": 0},
        112_000_000,
        1_512_000_000,
    )
    assert parameter_table(size).splitlines() == [
        "parameters               all   active per token",
        "embedding            12.00 M   12.00 M",
        "routed experts        3.50 B   100.00 M to 1.50 B",
        "total                 3.51 B   112.00 M to 1.51 B",
    ]


def test_parameter_table_has_trainable_column():
    """It is there if some parameters are frozen, and active parameters are counted as before."""
    model = build_varying()
    plain = count_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." not in name and "norm" not in name)
    size = count_parameters(model)
    expert = plain.parts["routed experts"]
    assert size.frozen_parts == {"routed experts": expert, "norms": 7 * 16}
    assert size.trainable == plain.total - expert - 7 * 16 and plain.trainable == plain.total
    assert (size.total, size.active_max) == (plain.total, plain.active_max)
    sharded = build_varying(rank=1, world_size=4, ep_size=4)
    for name, parameter in sharded.named_parameters():
        parameter.requires_grad_(".experts." not in name and "norm" not in name)
    assert count_parameters(sharded) == size
    size = ParameterCount(
        112_000_000,
        {"embedding": 12_000_000, "attention": 100_000_000, "norms": 0},
        112_000_000,
        112_000_000,
        {"embedding": 12_000_000},
    )
    size.parts["routed experts"] = 0
    assert parameter_table(size).splitlines() == [
        "parameters               all   trainable   active per token",
        "embedding            12.00 M      0.00 M   12.00 M",
        "attention           100.00 M    100.00 M   100.00 M",
        "total               112.00 M    100.00 M   112.00 M",
    ]


def test_biases_and_latent_projections_are_counted():
    """Experts of N = 4 features with biases; the projections are used by every token."""
    moe = dataclasses.replace(MOE, expert_type="swiglu_clamped", moe_latent_size=4)
    expert = 3 * 4 * 24 + 2 * 24 + 4
    for groups in ({}, {"rank": 1, "world_size": 4, "ep_size": 4}):
        size = count_parameters(build_varying(moe=moe, **groups))
        assert size.parts["routed experts"] == 2 * 8 * expert
        assert size.parts["latent layers"] == 2 * 2 * 16 * 4
        assert size.parts["other"] == 0
        assert size.active_max - size.active_min == 2 * 2 * expert
    assert "latent layers" in parameter_table(size)


def test_given_experts_replace_the_range():
    """The mean of each layer counts; a token cannot use an expert twice."""
    size = count_parameters(build_varying(), [1.5, 2.0])
    expert = 3 * 16 * 24
    outside = size.total - size.parts["routed experts"]
    assert size.active_min == size.active_max == outside + 3.5 * expert
    size = count_parameters(build_varying(), [8.0, 20.0])
    assert size.active_max == size.total
