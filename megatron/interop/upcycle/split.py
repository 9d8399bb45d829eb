"""Divide the neurons of a dense layer among experts: each neuron belongs to exactly one.

Every division is exact: with all experts chosen and weights of 1 the experts add up to the dense
layer. Experts of overlapping neurons (LLaMA-MoE's Sharing-Inner) leave other neurons out; they
are not made here.

Sources: sequential and random splits, and experts from the importance of neurons for clusters of
tokens, with the neurons that matter to all of them as a residual expert: LLaMA-MoE (Zhu et al.
2024; version 2 clusters hidden states). Balanced k-means of parameters and the co-activation
graph: MoEfication (Zhang et al. 2022). The most often active neurons as shared expert: CMoE (Pei
et al. 2025).

Shape suffixes: D hidden, W neurons, E experts, M neurons per expert, N shared neurons, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.interop.upcycle.clusters import (
    assign_evenly,
    balanced_kmeans,
    cluster_means,
)
from megatron.interop.upcycle.dense_ffn import DenseFFN, FFNStatistics


@dataclass(frozen=True, eq=False)
class NeuronGroups:
    """Division of a layer's neurons. Every neuron is in one place, once."""

    shared_N: Tensor
    """neurons of the shared expert, in ascending order; may be empty"""
    experts_EM: Tensor
    """neurons of each expert, in ascending order"""


def split_neurons(
    strategy: str,
    ffn: DenseFFN,
    num_experts: int,
    num_shared: int,
    generator: torch.Generator,
    statistics: FFNStatistics | None = None,
) -> NeuronGroups:
    """Divide the neurons of a layer.

    Args:
        strategy: one of `megatron.interop.upcycle.options.SPLIT_STRATEGIES`.
        num_experts: must divide the number of neurons that are not shared.
        num_shared: number of neurons of the shared expert.
        generator: draws what is random.
        statistics: needed by coactivation and gradient.
    """
    width = ffn.width
    order = torch.arange(width)
    if strategy == "random":
        order = torch.randperm(width, generator=generator)
    if strategy == "coactivation":
        order = _descending(statistics.active(width).sum(0))
    if strategy == "gradient":
        order = _descending(_relative_importance(statistics).sum(0))
    shared_N = order[:num_shared].sort().values
    rest = order[num_shared:]
    if strategy not in ("sequential", "random"):
        rest = rest.sort().values
    size = len(rest) // num_experts
    assert size * num_experts == len(rest), f"{len(rest)} neurons, {num_experts} experts"
    if strategy in ("sequential", "random"):
        return NeuronGroups(shared_N, rest.view(num_experts, size).sort(dim=1).values)
    label = _labels(strategy, ffn, rest, num_experts, generator, statistics)
    by_expert = label.argsort(stable=True)
    return NeuronGroups(shared_N, rest[by_expert].view(num_experts, size))


def _descending(values_W: Tensor) -> Tensor:
    """Return neurons by descending value; equal ones by their number."""
    return values_W.argsort(descending=True, stable=True)


def _labels(
    strategy: str,
    ffn: DenseFFN,
    neurons: Tensor,
    num_experts: int,
    generator: torch.Generator,
    statistics: FFNStatistics | None,
) -> Tensor:
    """Return the expert of each of the neurons, as many for each expert."""
    if strategy == "kmeans":
        return balanced_kmeans(ffn.first_WD[neurons], num_experts, generator)
    if strategy == "coactivation":
        # The neurons that two experts of equal size keep together are co-active most often, where
        # k-means of the columns of A has its minimum: the weights of the graph are A^T A.
        active_WT = statistics.active(ffn.width).T[neurons]
        return balanced_kmeans(active_WT, num_experts, generator)
    return assign_evenly(-_relative_importance(statistics)[:, neurons].T)


def _relative_importance(statistics: FFNStatistics) -> Tensor:
    """Return each neuron's share of the importance for each cluster of tokens [E, W].

    Without the division, a cluster with large gradients would get all important neurons.
    """
    importance_EW = statistics.importance_EW
    return importance_EW / importance_EW.sum(1, keepdim=True).clamp_min(1e-30)


def expert_centres(
    groups: NeuronGroups, ffn: DenseFFN, statistics: FFNStatistics | None
) -> Tensor:
    """Return a direction for each expert [E, D]: the logits of a token are its products with them.

    Without statistics it is the mean row of the expert's first projection (MoEfication). With
    them it is the mean of the tokens that activate the expert, weighted by the number of its
    active neurons, or, for experts made from clusters of tokens, the mean of its cluster. What
    all experts have in common is subtracted, since it does not change their order.
    """
    num_experts = len(groups.experts_EM)
    if statistics is None:
        centre_ED = ffn.first_WD[groups.experts_EM].mean(1)
    elif statistics.cluster_T is not None:
        centre_ED = cluster_means(statistics.x_TD, statistics.cluster_T, num_experts)
    else:
        active_TEM = statistics.active(ffn.width)[:, groups.experts_EM]
        share_TE = active_TEM.sum(-1).float()
        share_TE = share_TE / share_TE.sum(0).clamp_min(1)
        centre_ED = share_TE.T @ statistics.x_TD.float()
    return centre_ED - centre_ED.mean(0)
