"""Splits of a dense layer: exact sums of the experts, and structure that each strategy finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.interop.upcycle.dense_ffn import DenseFFN, FFNStatistics, pack_bits
from megatron.interop.upcycle.options import SPLIT_STRATEGIES
from megatron.interop.upcycle.split import NeuronGroups, expert_centres, split_neurons
from megatron.moe.experts.activations import activate

HIDDEN = 8
WIDTH = 24
TOKENS = 40


def make_ffn(gated: bool = True) -> DenseFFN:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    up_WD = draw(WIDTH, HIDDEN) if gated else None
    return DenseFFN(draw(WIDTH, HIDDEN), up_WD, draw(HIDDEN, WIDTH))


def make_statistics(experts: int) -> FFNStatistics:
    generator = torch.Generator().manual_seed(6)
    active_TW = torch.rand(TOKENS, WIDTH, generator=generator) < 0.3
    return FFNStatistics(
        torch.randn(TOKENS, HIDDEN, generator=generator),
        pack_bits(active_TW),
        torch.rand(experts, WIDTH, generator=generator),
        torch.arange(TOKENS) % experts,
    )


def compute(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """Return the output of a layer: the naive reference."""
    first_TW = x_TD @ ffn.first_WD.T
    if ffn.up_WD is None:
        return activate("gelu", first_TW) @ ffn.down_DW.T
    return activate("swiglu", first_TW, x_TD @ ffn.up_WD.T) @ ffn.down_DW.T


def split(strategy: str, experts: int, shared: int = 0, seed: int = 0, gated: bool = True):
    return split_neurons(
        strategy,
        make_ffn(gated),
        experts,
        shared,
        torch.Generator().manual_seed(seed),
        make_statistics(experts),
    )


def all_neurons(groups: NeuronGroups) -> list[int]:
    return sorted([*groups.shared_N.tolist(), *groups.experts_EM.flatten().tolist()])


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("strategy", SPLIT_STRATEGIES)
def test_experts_add_up_to_the_dense_layer(strategy, gated, shared):
    """Each neuron is in one place, once; in fp64 the sum is exact up to rounding."""
    ffn = make_ffn(gated)
    groups = split(strategy, 4, shared, gated=gated)
    assert all_neurons(groups) == list(range(WIDTH))
    assert groups.experts_EM.shape == (4, (WIDTH - shared) // 4)
    assert len(groups.shared_N) == shared
    x_TD = torch.randn(7, HIDDEN, dtype=torch.float64)
    total_TD = compute(ffn.take(groups.shared_N), x_TD)
    for neurons in groups.experts_EM:
        total_TD = total_TD + compute(ffn.take(neurons), x_TD)
    torch.testing.assert_close(total_TD, compute(ffn, x_TD), rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", SPLIT_STRATEGIES)
def test_split_is_repeatable_by_seed(strategy):
    first = split(strategy, 4, 4)
    second = split(strategy, 4, 4)
    assert torch.equal(first.experts_EM, second.experts_EM)
    assert torch.equal(first.shared_N, second.shared_N)


def test_random_split_depends_on_the_seed():
    assert not torch.equal(
        split("random", 4, 0, 1).experts_EM, split("random", 4, 0, 2).experts_EM
    )


def test_sequential_split_takes_consecutive_neurons():
    groups = split("sequential", 4, 4)
    assert groups.shared_N.tolist() == [0, 1, 2, 3]
    assert groups.experts_EM[0].tolist() == [4, 5, 6, 7, 8]


def planted() -> Tensor:
    """Return a group for each neuron, of four equal ones."""
    return torch.randperm(WIDTH, generator=torch.Generator().manual_seed(9)) % 4


def assert_finds(groups: NeuronGroups, group_W: Tensor) -> None:
    found = [sorted(row.tolist()) for row in groups.experts_EM]
    expected = [(group_W == g).nonzero().flatten().tolist() for g in range(4)]
    assert sorted(found) == sorted(expected)


def test_kmeans_finds_similar_gate_rows():
    group_W = planted()
    ffn = make_ffn()
    centre = 20 * torch.randn(4, HIDDEN, dtype=torch.float64)
    ffn = DenseFFN(ffn.first_WD + centre[group_W], ffn.up_WD, ffn.down_DW)
    groups = split_neurons("kmeans", ffn, 4, 0, torch.Generator().manual_seed(0))
    assert_finds(groups, group_W)


def test_coactivation_finds_neurons_that_fire_together():
    group_W = planted()
    topic_T = torch.arange(TOKENS) % 4
    active_TW = topic_T[:, None] == group_W
    flipped_TW = torch.rand(TOKENS, WIDTH) < 0.05
    packed = pack_bits(active_TW ^ flipped_TW)
    statistics = FFNStatistics(torch.zeros(TOKENS, HIDDEN), packed)
    groups = split_neurons(
        "coactivation", make_ffn(), 4, 0, torch.Generator().manual_seed(0), statistics
    )
    assert_finds(groups, group_W)


def test_coactivation_shares_the_most_active_neurons():
    active_TW = torch.rand(TOKENS, WIDTH) < 0.2
    active_TW[:, [3, 17]] = True
    statistics = FFNStatistics(torch.zeros(TOKENS, HIDDEN), pack_bits(active_TW))
    groups = split_neurons(
        "coactivation", make_ffn(), 11, 2, torch.Generator().manual_seed(0), statistics
    )
    assert groups.shared_N.tolist() == [3, 17]


def test_gradient_gives_clusters_their_important_neurons():
    """A cluster with gradients 1000 times as large does not take the neurons of the others."""
    group_W = planted()
    importance_EW = torch.full((4, WIDTH), 0.1)
    importance_EW[group_W, torch.arange(WIDTH)] = 1.0
    importance_EW[0] *= 1000
    statistics = FFNStatistics(torch.zeros(TOKENS, HIDDEN), None, importance_EW)
    groups = split_neurons(
        "gradient", make_ffn(), 4, 0, torch.Generator().manual_seed(0), statistics
    )
    for e in range(4):
        assert groups.experts_EM[e].tolist() == (group_W == e).nonzero().flatten().tolist()


def test_gradient_shares_what_matters_to_all_clusters():
    importance_EW = torch.rand(2, WIDTH)
    importance_EW[:, [5, 11]] = 2.0
    importance_EW[0, 7] = 2.5  # for one cluster only
    statistics = FFNStatistics(torch.zeros(TOKENS, HIDDEN), None, importance_EW)
    groups = split_neurons(
        "gradient", make_ffn(), 2, 2, torch.Generator().manual_seed(0), statistics
    )
    assert groups.shared_N.tolist() == [5, 11]


def test_bits_are_packed_and_unpacked():
    bits_TW = torch.rand(5, 19) < 0.5
    packed = pack_bits(bits_TW)
    assert packed.shape == (5, 3)
    statistics = FFNStatistics(torch.zeros(5, HIDDEN), packed)
    assert torch.equal(statistics.active(19), bits_TW)


def test_centres_of_parameters_are_mean_rows():
    ffn = make_ffn()
    groups = split("sequential", 4)
    centre_ED = expert_centres(groups, ffn, None)
    mean_ED = ffn.first_WD.view(4, 6, HIDDEN).mean(1)
    torch.testing.assert_close(centre_ED, mean_ED - mean_ED.mean(0))


def test_centres_of_activity_weight_active_tokens():
    ffn = make_ffn()
    groups = split("sequential", 4)
    full = make_statistics(4)
    centre_ED = expert_centres(groups, ffn, FFNStatistics(full.x_TD, full.packed_active_TW))
    active_TW = full.active(WIDTH)
    expected = []
    for neurons in groups.experts_EM:
        weight_T = active_TW[:, neurons].sum(1).float()
        expected.append((weight_T[:, None] * full.x_TD).sum(0) / weight_T.sum())
    expected_ED = torch.stack(expected)
    torch.testing.assert_close(centre_ED, expected_ED - expected_ED.mean(0))


def test_centres_of_clusters_are_token_means():
    full = make_statistics(4)
    centre_ED = expert_centres(split("gradient", 4), make_ffn(), full)
    mean_ED = torch.stack([full.x_TD[full.cluster_T == e].mean(0) for e in range(4)])
    torch.testing.assert_close(centre_ED, mean_ED - mean_ED.mean(0))
