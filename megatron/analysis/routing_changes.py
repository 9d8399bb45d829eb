"""Comparisons of two routings of the same tokens, and co-activation of experts.

Shape suffixes: T tokens, U different (token, choice) pairs, C choices (routed and
zero-computation experts), E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.moe.routing_record import RoutingRecord

_TOKENS_PER_PRODUCT = 4096
"""Tokens whose [T, E] membership matrix is held at a time"""


@dataclass(frozen=True)
class TokenChoices:
    """The set of choices of each token, without weights."""

    key_U: Tensor
    """int64 on the CPU, ascending: token * C + choice of each different pair"""
    num_tokens: int
    num_choices: int

    @staticmethod
    def of(record: RoutingRecord) -> TokenChoices:
        """Return the choices that a gate made in the recorded passes, before capacity."""
        token_A, expert_A, _ = record.assignments()
        key_U = (token_A * record.num_choices + expert_A).unique().cpu()
        return TokenChoices(key_U, record.num_positions, record.num_choices)

    @property
    def token_U(self) -> Tensor:
        return self.key_U // self.num_choices

    @property
    def choice_U(self) -> Tensor:
        return self.key_U % self.num_choices

    def count_T(self) -> Tensor:
        """Return the number of choices of each token: int64 [T]."""
        return self.token_U.bincount(minlength=self.num_tokens)

    def shared_count_T(self, other: TokenChoices) -> Tensor:
        """Return the number of choices of each token that both have: int64 [T]."""
        is_shared_U = torch.isin(self.key_U, other.key_U, assume_unique=True)
        return self.token_U[is_shared_U].bincount(minlength=self.num_tokens)


def churn_sums(previous: TokenChoices, current: TokenChoices) -> Tensor:
    """Return (sum of the tokens' churn, number of tokens): fp64 [2].

    A token's churn is the Jaccard distance of its sets of experts, 1 - |A and B| / |A or B|. With
    k experts per token of which one is replaced it is 2 / (k + 1). Tokens that have no
    expert in either routing, such as padding, do not count.
    """
    shared_T = current.shared_count_T(previous).double()
    union_T = previous.count_T() + current.count_T() - shared_T
    counts_T = union_T > 0
    distance_T = 1 - shared_T[counts_T] / union_T[counts_T]
    return torch.stack([distance_T.sum(), counts_T.sum().double()])


def saturation_sums(reference: TokenChoices, current: TokenChoices) -> Tensor:
    """Return (sum of the tokens' saturation, number of tokens): fp64 [2].

    A token's saturation is the share of its experts in the reference that it has now, too.
    Tokens without experts in the reference do not count.

    Source: router saturation, OLMoE (Muennighoff et al. 2024), for any number of experts per
    token.
    """
    shared_T = current.shared_count_T(reference).double()
    reference_T = reference.count_T()
    counts_T = reference_T > 0
    share_T = shared_T[counts_T] / reference_T[counts_T]
    return torch.stack([share_T.sum(), counts_T.sum().double()])


def coactivation_counts(choices: TokenChoices, num_experts: int) -> Tensor:
    """Return how many tokens have expert i and expert j: fp64 [E, E].

    The diagonal has the number of tokens of each expert. Zero-computation experts are left out.
    """
    count_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    is_routed_U = choices.choice_U < num_experts
    token_U = choices.token_U[is_routed_U]
    choice_U = choices.choice_U[is_routed_U]
    starts = torch.arange(0, choices.num_tokens + _TOKENS_PER_PRODUCT, _TOKENS_PER_PRODUCT)
    ends = torch.searchsorted(token_U, starts).tolist()
    for i, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        # fp32 sums of up to 4096 ones are exact.
        member_TE = torch.zeros(_TOKENS_PER_PRODUCT, num_experts)
        member_TE[token_U[begin:end] - i * _TOKENS_PER_PRODUCT, choice_U[begin:end]] = 1
        count_EE += member_TE.T @ member_TE
    return count_EE


def coactivation_rates(count_EE: Tensor) -> Tensor:
    """Return the share of the tokens of expert i that expert j has, too: fp64 [E, E].

    The diagonal is 1; rows of experts without tokens are 0.

    Source: expert co-activation, OLMoE (Muennighoff et al. 2024).
    """
    return count_EE / count_EE.diagonal().clamp_min(1)[:, None]


def coactivation_summary(count_EE: Tensor) -> tuple[float, float] | None:
    """Return the mean and the largest co-activation of an expert with another one.

    Both are means over the experts that have tokens; None if none has or there is one expert.
    """
    num_experts = len(count_EE)
    used_E = count_EE.diagonal() > 0
    if num_experts < 2 or not used_E.any():
        return None
    others_EE = coactivation_rates(count_EE) - torch.eye(num_experts, dtype=torch.float64)
    others_UE = others_EE[used_E]
    mean = others_UE.sum(-1).mean() / (num_experts - 1)
    # The diagonal is 0 now, which no rate is below.
    return float(mean), float(others_UE.max(-1).values.mean())
