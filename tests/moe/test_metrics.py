"""MoE metrics and the totals that gates receive, against sums done by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers.moe_layers import D
from helpers.moe_layers import make_layer as make_gate_layer
from helpers.spawn import groups_for
from megatron.moe.experts.expert_type import ExpertContext, create_experts
from megatron.moe.ffn import FFNContext, TokenLayout
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
        token, expert = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(-1)
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
        create_experts("mlp", ExpertContext(3, 4, 4)),
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


@pytest.mark.parametrize("training", [True, False])
def test_losses_of_a_pass_of_padding_do_not_count(training):
    """They have no weight in the model's loss either, though a loss of weights is not 0 there."""
    options = {"simbal_coeff": 0.5, "loss_coeff": 0.0}
    layer = make_gate_layer("topk", options=options).train(training)
    metrics = MoEMetrics(nn.ModuleList([layer]), Groups())
    x_BSD = torch.randn(2, 3, D)
    padding_BS = torch.ones(2, 3, dtype=torch.bool)
    context = FFNContext(layout=TokenLayout(padding_BS))
    assert layer(x_BSD, context).aux_loss > 0.1
    assert metrics.read(training)["moe_aux_loss"] == 0
    aux_loss = layer(x_BSD).aux_loss.item()
    layer(x_BSD, context)
    assert metrics.read(training)["moe_aux_loss"] == pytest.approx(aux_loss)


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


def test_interval_without_tokens_has_finite_metrics():
    """All micro-batches of the interval are padding."""
    layer = make_layer([[]] * 5)
    metrics = MoEMetrics(layer, Groups())
    padding_BS = torch.ones(1, 5, dtype=torch.bool)
    layer(torch.randn(1, 5, 4), FFNContext(layout=TokenLayout(padding_BS)))
    row = metrics.read()
    assert row["experts_per_token"] == 0
    assert row["experts_per_token_histogram"] == [0, 0, 0, 0]


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


class WideGate(FixedGate):
    """Has one more expert than `FixedGate`, and metrics of its own."""

    def __init__(self, choices):
        super().__init__(choices)
        self.num_experts = 4
        self.loads_of_same_gate = []

    def forward(self, inp):
        routing = super().forward(inp)
        sums = {"pair": torch.tensor([1.0, 5.0])}
        return replace(routing, metric_means={"width": torch.tensor(4.0)}, metric_sums=sums)

    def summarise(self, sums):
        return {"ratio": sums["pair"][1] / sums["pair"][0]}

    def post_optimizer_step(self, step):
        super().post_optimizer_step(step)
        self.loads_of_same_gate.append(step.load_LE.tolist())


def make_mixed_model():
    """Layers with 3, 4, 3 and 4 experts; those with 4 have other metrics."""
    wide = [
        MoELayer(WideGate(choices), create_experts("mlp", ExpertContext(4, 4, 4)), 4)
        for choices in ([[0], [3]], [[0, 1, 2, 3], [2]])
    ]
    narrow = [make_layer([[0, 1], [0]]), make_layer([[2], [0]])]
    return nn.ModuleList([narrow[0], wide[0], narrow[1], wide[1]])


def _mixed():
    model = make_mixed_model()
    metrics = MoEMetrics(model, groups_for(1))
    gate_updater = GateUpdater(model, groups_for(1))
    for layer in model:
        layer(torch.randn(1, 2, 4))
    gate_updater.post_optimizer_step()
    return metrics.read(), [layer.gate.steps for layer in model]


def test_metric_names_are_a_union(ranks2):
    """Layers whose gates differ in names, shapes and numbers of experts: on two ranks, which count
    the same, every metric is there, with None in layers without it."""
    for got, steps in ranks2.run(_mixed):
        assert got["marker"] == 2 and got["marker_by_layer"] == [2, None, 2, None]
        assert got["width"] == 4 and got["width_by_layer"] == [None, 4, None, 4]
        assert got["ratio"] == 5 and got["ratio_by_layer"] == [None, 5, None, 5]
        assert got["experts_per_token_by_layer"] == [1.5, 1, 1, 2.5]
        histogram = [number / 8 for number in (0, 6, 1, 0, 1)]
        assert got["experts_per_token_histogram"] == pytest.approx(histogram)
        assert steps == [
            [([4, 2, 0], 4)],
            [([2, 0, 0, 2], 4)],
            [([2, 0, 2], 4)],
            [([2, 2, 4, 2], 4)],
        ]


def test_gates_receive_loads_of_same_gate():
    """`load_LE` has the layers whose gate is of the same class, not those of other gates."""
    model = make_mixed_model()
    gate_updater = GateUpdater(model, Groups())
    for layer in model:
        layer(torch.randn(1, 2, 4))
    gate_updater.post_optimizer_step()
    for layer in (model[1], model[3]):
        assert layer.gate.loads_of_same_gate == [[[1, 0, 0, 1], [1, 1, 2, 1]]]


def test_layer_that_did_not_run_is_left_out():
    """Its metrics are None, and its gate gets no totals."""
    model = make_mixed_model()
    metrics = MoEMetrics(model, Groups())
    gate_updater = GateUpdater(model, Groups())
    model[3](torch.randn(1, 2, 4))
    gate_updater.post_optimizer_step()
    assert [len(layer.gate.steps) for layer in model] == [0, 0, 0, 1]
    assert metrics.read()["experts_per_token_by_layer"] == [None, None, None, 2.5]
