"""The gate and the width of the shared expert against Qwen2-MoE's block in transformers."""

import pytest
import torch

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.model.parameter_count import count_parameters
from megatron.parallel.groups import Groups

MODEL = ModelConfig(
    num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=8, activation="swiglu"
)
MOE = MoEConfig(
    num_experts=4,
    moe_ffn_hidden_size=12,
    moe_shared_experts=1,
    moe_shared_expert_intermediate_size=20,
    moe_shared_expert_gate=True,
)
OPTIONS = {"topk": {"topk": 2, "norm_topk_prob": False}}


def build_layer():
    model = build_model(MODEL, MOE, OPTIONS, vocab_size=30, seed=0, groups=Groups())
    return model, model.layers[0].mlp


def test_gated_shared_expert_equals_qwen2_moe():
    pytest.importorskip("transformers", reason="the reference is not installed")
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        norm_topk_prob=False,
        experts_implementation="eager",
    )
    theirs = Qwen2MoeSparseMoeBlock(config)
    for parameter in theirs.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    _, ours = build_layer()
    state = theirs.state_dict()
    gate, up = state["experts.gate_up_proj"].chunk(2, 1)
    pairs = {
        "gate.router.weight": state["gate.weight"],
        "experts.w1": gate,
        "experts.w3": up,
        "experts.w2": state["experts.down_proj"],
        "shared_gate.weight": state["shared_expert_gate.weight"],
    }
    for name in ("gate_proj", "up_proj", "down_proj"):
        pairs[f"shared.{name}.weight"] = state[f"shared_expert.{name}.weight"]
    ours.load_state_dict(pairs)
    x = torch.randn(2, 8, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = theirs(inputs[0])
    y = ours(inputs[1]).y
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(y)
    (expected * weight).sum().backward()
    (y * weight).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.shared_gate.weight.grad, theirs.shared_expert_gate.weight.grad
    )
    torch.testing.assert_close(
        ours.shared.down_proj.weight.grad, theirs.shared_expert.down_proj.weight.grad
    )


def test_shared_expert_has_its_own_width():
    model, layer = build_layer()
    assert layer.shared.up_proj.out_features == 20
    assert count_parameters(model).parts["shared experts"] == 3 * 16 * 20 + 16
