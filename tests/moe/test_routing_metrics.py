"""Routing metrics against sums over recorded assignments, taken one at a time in Python."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.moe_layers import D, make_layer
from helpers.naive_metrics import boundaries, input_percentile, naive_metrics, record_passes
from helpers.spawn import groups_for
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.moe.count_metrics import detail_metrics, load_metrics
from megatron.moe.experts.expert_type import ExpertContext, create_experts
from megatron.moe.ffn import FFNContext, TokenLayout
from megatron.moe.gate import Gate, GateContext, available_gates
from megatron.moe.gate_update import GateUpdater
from megatron.moe.layer import MoELayer
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.magnitude_histogram import NUM_MAGNITUDES
from megatron.moe.metrics import MoEMetrics
from megatron.moe.routing import GateInput, Routing, RoutingScores
from megatron.moe.routing_details import detail_counts
from megatron.moe.step_loads import MAX_KEPT_STEPS
from megatron.parallel.groups import Groups, all_gather_objects

E, VOCAB, LENGTH = 4, 40, 10
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    seq_length=LENGTH,
    init_method_std=0.4,
)
STEPS, MICRO_BATCHES = 2, 4
OPTIONS = {
    "deepseek_v3": {
        "bias_update_speed": 0.2,
        "n_group": 2,
        "topk_group": 1,
        "topk": 1,
        "norm_topk_prob": False,
    },
    "expert_threshold": {"threshold_warmup_steps": 1},
    "peer": {"peer_num_heads": 2, "peer_topk": 2, "peer_query_size": 8},
    "topk": {"loss_coeff": 0.5},
    "topk with nulls": {"num_null_experts": 2},
}
CAPACITY = {"topk", "moepp", "threshold"}
"""Gates whose layers drop assignments"""
WITHOUT_SCORES = {"hash", "peer"}
WITHOUT_MARGIN = {*WITHOUT_SCORES, "base", "expert_choice"}


def build(name: str, groups: Groups, recompute: bool):
    gate = name.partition(" ")[0]
    moe = MoEConfig(
        num_experts=E,
        gate=gate,
        moe_ffn_hidden_size=8,
        moe_expert_parallel_size=groups.ep_size,
        moe_train_capacity_factor=1.0 if name in CAPACITY else 0.0,
        moe_min_capacity=1,
        check_routing=True,
    )
    options = {gate: OPTIONS.get(name, {})}
    return build_model(
        MODEL, moe, options, vocab_size=VOCAB, seed=3, groups=groups, recompute=recompute
    )


def batch(step: int, number: int):
    """Two sequences with padding at the end of the second, by micro-batch."""
    generator = torch.Generator().manual_seed(10 * step + number)
    ids_BS = torch.randint(0, VOCAB, (2, LENGTH), generator=generator)
    padding_BS = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding_BS[1, LENGTH - number :] = True
    return ids_BS, padding_BS


def run(name: str, ep_size: int, recompute: bool):
    """Train without an optimizer in a rank.

    Returns:
        The row of metrics, and by layer the passes of all ranks.
    """
    groups = groups_for(ep_size) if dist.is_initialized() else Groups()
    torch.manual_seed(0)
    model = build(name, groups, recompute)
    metrics = MoEMetrics(model, groups)
    gate_updater = GateUpdater(model, groups)
    layers = find_moe_layers(model)
    passes = [[] for _ in layers]
    for step in range(STEPS):
        for number in range(groups.rank, MICRO_BATCHES, groups.world_size):
            for layer, recorded in zip(layers, passes, strict=True):
                layer.routing_observer = record_passes(recorded, step, groups.rank)
            ids_BS, padding_BS = batch(step, number)
            model(ids_BS, ids_BS, padding_BS=padding_BS).loss.backward()
        metrics.end_step()
        gate_updater.post_optimizer_step()
    row = metrics.read()
    by_rank = all_gather_objects(passes, groups)
    return row, [sum((ranks[i] for ranks in by_rank), []) for i in range(len(layers))]


def check(name: str, row: dict, passes: list, ep_size: int, world_size: int) -> None:
    expected = [naive_metrics(layer, E, ep_size, world_size) for layer in passes]
    expected_names = set().union(*expected)
    assert ("choice_margin" in row) == (name not in WITHOUT_MARGIN)
    for metric in sorted(expected_names - {"load_by_expert", "gate_mass_by_expert"}):
        if metric in ("choice_margin", "near_tie_fraction") and name in WITHOUT_MARGIN:
            assert metric not in row
            continue
        values = [layer[metric] for layer in expected]
        assert row[f"{metric}_by_layer"] == pytest.approx(values, rel=1e-5, abs=1e-7), metric
        assert row[metric] == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-7)
    for metric in ("load_by_expert", "gate_mass_by_expert"):
        for got, layer in zip(row[metric], expected, strict=True):
            assert got == pytest.approx(layer[metric], rel=1e-5, abs=1e-9)
    for got, layer in zip(row["router_input_p99_by_layer"], passes, strict=True):
        # Half a bin on either side of the neighbouring value, and interpolation.
        assert got == pytest.approx(input_percentile(layer, 99), rel=1 / 16)
    assert ("router_entropy" in row) == (name not in WITHOUT_SCORES)
    if name not in WITHOUT_MARGIN:  # the gate has selected by what it hands over
        pairs = [pair for layer in passes for one in layer for pair in boundaries(one)]
        assert pairs and all(low >= high for low, high in pairs)


@pytest.mark.parametrize("name", [*available_gates(), "topk with nulls"])
def test_metrics_equal_naive_sums(name):
    """Two steps of four micro-batches with padding, drops, and activation recomputation."""
    row, passes = run(name, 1, True)
    assert [len(layer) for layer in passes] == [STEPS * MICRO_BATCHES] * len(passes)
    check(name, row, passes, 1, 1)
    if name in CAPACITY:
        assert row["dropped_assignment_fraction"] > 0


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("name", ["topk", "moepp", "deepseek_v3", "longcat", "tcmoe"])
def test_two_ranks_equal_naive_sums(name, ep_size, ranks2):
    """And one rank, whose micro-batches are the same."""
    single, _ = run(name, 1, False)
    for row, passes in ranks2.run(run, name, ep_size, True):
        check(name, row, passes, ep_size, 2)
        assert ("rank_rows_max_over_mean" in row) == (ep_size == 2)
        for metric in ("max_violation", "max_violation_batch", "load_cv", "router_input_p99"):
            assert row[metric] == pytest.approx(single[metric], rel=1e-4)


def measured(layer, *inputs, training=True, **options):
    """Run a layer on inputs and read its metrics."""
    layer.train(training)
    metrics = MoEMetrics(nn.ModuleList([layer]), Groups(), **options)
    for x_TD in inputs:
        layer(x_TD)
    return metrics.read(training)


class GivenScores(Gate):
    """Assigns given choices, and hands over given scores."""

    def __init__(self, choices, scores=None, logits=None):
        super().__init__(None, GateContext(4, 3))
        self.choices = choices
        self.scores = scores
        self.given_logits = logits
        self.weight_A = None

    def forward(self, inp):
        pairs = [(t, e) for t, experts in enumerate(self.choices) for e in experts]
        token_A, expert_A = torch.tensor(pairs).unbind(-1)
        weight_A = torch.ones(len(pairs)) if self.weight_A is None else self.weight_A
        return Routing(
            token_A,
            expert_A,
            weight_A,
            torch.tensor(0.0),
            logits_TE=self.given_logits,
            scores=self.scores,
        )


def given_layer(*args, **kwargs):
    experts = create_experts("mlp", ExpertContext(3, 4, 4))
    return MoELayer(GivenScores(*args, **kwargs), experts, 3)


def test_margins_and_near_ties_by_hand():
    """Margins of 2, 0.5, 1/256 of 1 (a near tie), none: all are chosen, none: the others are
    excluded, and 0 (a near tie)."""
    low = -math.inf
    ranked_TC = torch.tensor(
        [
            [3.0, 1.0, 0.0],
            [1.0, 1.5, 0.5],
            [1.0, 1 - 1 / 256, 0.0],
            [1.0, 2.0, 3.0],
            [low, 5.0, low],
            [0.0, -1.0, 0.0],
        ]
    )
    choices = [[0], [0, 1], [0], [0, 1, 2], [1], [0]]
    layer = given_layer(choices, RoutingScores(ranked_TC=ranked_TC))
    row = measured(layer, torch.randn(6, 4))
    assert row["choice_margin"] == pytest.approx((2 + 0.5 + 1 / 256 + 0) / 4)
    assert row["near_tie_fraction"] == 2 / 4
    assert "router_entropy" not in row


def test_selected_columns_need_not_be_choices():
    ranked_TC = torch.tensor([[0.0, 5.0, 4.0, 1.0, 2.0]])
    scores = RoutingScores(ranked_TC, selected_Tk=torch.tensor([[1, 2]]))
    row = measured(given_layer([[0]], scores), torch.randn(1, 4))
    assert row["choice_margin"] == 2
    unknown = RoutingScores(ranked_TC)
    assert "choice_margin" not in measured(given_layer([[0]], unknown), torch.randn(1, 4))


def test_gate_without_scores_has_counts_only():
    """As gates outside the tree may be: what needs scores is absent, and None by layer."""
    layers = [given_layer([[0], [1]]), given_layer([[0], [1]], logits=torch.eye(3)[:2])]
    metrics = MoEMetrics(nn.ModuleList(layers), Groups())
    for layer in layers:
        layer(torch.ones(2, 4))
    row = metrics.read()
    assert row["choice_margin_by_layer"] == [None, 1.0]
    entropy = math.log(math.e + 2) - math.e / (math.e + 2)
    assert row["router_entropy_by_layer"] == [None, pytest.approx(entropy)]
    assert row["load_by_expert"] == [[0.5, 0.5, 0], [0.5, 0.5, 0]]
    assert row["router_input_rms_by_layer"] == [1, 1]


def test_scores_of_zero_have_no_entropy():
    share_TC = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 0.0]])
    layer = given_layer([[0], [1]], RoutingScores(share_TC=share_TC))
    row = measured(layer, torch.randn(2, 4))
    assert row["router_entropy"] == pytest.approx(math.log(2) / 2)


def test_nan_of_one_token_is_visible():
    """In every metric of scores, weights and inputs, which would otherwise look plausible."""
    score_TC = torch.tensor([[1.0, 0.5, 0.0], [math.nan, 0.5, 0.0]])
    layer = given_layer([[0], [1]], RoutingScores(score_TC, share_TC=score_TC))
    layer.gate.weight_A = torch.tensor([1.0, math.nan])
    row = measured(layer, torch.tensor([[1.0] * 4, [math.nan] * 4]))
    assert row["load_by_expert"] == [[0.5, 0.5, 0]]
    nan = ("router_entropy", "choice_margin", "router_input_rms", "router_input_p99")
    for name in (*nan, "gate_mass_cv"):
        assert math.isnan(row[name]), name
    assert all(map(math.isnan, row["gate_mass_by_expert"][0]))


@pytest.mark.parametrize("training", [True, False])
def test_details_are_counted_where_enabled(training):
    layer = make_layer("topk")
    metrics = MoEMetrics(nn.ModuleList([layer]), Groups())
    layer.train(training)
    details = {"router_entropy", "choice_margin", "gate_mass_cv", "router_input_rms"}
    x_BSD = torch.randn(2, 3, D)
    metrics.count_details(training, enabled=False)
    layer(x_BSD)
    row = metrics.read(training)
    assert not details & row.keys() and "load_cv" in row and "gate_mass_by_expert" not in row
    metrics.count_details(training, enabled=True)
    layer(x_BSD)
    assert details <= metrics.read(training).keys()


OLD = {
    "experts_per_token_before_capacity",
    "experts_per_token",
    "dropped_assignment_fraction",
    "tokens_with_drops_fraction",
    "load_imbalance_max_over_mean",
    "moe_aux_loss",
    "top1_probability",
}


@pytest.mark.parametrize("training", [True, False])
def test_without_routing_metrics_counts_remain(training):
    """The layers then measure no details, whatever `count_details` says."""
    layer = make_layer("topk")
    row = measured(layer, torch.randn(2, 3, D), training=training, routing_metrics=False)
    assert row.keys() == OLD | {f"{name}_by_layer" for name in OLD} | {
        "experts_per_token_histogram"
    }
    metrics = MoEMetrics(nn.ModuleList([layer]), Groups(), routing_metrics=False)
    metrics.count_details(training, enabled=True)
    layer(torch.randn(2, 3, D))
    assert not any("router" in name for name in layer.counters[training])
    with_metrics = measured(make_layer("topk"), torch.randn(2, 3, D), training=training)
    assert row.keys() < with_metrics.keys()


def test_layers_without_metrics_measure_no_details():
    layer = make_layer("topk")
    layer(torch.randn(2, 3, D))
    assert "detailed_tokens" not in layer.counters[True]


def test_many_experts_are_not_listed():
    """PEER's usage and dead experts are measured, and nothing is kept for each expert."""
    options = {"peer_num_heads": 2, "peer_topk": 4, "peer_query_size": 8}
    layer = make_layer("peer", num_experts=45 * 45, options=options)
    metrics = MoEMetrics(layer, Groups())
    layer(torch.randn(2, 3, D))
    assert "gate_mass_C" not in layer.counters[True]
    metrics.end_step()
    row = metrics.read()
    absent = ("load_by_expert", "gate_mass_by_expert", "gate_mass_cv", "max_violation_batch")
    assert not any(name in row for name in absent)
    assert row["dead_expert_fraction"] == pytest.approx(1 - row["expert_usage"])
    assert row["max_violation"] > 0 and row["router_input_rms"] > 0


class Operations(TorchDispatchMode):
    """Records operations that wait for the device, and the largest tensor that one makes."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_to_copy")

    def __init__(self):
        super().__init__()
        self.waiting = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2].partition(".")[0]
        moves = name != "_to_copy" or "device" in (kwargs or {})
        if name in self.WAITING and moves:
            self.waiting.append(name)
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("name", available_gates())
def test_details_do_not_wait_for_device(name):
    """With padding, whose rows the caller has located."""
    layer = make_layer(name)
    inp = GateInput(
        torch.randn(6, D),
        token_ids_T=torch.arange(6),
        padding_T=torch.tensor([False] * 5 + [True]),
        unpadded_R=torch.arange(5),
    )
    routing = layer.gate(inp)
    with Operations() as operations:
        detail_counts(layer.gate, inp, routing)
    assert operations.waiting == []


def test_million_experts_need_no_tensor_of_tokens_by_experts():
    """Nothing larger than the histogram of the router's input is made in a forward pass."""
    num_experts = 1024**2
    token_A = torch.arange(64).repeat_interleave(2)
    expert_A = torch.randint(0, num_experts, (128,))
    routing = Routing(token_A, expert_A, torch.rand(128), torch.zeros(()))
    gate = GivenScores([])
    gate.num_experts = num_experts
    with Operations() as operations:
        sums = detail_counts(gate, GateInput(torch.randn(64, D)), routing)
    assert operations.largest <= max(NUM_MAGNITUDES, 64 * D)
    loads_C = torch.bincount(expert_A, minlength=num_experts).double()
    used = (loads_C > 0).double().mean()
    assert load_metrics(loads_C, num_experts)["dead_expert_fraction"] == pytest.approx(1 - used)
    assert detail_metrics(gate, sums).keys() == {"router_input_rms", "router_input_p99"}


def test_interval_without_assignments_is_finite():
    layer = make_layer("topk")
    context = FFNContext(layout=TokenLayout(torch.ones(1, 3, dtype=torch.bool)))
    metrics = MoEMetrics(layer, Groups())
    layer(torch.randn(1, 3, D), context)
    metrics.end_step()
    row = metrics.read()
    assert row["max_violation"] == row["max_violation_batch"] == row["load_cv"] == 0
    assert row["load_entropy"] == 0 and row["dead_expert_fraction"] == 1
    assert "router_entropy" not in row and row["load_by_expert"] == [[0] * 4]


def test_loads_of_many_steps_are_added_early():
    """More steps than are kept give the same mean, and the memory stays bounded."""
    layer = make_layer("topk")
    metrics = MoEMetrics(layer, Groups())
    gate_updater = GateUpdater(layer, Groups())
    violations = []
    for step in range(MAX_KEPT_STEPS + 3):
        layer.step_sums = {"load_E": torch.tensor([1.0 + step % 5, 1.0, 1.0, 1.0]).double()}
        largest = 1.0 + step % 5
        violations.append((largest - (largest + 3) / 4) / ((largest + 3) / 4))
        metrics.end_step()
        assert len(metrics._step_loads[0]._load_E) < MAX_KEPT_STEPS
    gate_updater.post_optimizer_step()
    layer(torch.randn(1, 3, D))
    assert metrics.read()["max_violation_batch"] == pytest.approx(
        sum(violations) / len(violations)
    )
    layer(torch.randn(1, 3, D))
    assert "max_violation_batch" not in metrics.read(), "read forgets the steps"


@pytest.mark.parametrize(
    "name, prefix, buffer",
    [
        ("deepseek_v3", "expert_bias", "expert_bias"),
        ("longcat", "expert_bias", "expert_bias"),
        ("expert_threshold", "expert_threshold", "expert_threshold"),
    ],
)
def test_state_of_gates_is_logged(name, prefix, buffer):
    layer = make_layer(name)
    values = [0.5, -1.5, 2.0, 0.0]
    getattr(layer.gate, buffer).copy_(torch.tensor(values))
    row = measured(layer, torch.randn(2, 3, D))
    assert row[f"{prefix}_min"] == -1.5 and row[f"{prefix}_max"] == 2.0
    assert row[f"{prefix}_mean"] == 0.25
    deviation = math.sqrt(sum((value - 0.25) ** 2 for value in values) / 4)
    assert row[f"{prefix}_std_by_layer"] == [pytest.approx(deviation)]


def test_scalar_state_is_logged_as_is():
    layer = make_layer("topk")
    layer.gate.state_metrics = lambda: {"strength": torch.tensor(3.0)}
    assert measured(layer, torch.randn(2, 3, D))["strength"] == 3


def test_large_batches_are_sampled_for_percentiles():
    """Evenly spaced tokens enter the percentile; all enter the root mean square."""
    layer = make_layer("topk")
    tokens = 3 * 16384 // D
    x_TD = torch.zeros(tokens, D)
    x_TD[::3] = 1.0
    row = measured(layer, x_TD)
    assert row["router_input_rms"] == pytest.approx(math.sqrt(1 / 3), rel=1e-4)
    assert row["router_input_p99"] == pytest.approx(1.0, rel=1 / 16)
