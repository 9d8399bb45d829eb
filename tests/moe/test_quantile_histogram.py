"""Histogram quantiles against sorted values, and their way through layers, steps and ranks."""

import pytest
import torch
from torch import nn

from helpers.moe_layers import E, make_input, make_layer
from helpers.spawn import groups_for
from megatron.moe.gate_update import GateUpdater
from megatron.moe.metrics import MoEMetrics
from megatron.moe.quantile_histogram import NUM_BINS, histogram, quantile
from megatron.parallel.groups import Groups


def exact_quantile(values, q):
    """The value below which a share q lies, interpolated between sorted values."""
    return torch.quantile(values.double(), q, dim=0)


@pytest.mark.parametrize("q", [0.02, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", ["normal", "uniform", "two values"])
def test_quantile_equals_sorted_values(q, shape):
    """Up to 0.02, the width of a bin being 0.004, whatever the distribution."""
    g = torch.Generator().manual_seed(3)
    values = {
        "normal": torch.randn(4096, 5, generator=g) * 0.3,
        "uniform": torch.rand(4096, 5, generator=g) * 3 - 1.5,
        "two values": (torch.rand(4096, 5, generator=g) < 0.7).float(),
    }[shape]
    low, high = torch.full((5,), -2.0), torch.full((5,), 2.0)
    counts = histogram(values, low, high)
    assert counts.sum(-1).tolist() == [4096] * 5
    got = quantile(counts, low, high, q)
    torch.testing.assert_close(got, exact_quantile(values, q), atol=0.02, rtol=0)
    # The share below the result is q, up to the values of one bin.
    fullest = counts.amax(-1) / 4096
    share = (values < got.float()).float().mean(0)
    assert ((share - q).abs() <= fullest + 1e-6).all()


def test_ranges_differ_per_expert():
    """Each expert has a range of its own; interpolation is linear in a bin."""
    values = torch.tensor([[0.0, 100.0], [1.0, 101.0], [2.0, 102.0], [3.0, 103.0]])
    low, high = torch.tensor([0.0, 99.0]), torch.tensor([4.0, 103.5])
    counts = histogram(values, low, high)
    assert counts.shape == (2, NUM_BINS) and counts[0].nonzero().flatten().tolist() == [
        0,
        250,
        500,
        750,
    ]
    got = quantile(counts, low, high, 0.5)
    assert got[0].item() == pytest.approx(1.0 + 4 / NUM_BINS)
    assert got[1].item() == pytest.approx(101.0, abs=2 * 4.5 / NUM_BINS)


def test_values_out_of_range_are_counted():
    """They lie in the outermost bins, with infinities; NaN is counted and breaks nothing."""
    values = torch.tensor([[-9.0], [9.0], [float("inf")], [float("-inf")], [float("nan")]])
    counts = histogram(values, torch.zeros(1), torch.ones(1))
    assert counts[0, 0] == 3 and counts[0, -1] == 2 and counts.sum() == 5
    assert quantile(counts, torch.zeros(1), torch.ones(1), 0.9).item() == pytest.approx(
        1, abs=2 / NUM_BINS
    )


def test_no_tokens_give_an_empty_histogram():
    counts = histogram(torch.zeros(0, 3), torch.zeros(3), torch.ones(3))
    assert counts.shape == (3, NUM_BINS) and not counts.any()


def _step_counts(world_size, tokens_of_rank):
    """Two micro-batches per rank; return the counts of the step that the gate receives."""
    groups = groups_for(1)
    layer = make_layer("expert_threshold", groups)
    seen = []
    layer.gate.post_optimizer_step = seen.append
    layers = nn.ModuleList([layer])
    updater = GateUpdater(layers, groups)
    updater._any_gate_with_state = True
    for i, tokens in enumerate(tokens_of_rank[groups.rank]):
        layer(make_input(tokens, seed=groups.rank * 10 + i)[0])
    updater.post_optimizer_step()
    (totals,) = seen
    return totals.step_sums["logit_counts"].sum(-1).tolist(), totals.step_sums["logit_counts"]


def test_counts_span_ranks_and_micro_batches(ranks2):
    """All ranks receive the counts of all tokens of the step."""
    results = ranks2.run(_step_counts, 2, [[5, 7], [3, 0]])
    assert [sums for sums, _ in results] == [[15.0] * E] * 2
    assert torch.equal(results[0][1], results[1][1])


def test_step_sums_stay_out_of_metrics():
    """A histogram is no metric: the log interval's all-reduce does not carry it, and
    evaluation does not count."""
    layer = make_layer("expert_threshold")
    layer(make_input(9)[0])
    assert layer.step_sums["step/logit_counts"].sum() == 9 * E
    assert not any("logit_counts" in name for name in layer.counters[True])
    layer.eval()
    layer(make_input(9)[0])
    assert layer.step_sums["step/logit_counts"].sum() == 9 * E
    layer.train()
    metrics = MoEMetrics(nn.ModuleList([layer]), Groups()).read()
    assert not any("logit_counts" in name for name in metrics)
