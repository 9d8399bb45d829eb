"""Statistics of a routing trace: loads, weights, co-activation, and what experts are used for.

Nothing here has a row for each expert of a layer with many: PEER has a million.

Shape suffixes: T positions, A assignments of a layer, P distinct pairs of a position and a
choice, C choices (routed and zero-computation experts), M listed choices, W token classes,
L MoE layers, N bins of choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.moe.routing_trace import LayerTrace, RoutingTrace


@dataclass(frozen=True)
class TokenUse:
    """How often an expert is used for one token of the vocabulary."""

    key: int
    """number of the token, as in the keys that were given"""
    count: int
    """positions with this token that use the expert"""
    lift: float
    """share of the token among the expert's positions, divided by its share in the layer"""


@dataclass(frozen=True)
class ExpertProfile:
    """What one expert of a layer is used for.

    Positions that use the expert several times (PEER's heads) count once. Shares in the layer
    are over all pairs of a position and one of its experts, so that lifts compare the experts
    of a layer also where some tokens have more experts than others.
    """

    choice: int
    """number of the expert"""
    count: int
    """positions that use it"""
    tokens: list[TokenUse]
    """those that distinguish the expert most, by share x log(lift), their parts of the
    Kullback-Leibler divergence between the expert's tokens and the layer's"""
    class_counts_W: np.ndarray
    """int64, positions of each token class"""
    class_lifts_W: np.ndarray
    """fp64, as `TokenUse.lift`; 0 for a class without positions in the layer"""


def bin_width(num_choices: int, max_bins: int) -> int:
    """Return how many neighbouring choices share a bin, so that there are at most `max_bins`."""
    return -(-num_choices // max_bins)


def binned_load(layer: LayerTrace, max_bins: int) -> np.ndarray:
    """Return the load of each bin of choices, divided by its mean over the choices: fp64 [N].

    1 is an even load. The load of a bin is the mean over its choices, of which the last bin
    may have fewer.
    """
    width = bin_width(layer.num_choices, max_bins)
    num_bins = -(-layer.num_choices // width)
    count_N = np.bincount(layer.expert_A.numpy() // width, minlength=num_bins)
    size_N = np.full(num_bins, width)
    size_N[-1] = layer.num_choices - width * (num_bins - 1)
    mean = max(1, len(layer.expert_A)) / layer.num_choices
    return count_N / size_N / mean


def experts_per_token(trace: RoutingTrace) -> np.ndarray:
    """Return the number of experts of each position in each layer: int64 [T, L]."""
    return np.stack([layer.count_T.numpy() for layer in trace.layers], axis=1)


def routed_experts_per_token(trace: RoutingTrace) -> np.ndarray | None:
    """Return the number of each position's routed experts, without zero-computation experts.

    Returns:
        int64 [T], sums over the layers; None if no layer has zero-computation experts.
    """
    if not any(layer.num_zero_computation for layer in trace.layers):
        return None
    total_T = np.zeros(trace.num_positions, np.int64)
    for layer in trace.layers:
        is_routed_A = (layer.expert_A < layer.num_experts).numpy()
        routed_A = layer.token_A.numpy()[is_routed_A]
        total_T += np.bincount(routed_A, minlength=trace.num_positions)
    return total_T


def weight_entropy(trace: RoutingTrace) -> np.ndarray | None:
    """Return the entropy of the weights of each position's experts, in nats.

    A layer's weights are divided by their sum, without their signs. A position with one expert
    or none has the entropy 0 there.

    Returns:
        fp64 [T], means over the layers; None if the weights were not recorded.
    """
    if not trace.has_weights:
        return None
    total_T = np.zeros(trace.num_positions)
    for layer in trace.layers:
        token_A = layer.token_A.numpy()
        size_A = layer.weight_A.double().abs().numpy()
        sum_T = np.bincount(token_A, size_A, minlength=trace.num_positions)
        share_A = size_A / np.maximum(sum_T[token_A], np.finfo(np.float64).tiny)
        terms_A = -share_A * np.log(np.maximum(share_A, np.finfo(np.float64).tiny))
        total_T += np.bincount(token_A, terms_A, minlength=trace.num_positions)
    return total_T / len(trace.layers)


def most_used(layer: LayerTrace, limit: int) -> np.ndarray:
    """Return the choices of a layer that are listed: int64 [M], in ascending order.

    All of them if there are at most `limit`; otherwise those with the most assignments, and of
    equal ones those with smaller numbers.
    """
    if layer.num_choices <= limit:
        return np.arange(layer.num_choices)
    choices, counts = np.unique(layer.expert_A.numpy(), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return np.sort(choices[order])


def co_activation(layer: LayerTrace, choice_M: np.ndarray) -> np.ndarray:
    """Return at how many positions two choices are used together: int64 [M, M].

    The diagonal has the positions that use a choice.

    Args:
        choice_M: ascending.
    """
    token_P, choice_P = _distinct_pairs(layer)
    column_P = np.searchsorted(choice_M, choice_P).clip(max=max(0, len(choice_M) - 1))
    is_listed_P = np.zeros(len(choice_P), bool)
    if len(choice_M):
        is_listed_P = choice_M[column_P] == choice_P
    # fp32 is exact for counts below 2^24, and its matrix product is fast.
    used_TM = np.zeros((len(layer.token_offsets_T1) - 1, len(choice_M)), np.float32)
    used_TM[token_P[is_listed_P], column_P[is_listed_P]] = 1
    return (used_TM.T @ used_TM).astype(np.int64)


def expert_profiles(
    layer: LayerTrace,
    choice_M: np.ndarray,
    key_T: np.ndarray,
    class_T: np.ndarray,
    num_classes: int,
    num_tokens: int,
) -> list[ExpertProfile]:
    """Return what each of some choices is used for.

    Args:
        choice_M: the choices, ascending.
        key_T: int64 number of each position's token, 0 or more: equal for equal tokens.
        class_T: int64 token class of each position.
        num_classes: W.
        num_tokens: how many tokens are listed of each choice, at most.
    """
    token_P, choice_P = _distinct_pairs(layer)
    order_P = np.argsort(choice_P, kind="stable")
    token_P = token_P[order_P]
    choice_P = choice_P[order_P]
    key_counts = np.bincount(key_T[token_P])
    class_counts = np.bincount(class_T[token_P], minlength=num_classes)
    uses = []
    for choice in choice_M.tolist():
        first, end = np.searchsorted(choice_P, [choice, choice + 1])
        tokens = token_P[first:end]
        counts_W = np.bincount(class_T[tokens], minlength=num_classes)
        lifts_W = _lifts(counts_W, class_counts, len(tokens), len(token_P))
        keys, counts = np.unique(key_T[tokens], return_counts=True)
        lifts = _lifts(counts, key_counts[keys], len(tokens), len(token_P))
        divergence = counts * np.log(np.maximum(lifts, 1.0))
        listed = []
        for index in np.argsort(-divergence, kind="stable")[:num_tokens].tolist():
            if lifts[index] > 1:
                use = TokenUse(int(keys[index]), int(counts[index]), float(lifts[index]))
                listed.append(use)
        uses.append(ExpertProfile(choice, len(tokens), listed, counts_W, lifts_W))
    return uses


def _lifts(
    counts: np.ndarray, all_counts: np.ndarray, total: int, all_total: int
) -> np.ndarray:
    """Return (counts / total) / (all_counts / all_total), and 0 where a divisor is 0."""
    divisor = all_counts * float(total)
    return np.divide(
        counts * float(all_total), divisor, out=np.zeros(len(counts)), where=divisor > 0
    )


def _distinct_pairs(layer: LayerTrace) -> tuple[np.ndarray, np.ndarray]:
    """Return (token_P, choice_P), sorted by position."""
    pairs_P = layer.token_A.numpy() * layer.num_choices + layer.expert_A.numpy()
    token_P, choice_P = np.divmod(np.unique(pairs_P), layer.num_choices)
    return token_P, choice_P
