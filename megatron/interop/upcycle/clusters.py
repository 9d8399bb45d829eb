"""Clusters of equal size: balanced assignment, and k-means with it.

Shape suffixes: N rows, F features, E clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.moe.gates.base_layer import balanced_assignment

_MOST_SWEEPS = 5
"""Rounds of exchanges between all pairs of clusters; each lowers the cost"""
_MOST_ITERATIONS = 30
"""Iterations of k-means"""


def assign_evenly(cost_NE: Tensor) -> Tensor:
    """Assign rows to clusters of equal size at a low total cost.

    The auction of BASE layers comes near the optimum; then pairs of clusters exchange rows as long
    as this lowers the cost.

    Args:
        cost_NE: finite cost of each row in each cluster.
    Returns:
        The cluster of each row, int64 [N]. No cluster has more than ceil(N / E) rows.
    """
    label_N, _ = balanced_assignment(-cost_NE)
    num_clusters = cost_NE.shape[1]
    for _ in range(_MOST_SWEEPS):
        changed = False
        for a in range(num_clusters):
            for b in range(a + 1, num_clusters):
                changed |= _exchange(cost_NE, label_N, a, b)
        if not changed:
            break
    return label_N


def _exchange(cost_NE: Tensor, label_N: Tensor, a: int, b: int) -> bool:
    """Exchange the rows of two clusters that lower the cost most; return whether there are any."""
    rows_a, gain_a = _by_gain(cost_NE, label_N, a, b)
    rows_b, gain_b = _by_gain(cost_NE, label_N, b, a)
    size = min(len(rows_a), len(rows_b))
    gain = gain_a[:size] + gain_b[:size]
    # Rounding must not make two rows change places forever.
    least = 1e-6 * (gain_a[:size].abs() + gain_b[:size].abs())
    count = int((gain > least).long().cumprod(0).sum())
    label_N[rows_a[:count]] = b
    label_N[rows_b[:count]] = a
    return count > 0


def _by_gain(cost_NE: Tensor, label_N: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a cluster and what a move to another one saves, the most first."""
    rows = (label_N == start).nonzero().flatten()
    gain = cost_NE[rows, start] - cost_NE[rows, end]
    gain, order = gain.sort(descending=True, stable=True)
    return rows[order], gain


def balanced_kmeans(rows_NF: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Cluster rows by k-means with clusters of equal size.

    Args:
        rows_NF: features.
        generator: draws the first centres, far from each other (k-means++).
    Returns:
        The cluster of each row, int64 [N].
    """
    rows_NF = rows_NF.float()
    centre_EF = _first_centres(rows_NF, num_clusters, generator)
    best_cost = float("inf")
    best_N = torch.zeros(len(rows_NF), dtype=torch.int64)
    for _ in range(_MOST_ITERATIONS):
        cost_NE = _squared_distances(rows_NF, centre_EF)
        label_N = assign_evenly(cost_NE)
        cost = cost_NE.gather(1, label_N[:, None]).double().sum().item()
        if cost >= best_cost:
            break
        best_cost = cost
        best_N = label_N
        centre_EF = cluster_means(rows_NF, label_N, num_clusters)
    return best_N


def cluster_means(rows_NF: Tensor, label_N: Tensor, num_clusters: int) -> Tensor:
    """Return the mean row of each cluster [E, F]; 0 for a cluster without rows."""
    sum_EF = torch.zeros(num_clusters, rows_NF.shape[1]).index_add_(0, label_N, rows_NF.float())
    count_E = torch.bincount(label_N, minlength=num_clusters)
    return sum_EF / count_E.clamp_min(1)[:, None]


def _squared_distances(rows_NF: Tensor, centre_EF: Tensor) -> Tensor:
    """Return squared distances up to a number per row, which changes no assignment."""
    return centre_EF.square().sum(1) - 2 * rows_NF @ centre_EF.T


def _first_centres(rows_NF: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Draw rows with probabilities proportional to the squared distance from those before.

    Source: k-means++ (Arthur and Vassilvitskii 2007).
    """
    num_rows = len(rows_NF)
    chosen = [int(torch.randint(num_rows, (1,), generator=generator))]
    distance_N = torch.full((num_rows,), float("inf"))
    for _ in range(1, num_clusters):
        to_last_N = (rows_NF - rows_NF[chosen[-1]]).square().sum(1)
        distance_N = torch.minimum(distance_N, to_last_N)
        cumulative_N = distance_N.double().cumsum(0)
        limit = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative_N[-1]
        # The clamp is for rows that are all equal: every distance is 0.
        drawn = torch.searchsorted(cumulative_N, limit, right=True).clamp_max(num_rows - 1)
        chosen.append(int(drawn))
    return rows_NF[chosen]
