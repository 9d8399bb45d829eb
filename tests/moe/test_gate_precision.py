"""A gate's parameters and buffers stay fp32 when a model is cast, and move with it."""

import pytest
import torch

from helpers.moe_layers import make_carry, make_input, make_layer
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import available_gates

CASTS = {
    "bfloat16": lambda layer: layer.bfloat16(),
    "half": lambda layer: layer.half(),
    "to dtype": lambda layer: layer.to(torch.bfloat16),
    "to device and dtype": lambda layer: layer.to("cpu", torch.bfloat16),
    "to tensor": lambda layer: layer.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda layer: layer.type(torch.bfloat16),
}


def state(gate):
    return {name: tensor.clone() for name, tensor in gate.state_dict().items()}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", available_gates())
def test_casts_leave_gates_alone(name, cast):
    """Bits and dtypes of the gate are unchanged; the experts' are cast."""
    layer = make_layer(name, layer=1)
    before = state(layer.gate)
    CASTS[cast](layer)
    after = state(layer.gate)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key
    assert all(p.dtype in (torch.bfloat16, torch.float16) for p in layer.experts.parameters())
    assert all(p.requires_grad for p in layer.gate.parameters())


@pytest.mark.parametrize("name", available_gates())
def test_cast_layer_routes_as_its_gate(name):
    """The bf16 layer routes as the fp32 gate does on the same bf16 tokens, and trains."""
    layer = make_layer(name, layer=1)
    x, ids = make_input(9)
    x = x.bfloat16().requires_grad_()
    carry = make_carry(layer.gate, 9)
    context = FFNContext(ids, carry)
    expected = layer.gate(layer._gate_input(x, context))
    out = layer.bfloat16()(x, context)
    got = layer.gate(layer._gate_input(x, context))
    assert torch.equal(got.expert_A, expected.expert_A)
    assert torch.equal(got.weight_A, expected.weight_A)
    (out.y.float().sum() + out.aux_loss).backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.gate.parameters())


def test_wider_dtypes_and_devices_apply():
    """Double precision, the meta device and `to_empty` work as for other modules."""
    layer = make_layer("deepseek_v3")
    assert layer.double().gate.router.weight.dtype == torch.float64
    assert layer.float().gate.expert_bias.dtype == torch.float32
    layer.to("meta", torch.bfloat16)
    gate = layer.gate
    assert gate.router.weight.is_meta and gate.router.weight.dtype == torch.float32
    layer.to_empty(device="cpu").bfloat16()
    assert gate.router.weight.device.type == "cpu" and gate.expert_bias.dtype == torch.float32
