"""Recording of assignments during forward passes, against the routing of the gate itself."""

import pytest
import torch
from torch import nn

from helpers.moe_layers import D, make_layer
from megatron.moe.ffn import FFNContext, TokenLayout
from megatron.moe.routing_record import record_routing


def test_assignments_of_two_passes_are_numbered_consecutively():
    """Padding keeps its positions and has no assignments."""
    torch.manual_seed(0)
    model = nn.ModuleList([make_layer("threshold"), make_layer("topk")]).eval()
    passes = torch.randn(2, 1, 5, D)
    padding_BS = torch.zeros(1, 5, dtype=torch.bool)
    padding_BS[0, 1] = True
    context = FFNContext(layout=TokenLayout(padding_BS))
    with record_routing(model) as records:
        for x_BSD in passes:
            for layer in model:
                layer(x_BSD, context)
    for layer, record in zip(model, records, strict=True):
        expected = set()
        for i, x_BSD in enumerate(passes):
            routing = layer.gate(layer._gate_input(x_BSD, context))
            triples = zip(routing.token_A, routing.expert_A, routing.weight_A, strict=True)
            expected |= {(5 * i + int(t), int(e), float(w)) for t, e, w in triples}
        token_A, expert_A, weight_A = record.assignments()
        found = list(zip(token_A.tolist(), expert_A.tolist(), weight_A.tolist(), strict=True))
        assert len(found) == len(expected) and set(found) == expected
        assert token_A.tolist() == sorted(token_A.tolist()) and 1 not in token_A.tolist()
        assert not weight_A.requires_grad and record.num_positions == 10


def test_recomputed_passes_are_not_recorded():
    layer = make_layer("topk")
    x_BSD = torch.randn(1, 3, D, requires_grad=True)
    with record_routing(layer) as (record,):
        output = torch.utils.checkpoint.checkpoint(
            layer, x_BSD, use_reentrant=False, context_fn=layer.recompute_contexts
        )
        output.y.sum().backward()
    assert record.num_positions == 3


def test_recording_ends_with_the_context():
    layer = make_layer("moepp")
    with record_routing(layer) as (record,):
        with pytest.raises(RuntimeError, match="being recorded already"), record_routing(layer):
            pass
        layer(torch.randn(1, 2, D))
    layer(torch.randn(1, 2, D))
    assert record.num_positions == 2
    assert record.num_choices == 4 + len(layer.gate.zero_computation_experts)
