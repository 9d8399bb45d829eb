"""Copies of layers and models: process groups are shared, tensors are not."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.moe_layers import make_carry, make_input, make_layer
from helpers.spawn import groups_for
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import Gate
from megatron.parallel.groups import Groups


def _copied(name):
    """Compare a sharded layer with its copy; return the error of pickling it."""
    groups = groups_for(2)
    layer = make_layer(name, groups, layer=1)
    x, ids = make_input(9)
    context = FFNContext(ids, make_carry(layer.gate, 9))
    expected = layer(x, context).y
    twin = copy.deepcopy(layer)
    assert twin.groups is layer.groups and twin.dispatcher.group is layer.dispatcher.group
    assert torch.equal(twin(x, context).y, expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x, context).y, expected)
    assert not twin(x, context).y.any()
    with pytest.raises(TypeError) as error:
        pickle.dumps(layer)
    return str(error.value)


@pytest.mark.parametrize("name", ["topk", "deepseek_v3", "peer"])
def test_sharded_layer_is_copied(name, ranks2):
    for message in ranks2.run(_copied, name):
        assert "cannot be pickled; allowed: its state_dict()" in message


def test_model_is_copied_and_pickled():
    """In one process, which has no process groups."""
    model = build_model(
        ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=8),
        MoEConfig(num_experts=4),
        {},
        vocab_size=64,
        seed=1,
        groups=Groups(),
    ).eval()
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)


def test_scalar_parameter_is_refused():
    """Its ranges cannot be stored or sharded; the gate's name and the parameter's are given."""
    from megatron.model.builder import make_moe_layer
    from megatron.moe.gate import GateContext

    class ScalarGate(Gate):
        def __init__(self):
            super().__init__(None, GateContext(8, 4))
            self.temperature = nn.Parameter(torch.tensor(1.0))

    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    with pytest.raises(
        ValueError, match=r"temperature of ScalarGate has shape \(\); allowed: one"
    ):
        make_moe_layer(
            ScalarGate(), model, MoEConfig(num_experts=4), layer=0, seed=0, groups=Groups()
        )
