"""MoE metrics and the totals that gates receive, against sums done by hand."""

import pytest
import torch
from torch import nn

from helpers.spawn import groups_for
from megatron.moe.experts.grouped_experts import GroupedExperts
from megatron.moe.gate import Gate, GateContext
from megatron.moe.gate_update import GateUpdater
from megatron.moe.layer import MoELayer
from megatron.moe.metrics import MoEMetrics
from megatron.moe.routing import Routing
from megatron.parallel.groups import Groups


class FixedGate(Gate):
    """Routes each token to a given list of experts."""

    def __init__(self, choices):
        super().__init__(None, GateContext(4, 3))
        self.choices = choices
        self.steps = []

    def forward(self, inp):
        pairs = [(t, e) for t, experts in enumerate(self.choices) for e in experts]
        token, expert = (torch.tensor(v, dtype=torch.int64) for v in zip(*pairs, strict=True))
        weight = torch.linspace(1, 0.1, len(pairs))
        return Routing(
            token,
            expert,
            weight,
            torch.tensor(0.25),
            metric_means={"marker": torch.tensor(2.0)},
        )

    def post_optimizer_step(self, step):
        self.steps.append((step.load_E.tolist(), float(step.num_tokens)))


def make_layer(choices, factor=0.0):
    return MoELayer(
        FixedGate(choices),
        GroupedExperts(3, 4, 4, "gelu"),
        3,
        train_capacity_factor=factor,
        min_capacity=1,
    )


def test_metrics_equal_sums_by_hand():
    """Tokens are assigned 2, 1, 1, 2 experts; a capacity of 2 (4 tokens / 3 experts * 1.5) drops
    one of the assignments to expert 0."""
    layer = make_layer([[0, 1], [0], [0], [1, 2]], factor=1.5)
    metrics = MoEMetrics(nn.ModuleList([layer]), Groups())
    x = torch.randn(1, 4, 4)
    for _ in range(3):  # metrics are means, so the number of forward passes has no influence
        layer(x)
    got = metrics.read()
    assert got["experts_per_token_before_capacity"] == pytest.approx(6 / 4)
    assert got["experts_per_token"] == pytest.approx(5 / 4)
    assert got["dropped_assignment_fraction"] == pytest.approx(1 / 6)
    assert got["tokens_with_drops_fraction"] == pytest.approx(1 / 4)
    assert got["load_imbalance_max_over_mean"] == pytest.approx(2 / (5 / 3))
    assert got["moe_aux_loss"] == pytest.approx(0.25)
    assert got["marker"] == pytest.approx(2.0)
    assert got["experts_per_token_by_layer"] == pytest.approx([5 / 4])
    assert got["experts_per_token_histogram"] == pytest.approx([1 / 4, 1 / 4, 2 / 4, 0])
    assert metrics.read() == {}, "read must reset the counters"


def test_training_and_evaluation_count_separately():
    layer = make_layer([[0], [1]])
    metrics = MoEMetrics(nn.ModuleList([layer]), Groups())
    layer(torch.randn(1, 2, 4))
    layer.eval()
    layer.gate.choices = [[0, 1, 2], [1]]
    layer(torch.randn(1, 2, 4))
    assert metrics.read(training=True)["experts_per_token"] == 1
    assert metrics.read(training=False)["experts_per_token"] == 2


def test_nothing_counted_gives_no_metrics():
    """A model without MoE layers, and one without forward passes."""
    assert MoEMetrics(nn.Linear(1, 1), Groups()).read() == {}
    assert MoEMetrics(nn.ModuleList([make_layer([[0]])]), Groups()).read() == {}


def test_gates_receive_each_step_once():
    layer = make_layer([[0, 1], [0]])
    metrics = MoEMetrics(nn.ModuleList([layer]), Groups())
    gate_updater = GateUpdater(nn.ModuleList([layer]), Groups())
    x = torch.randn(1, 2, 4)
    layer(x)
    gate_updater.post_optimizer_step()
    for _micro_batch in range(2):
        layer(x)
    gate_updater.post_optimizer_step()
    metrics.read()
    layer(x)
    gate_updater.post_optimizer_step()
    assert layer.gate.steps == [([2, 1, 0], 2), ([4, 2, 0], 4), ([2, 1, 0], 2)]


def test_evaluation_adds_nothing_to_steps():
    """An evaluation and a reading between steps leave the loads of the next step alone."""
    layer = make_layer([[0, 1], [0]])
    metrics = MoEMetrics(nn.ModuleList([layer]), Groups())
    gate_updater = GateUpdater(nn.ModuleList([layer]), Groups())
    x = torch.randn(1, 2, 4)
    for _ in range(2):
        layer.train()
        layer(x)
        gate_updater.post_optimizer_step()
        layer.eval()
        layer(x)
        metrics.read(training=False)
    assert layer.gate.steps == [([2, 1, 0], 2), ([2, 1, 0], 2)]


def _reduced():
    groups = groups_for(1)
    layer = make_layer([[0], [1]] if groups.rank == 0 else [[0, 1, 2], [0]])
    metrics = MoEMetrics(nn.ModuleList([layer]), groups)
    gate_updater = GateUpdater(nn.ModuleList([layer]), groups)
    layer(torch.randn(1, 2, 4))
    gate_updater.post_optimizer_step()
    return metrics.read(), layer.gate.steps


def test_metrics_sum_over_ranks(ranks2):
    for got, steps in ranks2.run(_reduced):
        assert got["experts_per_token"] == pytest.approx(6 / 4)
        assert got["load_imbalance_max_over_mean"] == pytest.approx(3 / 2)
        assert steps == [([3, 2, 1], 4)]
