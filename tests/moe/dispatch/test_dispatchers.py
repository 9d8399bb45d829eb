"""Token dispatchers in an MoE layer: which one is used, and what overlaps with communication."""

import pytest
import torch
import torch.distributed as dist

from helpers.moe_layers import make_input, make_layer
from helpers.spawn import groups_for
from megatron.moe.dispatch.dispatchers import AllToAllDispatcher, LocalDispatcher
from megatron.moe.ffn import FFNContext, FFNOutput
from megatron.moe.peer.dispatchers import AllGatherDispatcher, PEERLocalDispatcher


class LoggedMLP(torch.nn.Module):
    """A shared expert that logs its forward and backward passes."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def forward(self, x_BSD, context):
        log = self.log

        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                log.append("shared")
                return 2 * x

            @staticmethod
            def backward(ctx, grad):
                log.append("shared backward")
                return 2 * grad

        return FFNOutput(Double.apply(x_BSD))


def log_communication(log, function):
    """Wrap all_to_all_single: log the starts and waits of its asynchronous calls."""

    def all_to_all_single(*args, **kwargs):
        work = function(*args, **kwargs)
        if not kwargs.get("async_op"):  # the exchange of counts
            return work
        log.append("start")

        class Work:
            def wait(self):
                log.append("wait")
                work.wait()

        return Work()

    return all_to_all_single


def _log_layer(name):
    """Log a forward and a backward pass of a sharded layer with a shared expert."""
    groups = groups_for(2)
    log = []
    layer = make_layer(name, groups)
    layer.shared = LoggedMLP(log)
    x, ids = make_input(7, seed=groups.rank)
    original = dist.all_to_all_single
    dist.all_to_all_single = log_communication(log, original)
    try:
        out = layer(x.requires_grad_(), FFNContext(ids))
        log.append("backward")
        out.y.square().sum().backward()
    finally:
        dist.all_to_all_single = original
    return log, type(layer.dispatcher)


def test_all_to_all_overlaps_shared_experts(ranks2):
    """Rows and weights are in flight while the shared experts run, in both passes."""
    exchange = ["start", "wait"]
    overlapping = ["start", "start", "shared", "wait", "wait"]
    overlapping_backward = ["start", "start", "shared backward", "wait", "wait"]
    expected = [*overlapping, *exchange, "backward", *exchange, *overlapping_backward]
    for log, dispatcher in ranks2.run(_log_layer, "topk"):
        assert dispatcher is AllToAllDispatcher
        assert log == expected


def test_all_gather_overlaps_shared_experts(ranks2):
    """Tokens are in flight while weights and ids are exchanged and the shared experts run. In
    backward their gradients are in flight in the same places."""
    exchange = ["start", "wait"]
    forward = ["start", *exchange, *exchange, "shared", "wait", *exchange]
    backward = [*exchange, "start", "shared backward", *exchange, "wait"]
    for log, dispatcher in ranks2.run(_log_layer, "peer"):
        assert dispatcher is AllGatherDispatcher
        assert log == [*forward, "backward", *backward]


@pytest.mark.parametrize(
    "name, dispatcher", [("topk", LocalDispatcher), ("peer", PEERLocalDispatcher)]
)
def test_one_rank_dispatches_locally(name, dispatcher):
    assert type(make_layer(name).dispatcher) is dispatcher
