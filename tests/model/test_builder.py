"""The model of a run: which layers are MoE layers, their options, and their initial weights."""

import torch

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.model.mlp import MLP
from megatron.moe.layer import MoELayer
from megatron.parallel.groups import Groups

MODEL = ModelConfig(
    num_layers=5, hidden_size=16, num_attention_heads=2, seq_length=8, ffn_hidden_size=32
)


def build(ep_size=1, rank=0, seed=3, **moe):
    config = MoEConfig(
        **{
            "num_experts": 4,
            "gate": "threshold",
            "moe_ffn_hidden_size": 8,
            "moe_expert_parallel_size": ep_size,
            **moe,
        }
    )
    return build_model(
        MODEL,
        config,
        {"threshold": {"threshold": 0.5}},
        vocab_size=100,
        seed=seed,
        groups=Groups(rank=rank, world_size=ep_size, ep_size=ep_size),
    )


def test_moe_layers_follow_the_flags():
    def kinds(**moe):
        return [isinstance(b.mlp, MoELayer) for b in build(**moe).layers]

    assert kinds() == [True] * 5
    assert kinds(expert_interval=2) == [False, True, False, True, False]
    assert kinds(expert_interval=2, moe_first_k_dense=2) == [False, False, False, True, False]
    assert kinds(num_experts=0) == [False] * 5
    gates = [
        b.mlp.gate.context
        for b in build(expert_interval=2).layers
        if isinstance(b.mlp, MoELayer)
    ]
    assert [(p.layer, p.num_moe_layers, p.vocab_size) for p in gates] == [
        (0, 2, 100),
        (1, 2, 100),
    ]


def test_moe_options_reach_the_layer():
    layer = (
        build(
            moe_shared_experts=2,
            moe_train_capacity_factor=1.5,
            moe_eval_capacity_factor=2.5,
            moe_min_capacity=7,
        )
        .layers[0]
        .mlp
    )
    assert layer.gate.config.threshold == 0.5 and layer.capacity_factors == {
        True: 1.5,
        False: 2.5,
    }
    assert (
        layer.min_capacity == 7
        and isinstance(layer.shared, MLP)
        and layer.shared.up_proj.out_features == 16
    )
    assert build().embed_tokens.num_embeddings == 128, "the vocabulary should be padded"


def test_weights_do_not_depend_on_sharding():
    unsharded = build(moe_shared_experts=1)
    parts = [build(2, rank, moe_shared_experts=1) for rank in (0, 1)]
    for name, p in unsharded.named_parameters():
        shards = [dict(m.named_parameters())[name] for m in parts]
        if ".experts." in name:
            assert torch.equal(torch.cat(shards), p), name
        else:
            assert all(torch.equal(s, p) for s in shards), name


def test_weights_differ_by_seed_and_layer():
    a, b = build(seed=1), build(seed=2)
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert "norm" in name or not torch.equal(p, q), name
    experts = [block.mlp.experts.w1 for block in a.layers]
    gates = [block.mlp.gate.router.weight for block in a.layers]
    for stack in (experts, gates):
        assert all(not torch.equal(stack[0], other) for other in stack[1:])


def test_shared_experts_have_init_method_std():
    std = build(moe_shared_experts=4).layers[0].mlp.shared.up_proj.weight.std().item()
    assert 0.015 < std < 0.025
