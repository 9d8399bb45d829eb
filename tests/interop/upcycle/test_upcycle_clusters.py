"""Balanced assignment and balanced k-means."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron.interop.upcycle.clusters import (
    assign_evenly,
    balanced_kmeans,
    cluster_means,
)


def total(cost_NE: torch.Tensor, label_N: torch.Tensor) -> float:
    return cost_NE.double().gather(1, label_N[:, None]).sum().item()


@pytest.mark.parametrize("rows, clusters", [(12, 3), (12, 4), (13, 4), (5, 5), (3, 4), (7, 1)])
def test_assignment_has_equal_sizes(rows, clusters):
    cost_NE = torch.rand(rows, clusters)
    counts = torch.bincount(assign_evenly(cost_NE), minlength=clusters)
    assert counts.max() == -(-rows // clusters)
    assert counts.sum() == rows
    if rows % clusters == 0:
        assert counts.min() == counts.max()


def test_assignment_is_optimal_for_two_clusters():
    """With two clusters every better assignment is an exchange away."""
    for seed in range(20):
        cost_NE = torch.rand(8, 2, generator=torch.Generator().manual_seed(seed))
        best = min(
            cost_NE[list(first), 0].sum()
            + cost_NE[[i for i in range(8) if i not in first], 1].sum()
            for first in itertools.combinations(range(8), 4)
        )
        assert abs(total(cost_NE, assign_evenly(cost_NE)) - best) < 1e-5


def test_assignment_is_near_the_optimum():
    from scipy.optimize import linear_sum_assignment

    cost_NE = torch.rand(120, 6)
    rows, columns = linear_sum_assignment(cost_NE.repeat_interleave(20, 1).numpy())
    best = cost_NE[torch.from_numpy(rows), torch.from_numpy(columns) // 20].sum().item()
    assert best - 1e-4 <= total(cost_NE, assign_evenly(cost_NE)) <= 1.05 * best


def test_no_exchange_of_two_rows_helps():
    cost_NE = torch.rand(40, 4)
    label_N = assign_evenly(cost_NE)
    current = total(cost_NE, label_N)
    for a, b in itertools.combinations(range(40), 2):
        exchanged = label_N.clone()
        exchanged[a] = label_N[b]
        exchanged[b] = label_N[a]
        assert total(cost_NE, exchanged) >= current - 1e-4


def test_kmeans_finds_planted_clusters():
    generator = torch.Generator().manual_seed(1)
    planted_N = torch.randperm(60, generator=generator) % 5
    centre_EF = 10 * torch.randn(5, 6, generator=generator)
    rows_NF = centre_EF[planted_N] + torch.randn(60, 6, generator=generator)
    label_N = balanced_kmeans(rows_NF, 5, torch.Generator().manual_seed(0))
    pairs = set(zip(planted_N.tolist(), label_N.tolist(), strict=True))
    assert len(pairs) == 5
    means_EF = cluster_means(rows_NF, label_N, 5)
    for e in range(5):
        torch.testing.assert_close(means_EF[e], rows_NF[label_N == e].mean(0))


def test_kmeans_is_repeatable_by_seed():
    rows_NF = torch.randn(64, 8)

    def run(seed: int) -> torch.Tensor:
        return balanced_kmeans(rows_NF, 4, torch.Generator().manual_seed(seed))

    assert torch.equal(run(3), run(3))
    assert torch.bincount(run(4)).tolist() == [16] * 4


def test_kmeans_of_equal_rows_is_balanced():
    label_N = balanced_kmeans(torch.ones(12, 3), 4, torch.Generator().manual_seed(0))
    assert torch.bincount(label_N).tolist() == [3] * 4
