"""Models whose layers have different gates."""

from __future__ import annotations

import pytest
import torch

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.moe.gate_update import GateUpdater
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.metrics import MoEMetrics
from megatron.parallel.groups import Groups

MODEL = ModelConfig(
    num_layers=4, hidden_size=8, num_attention_heads=2, seq_length=6, ffn_hidden_size=12
)


def build(gate, options=None, seed=1, **moe):
    config = MoEConfig(num_experts=4, gate=gate, moe_ffn_hidden_size=8, **moe)
    return build_model(MODEL, config, options or {}, vocab_size=20, seed=seed, groups=Groups())


def run(model):
    tokens = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    out = model(tokens[:, :-1], tokens[:, 1:])
    out.loss.backward()
    return out


def test_every_layer_has_its_gate_and_options():
    options = {"topk": {"topk": 3}, "deepseek_v3": {"topk": 1, "norm_topk_prob": False}}
    model = build("hash@0,deepseek_v3@1,topk@2,deepseek_v3@3", options)
    gates = [layer.gate for layer in find_moe_layers(model)]
    assert [gate.name for gate in gates] == ["hash", "deepseek_v3", "topk", "deepseek_v3"]
    assert [gates[i].config.topk for i in (1, 2, 3)] == [1, 3, 1]
    contexts = [gate.context for gate in gates]
    assert [(c.layer, c.num_moe_layers, c.gate_layer) for c in contexts] == [
        (0, 4, 0),
        (1, 4, 0),
        (2, 4, 0),
        (3, 4, 1),
    ]
    run(model)
    metrics = MoEMetrics(model, Groups()).read()
    assert metrics["experts_per_token_by_layer"] == [1, 1, 3, 1]
    for parameter in model.parameters():
        assert parameter.grad is not None


@pytest.mark.parametrize(
    "listed, flags",
    [
        ("dense@0,topk@1-", {"moe_first_k_dense": 1}),
        ("dense@0+2,topk@1+3", {"expert_interval": 2}),
        ("topk@0-", {}),
    ],
)
def test_list_equals_layer_flags(listed, flags):
    """Weights, losses and gradients are equal bit for bit."""
    models = [build(listed), build("topk", **flags)]
    losses = [run(model).loss for model in models]
    assert torch.equal(*losses)
    for (name, a), (other, b) in zip(
        models[0].named_parameters(), models[1].named_parameters(), strict=True
    ):
        assert name == other and torch.equal(a, b) and torch.equal(a.grad, b.grad)


def test_carry_comes_from_the_same_gate():
    """The residual logits of MoE++ skip the layers between, and start at its first layer."""
    model = build("topk@0,moepp@1,topk@2,moepp@3")
    first, second = [model.layers[i].mlp.gate for i in (1, 3)]
    seen = {}

    def record(gate, args, out):
        seen[gate.context.layer] = (args[0].carry, out.carry)

    for layer in find_moe_layers(model):
        layer.gate.register_forward_hook(record)
    run(model)
    assert first.residual is None and second.residual is not None
    assert seen[1][0] is None and seen[0][0] is None and seen[2][0] is None
    assert torch.equal(seen[3][0], seen[1][1])
    assert second.residual.weight.grad.abs().sum() > 0


def test_state_follows_layers_with_the_same_gate():
    """The penalty of ReMoE counts its own layers' loads: others would change its sign."""
    options = {"remoe": {"topk": 1}, "topk": {"topk": 4}}
    model = build("topk@0-1,remoe@2,topk@3", options)
    gate = model.layers[2].mlp.gate
    totals = []
    gate.post_optimizer_step = totals.append
    run(model)
    load_E = model.layers[2].mlp.step_sums["load_E"].float()
    GateUpdater(model, Groups()).post_optimizer_step()
    assert torch.equal(totals[0].load_LE, load_E[None])


def test_options_of_other_gates_are_no_options():
    with pytest.raises(AssertionError, match=r"gate_options has \['topk'\]; allowed: hash"):
        build("hash", {"topk": 2})
