"""MoE layers under DeepSpeed train as in plain torch, at every ZeRO stage and sharding."""

import functools
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron.config.schema import (
    DeepSpeedConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from megatron.moe.gate import available_gates
from megatron.parallel.groups import Groups
from megatron.training.task import LM_LOSS, NextTokenLoss

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    seq_length=8,
    activation="swiglu",
    ffn_hidden_size=24,
    init_method_std=0.3,
)
# A large epsilon keeps Adam smooth: with a tiny one, a gradient of rounding size would
# move a weight by the full learning rate.
OPTIMIZER = {"lr": 0.02, "adam_eps": 1e-2, "clip_grad": 0.5, "weight_decay": 0.1}
STEPS, VOCAB = 3, 64
# Options of gates whose default auxiliary loss is too small in the first steps to change
# the weights visibly.
LARGE_LOSS_OPTIONS = {"remoe": {"lambda_init": 0.1}, "deepseek_v3": {"loss_coeff": 0.1}}
WITHOUT_LOSS = {"base", "expert_choice", "expert_threshold", "hash", "longcat", "peer"}
WITHOUT_LOSS |= {"hash with weights"}
ALWAYS = {"topk", "deepseek_v3", "peer"}
"""Gates whose tests are not slow on any topology: a loss, buffers, and experts of another kind"""
GATES_WITH_OPTIONS = {
    "topk with all options": (
        "topk",
        {
            "score_function": "sqrtsoftplus",
            "bias_rule": "sign",
            "bias_update_speed": 0.1,
            "router_bias": True,
            "router_norm": True,
            "expert_scale": True,
            "logit_softcap": 2.0,
        },
    ),
    "hash with weights": ("hash", {"topk": 2, "learned_weights": True}),
}
"""Gate and options by a name of this file's tests"""


EXPERT_TYPES = {
    "": {},
    "biases": {"expert_type": "swiglu_clamped"},
    "latent": {"moe_latent_size": 4, "moe_weight_on_input": True},
}
"""Fields of MoEConfig by a name of this file's tests"""


def build(gate, groups, activation="swiglu", shared=1, experts=""):
    """This rank's part of the model."""
    from megatron.model.builder import build_model

    options = LARGE_LOSS_OPTIONS.get(gate, {})
    if gate in GATES_WITH_OPTIONS:
        gate, options = GATES_WITH_OPTIONS[gate]
    moe = MoEConfig(
        num_experts=4,
        gate=gate,
        moe_ffn_hidden_size=8,
        moe_shared_experts=shared,
        moe_expert_parallel_size=groups.ep_size,
        **EXPERT_TYPES[experts],
    )
    return build_model(
        replace(MODEL, activation=activation),
        moe,
        {gate: options},
        vocab_size=VOCAB,
        seed=7,
        groups=groups,
    )


def micro_batches(step):
    """The four micro-batches of a step."""
    from megatron.data.loader import Batch

    g = torch.Generator().manual_seed(step)
    for _ in range(4):
        ids = torch.randint(0, VOCAB, (1, 9), generator=g)
        yield Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, 8), None, None)


@functools.cache
def train_in_plain_torch(gate, activation="swiglu", experts=""):
    """Train in one process without DeepSpeed.

    Returns:
        Losses, gradient norms before clipping, and final weights by name.
    """
    from megatron.engine.optimizer import parameter_groups
    from megatron.moe.gate_update import GateUpdater

    model = build(gate, Groups(), activation, experts=experts)
    gate_updater = GateUpdater(model, Groups())
    adamw = torch.optim.AdamW(
        parameter_groups(model, OPTIMIZER["weight_decay"]),
        lr=OPTIMIZER["lr"],
        betas=(0.9, 0.95),
        eps=OPTIMIZER["adam_eps"],
    )
    losses = []
    norms = []
    for step in range(STEPS):
        total = 0.0
        for b in micro_batches(step):
            out = model(b.tokens_BS, b.labels_BS, b.loss_mask_BS)
            if step == 0 and gate in WITHOUT_LOSS:
                assert out.aux_loss == 0
            elif step == 0:
                assert out.aux_loss > 1e-3, "the auxiliary loss must be visible"
            (out.loss / 4).backward()
            total += out.lm_loss.item() / 4
        losses.append(total)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"])
        norms.append(float(norm))
        adamw.step()
        adamw.zero_grad()
        gate_updater.post_optimizer_step()
    return losses, norms, {n: p.detach() for n, p in model.named_parameters()}


def _train_with_deepspeed(gate, stage, precision="fp32", activation="swiglu", experts=""):
    """Run the same training in a rank under DeepSpeed, experts sharded over two ranks."""
    from megatron.engine import distributed
    from megatron.engine.engine import Engine
    from megatron.parallel import groups as parallel

    os.environ.update(
        RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0"
    )
    groups = distributed.init_distributed(min(2, dist.get_world_size()))
    model = build(gate, groups, activation, experts=experts)
    optimizer = OptimizerConfig(bf16=precision == "bf16", **OPTIMIZER)
    engine = Engine(
        model,
        optimizer,
        DeepSpeedConfig(zero_stage=stage),
        TrainConfig(micro_batch_size=1, global_batch_size=4),
        groups,
    )
    losses = []
    norms = []
    for step in range(STEPS):
        mine = list(micro_batches(step))[groups.rank :: groups.world_size]
        step_losses = engine.step(mine, NextTokenLoss(), OPTIMIZER["lr"], 0.0)
        losses.append(parallel.all_reduce_mean(float(step_losses[LM_LOSS]), groups))
        norms.append(engine.grad_norm())
    weights = {}
    for name, p in engine.model.named_parameters():
        full = p.detach()
        if stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([p]):
                full = p.detach().clone()
        weights[name] = full.clone()
    return losses, norms, weights


def topologies():
    """Return parameters (gate, ranks, stage); some of most gates are slow tests."""
    for world, stage in [(1, 1), (2, 1), (2, 2), (2, 3), (4, 1), (4, 2), (4, 3)]:
        for gate in available_gates():
            always = (world, stage) in [(1, 1), (2, 3), (4, 3)] or gate in ALWAYS
            yield pytest.param(gate, world, stage, marks=[] if always else pytest.mark.slow)


@pytest.mark.parametrize("gate, world, stage", list(topologies()))
def test_training_equals_plain_torch(gate, world, stage, request):
    """Losses, gradient norms and every weight after three clipped steps, by name."""
    losses, norms, weights = train_in_plain_torch(gate)
    ranks = request.getfixturevalue(f"ranks{world}")
    results = ranks.run(_train_with_deepspeed, gate, stage)
    assert norms[0] > OPTIMIZER["clip_grad"], "clipping must have an effect"
    for got_losses, got_norms, _ in results:
        assert got_losses == pytest.approx(losses, abs=1e-5)
        assert got_norms == pytest.approx(norms, rel=1e-4)
    check_weights(weights, results)


def check_weights(weights, results):
    """Compare every weight, and its copies on other ranks."""
    for name, expected in weights.items():
        parts = [result[2][name] for result in results]
        if ".experts." in name:
            got = torch.cat(parts[:2])
            copies = zip(parts[:2], parts[2:])
        else:
            got = parts[0]
            copies = zip(parts, parts[1:])
        torch.testing.assert_close(
            got, expected, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert all(torch.equal(a, b) for a, b in copies), f"{name} differs between ranks"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("gate", GATES_WITH_OPTIONS)
def test_gate_options_train_as_in_plain_torch(gate, stage, ranks2):
    """Learned vectors of a router, too: reduced, clipped, and moved on all ranks alike."""
    losses, norms, weights = train_in_plain_torch(gate)
    results = ranks2.run(_train_with_deepspeed, gate, stage)
    for got_losses, got_norms, _ in results:
        assert got_losses == pytest.approx(losses, abs=1e-5)
        assert got_norms == pytest.approx(norms, rel=1e-4)
    check_weights(weights, results)
    start = dict(build(gate, Groups()).named_parameters())
    moved = [n for n, p in weights.items() if ".gate." in n and not torch.equal(p, start[n])]
    number = {"topk with all options": 4, "hash with weights": 1}[gate]
    assert len(moved) == number * MODEL.num_layers


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("experts", ["biases", "latent"])
def test_expert_types_train_as_in_plain_torch(experts, stage, ranks2):
    """Biases and latent projections, too: their gradients are reduced over the right ranks, and
    biases, which start as zeros, move without weight decay."""
    losses, norms, weights = train_in_plain_torch("topk", experts=experts)
    results = ranks2.run(_train_with_deepspeed, "topk", stage, "fp32", "swiglu", experts)
    for got_losses, got_norms, _ in results:
        assert got_losses == pytest.approx(losses, abs=1e-5)
        assert got_norms == pytest.approx(norms, rel=1e-4)
    check_weights(weights, results)
    added = {"biases": "experts.b1", "latent": "fc1_latent_proj"}[experts]
    moved = [weight for name, weight in weights.items() if added in name]
    assert len(moved) == MODEL.num_layers and all(weight.abs().sum() > 0 for weight in moved)


def test_experts_without_gating_train(ranks2):
    """gelu experts have no w3, which DeepSpeed's own experts have."""
    losses, norms, weights = train_in_plain_torch("topk", "gelu")
    results = ranks2.run(_train_with_deepspeed, "topk", 1, "fp32", "gelu")
    got_losses, got_norms, got_weights = results[0]
    assert got_losses == pytest.approx(losses, abs=1e-5)
    assert got_norms == pytest.approx(norms, rel=1e-4)
    assert got_weights.keys() == weights.keys()
    for name, expected in weights.items():
        if name.endswith("w1"):
            torch.testing.assert_close(
                torch.cat([result[2][name] for result in results]),
                expected,
                atol=1e-5,
                rtol=1e-5,
            )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_router_in_fp32(stage, ranks2):
    """At every stage, although ZeRO flattens other parameters as bf16."""
    losses, _, _ = train_in_plain_torch("threshold")
    for got, _, weights in ranks2.run(_train_with_deepspeed, "threshold", stage, "bf16"):
        assert got == pytest.approx(losses, abs=0.1)
        gate = weights["layers.0.mlp.gate.router.weight"]
        assert gate.dtype == torch.float32
        assert weights["layers.0.mlp.experts.w1"].dtype == torch.bfloat16
        assert not torch.equal(gate, gate.bfloat16().float()), (
            "fp32 weights must not be rounded to bf16"
        )


def test_parameter_groups_have_names():
    """Gates and experts have groups of their own, and no norm is decayed."""
    from megatron.engine.moe_adapter import wrap_moe_layers
    from megatron.engine.optimizer import parameter_groups

    model = build("topk", Groups())
    wrap_moe_layers(model, Groups())
    names = {id(p): n for n, p in model.named_parameters()}
    got = {
        g["name"]: ({names[id(p)] for p in g["params"]}, g["weight_decay"])
        for g in parameter_groups(model, 0.1)
    }
    assert set(got) == {"matrices", "vectors", "gates", "ep_size_1"}
    assert got["gates"] == ({f"layers.{i}.mlp.gate.router.weight" for i in range(2)}, 0.0)
    assert got["ep_size_1"][1] == 0.1 and all(".experts." in n for n in got["ep_size_1"][0])
    assert got["vectors"][1] == 0.0 and "embed_tokens.weight" in got["vectors"][0]
    assert any("norm" in n for n in got["vectors"][0])
    assert not any("norm" in n for n in got["matrices"][0])
    assert set().union(*(g[0] for g in got.values())) == set(names.values())


def test_expert_biases_have_no_weight_decay():
    """They are stacks of vectors; latent projections are matrices that every rank holds."""
    from megatron.engine.moe_adapter import wrap_moe_layers
    from megatron.engine.optimizer import parameter_groups

    decay = {}
    for experts in ("biases", "latent"):
        model = build("topk", Groups(), experts=experts)
        wrap_moe_layers(model, Groups())
        names = {id(p): n.removeprefix("layers.0.mlp.") for n, p in model.named_parameters()}
        for group in parameter_groups(model, 0.1):
            for p in group["params"]:
                is_expert = getattr(p, "allreduce", True) is False
                decay[names[id(p)]] = (group["weight_decay"], group["name"], is_expert)
    for name in ("w1", "w2", "w3"):
        assert decay[f"experts.{name}"] == (0.1, "ep_size_1", True)
    for name in ("b1", "b2", "b3"):
        assert decay[f"experts.{name}"] == (0.0, "ep_size_1", True)
    for name in ("fc1_latent_proj", "fc2_latent_proj"):
        assert decay[f"{name}.weight"] == (0.1, "matrices", False)
