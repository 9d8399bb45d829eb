"""BASE layers: one expert per token, by a balanced assignment of maximal total score.

Paper: BASE Layers: Simplifying Training of Large, Sparse Models (Lewis et al. 2021).

    z = W x
    training:    maximise sum_t z_{t, a_t}  with at most ceil(T / E) tokens per expert
    evaluation:  a_t = argmax_e z_te
    w_t = sigmoid(z_{t, a_t}),  no losses: the loads are equal by construction

The assignment is computed by an auction (Bertsekas 1992) in which all unassigned tokens
bid in the same round. Prices start where a softened assignment is balanced. The result
is within `ASSIGNMENT_TOLERANCE` of the optimum.

Departures: the paper shuffles the tokens over the ranks and assigns them jointly. A
gate does not communicate, so here each rank assigns its own tokens: the loads are equal
on every rank and therefore in total. As in the paper, a token's expert depends in
training on the other tokens of the rank's micro-batch, including later tokens of its
own sequence; in evaluation it does not.

Shape suffixes: T tokens, D hidden, E experts, A assignments (one per token), B bidders
(the tokens and the padding), F bidders without an expert.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import SimBalConfig
from megatron.moe.routing import GateInput, Routing

ASSIGNMENT_TOLERANCE = 0.02
"""Largest distance of the mean score from the optimum, in units of the spread (a
token's highest score minus its lowest, averaged over tokens). Typical scores end ten
times nearer; a smaller tolerance costs more rounds than it is worth."""
_TEMPERATURE = 0.05
"""Temperature of the softened assignment that initial prices come from, in units of the
spread."""
_SINKHORN_STEPS = 20
_MAX_ROUNDS = 2000
"""Limit on auction rounds, far above what typical scores need."""


class BaseGate(Gate, name="base"):
    """Assign one expert per token, and equally many tokens per expert in training."""

    sees_other_tokens: ClassVar[bool] = True

    Config = SimBalConfig

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 1, 1

    def forward(self, inp: GateInput) -> Routing:
        num_tokens = len(inp.x_TD)
        logits_TE = linear_fp32(inp.x_TD, self.router)
        argmax_T = logits_TE.detach().argmax(-1)
        expert_T = argmax_T
        rounds = 0
        if self.training:
            expert_T, rounds = self.decide(balanced_assignment, logits_TE)
        is_argmax_T = expert_T == argmax_T
        return Routing(
            token_A=torch.arange(num_tokens, device=expert_T.device),
            token_major=True,
            expert_A=expert_T,
            weight_A=logits_TE.gather(1, expert_T[:, None])[:, 0].sigmoid(),
            aux_loss=logits_TE.new_zeros(()),
            metric_means={
                "favourite_expert_fraction": is_argmax_T.sum() / max(1, num_tokens),
                "auction_rounds": logits_TE.new_tensor(float(rounds)),
            },
            router_logits_TC=logits_TE,
        )


@torch.no_grad()
def balanced_assignment(score_TE: Tensor, max_rounds: int = _MAX_ROUNDS) -> tuple[Tensor, int]:
    """Assign at most ceil(T / E) tokens per expert at a near-maximal total score.

    In each round every unassigned bidder bids for the expert with the highest score
    minus price. Its bid raises that price until the second-best expert would be as
    good, plus epsilon. An expert holds its ceil(T / E) highest bids; once it is full,
    its price is the lowest of them. No bidder then gains more than epsilon by
    switching, so the total is within T epsilon of the optimum, provided that experts
    with free capacity have the lowest price. That holds if prices start at 0, or at any
    value if no capacity is left in the end, which is what the padding (bidders with
    equal scores for all experts) is for.

    Prices only rise, so the auction terminates. The last few tokens take most of the
    rounds: once they can cost at most a quarter of the tolerance, they fill the free
    capacity.

    Args:
        score_TE: scores of any magnitude; NaN counts as 0.
        max_rounds: number of rounds after which tokens that are still unassigned fill
            the free capacity: balanced, but possibly not within the tolerance.
    Returns:
        expert_T int64, and the number of rounds.
    """
    num_tokens, num_experts = score_TE.shape
    device = score_TE.device
    if num_tokens == 0 or num_experts == 1:
        return torch.zeros(num_tokens, dtype=torch.int64, device=device), 0
    capacity = -(-num_tokens // num_experts)
    num_padding = 0
    if num_tokens > num_experts:
        num_padding = capacity * num_experts - num_tokens
    num_bidders = num_tokens + num_padding

    score_TE = score_TE.nan_to_num().double()
    score_TE = score_TE - score_TE.amax(-1, keepdim=True)
    range_T = -score_TE.amin(-1)
    spread = range_T.mean().clamp_min(1e-12)
    score_BE = F.pad(score_TE, (0, 0, 0, num_padding))
    start_E = score_BE.new_zeros(num_experts)
    if num_bidders % num_experts == 0:
        start_E = _balancing_prices((score_BE / spread).float()).double() * spread
    # The most that one misplaced token can cost.
    worst = (range_T.max() + start_E.max() - start_E.min()).clamp_min(1e-12)
    few = int(ASSIGNMENT_TOLERANCE / 4 * num_tokens * spread / worst)
    epsilon = ASSIGNMENT_TOLERANCE * 3 / 4 * spread * num_tokens / num_bidders

    expert_B, rounds = _auction(score_BE, start_E, capacity, few, epsilon, max_rounds)
    return expert_B[:num_tokens], rounds


def _auction(
    score_BE: Tensor,
    start_E: Tensor,
    capacity: int,
    few: int,
    epsilon: Tensor,
    max_rounds: int,
) -> tuple[Tensor, int]:
    """Run rounds until at most `few` bidders are unassigned; these fill the free capacity.

    Returns:
        expert_B, and the number of rounds.
    """
    num_bidders, num_experts = score_BE.shape
    all_E = torch.arange(num_experts, device=score_BE.device)
    expert_B = all_E.new_full((num_bidders,), num_experts)  # E: unassigned
    bid_B = score_BE.new_zeros(num_bidders)
    price_E = start_E
    for rounds in range(max_rounds + 1):
        free_F = (expert_B == num_experts).nonzero()[:, 0]
        if len(free_F) <= few or rounds == max_rounds:
            break
        expert_B[free_F], bid_B[free_F] = _bids(score_BE[free_F], price_E, epsilon)
        expert_B, price_E = _accept_highest_bids(expert_B, bid_B, capacity, start_E)

    remaining_E = capacity - (expert_B == all_E[:, None]).sum(-1)
    expert_B[free_F] = all_E.repeat_interleave(remaining_E)[: len(free_F)]
    return expert_B, rounds


def _bids(score_FE: Tensor, price_E: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expert that each unassigned bidder bids for, and its bid."""
    value_F2, choice_F2 = (score_FE - price_E).topk(2, dim=-1)
    expert_F = choice_F2[:, 0]
    return expert_F, price_E[expert_F] + value_F2[:, 0] - value_F2[:, 1] + epsilon


def _accept_highest_bids(
    expert_B: Tensor, bid_B: Tensor, capacity: int, start_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Let each expert hold its `capacity` highest bids.

    Args:
        expert_B: int64 expert that each bidder holds or bids for; E for none.
        bid_B: fp64 bids.
        start_E: prices of experts that are not full.
    Returns:
        (expert_B after acceptance, price_E).
    """
    num_bidders = len(bid_B)
    num_experts = len(start_E)
    all_E = torch.arange(num_experts, device=bid_B.device)
    all_B = torch.arange(num_bidders, device=bid_B.device)
    # Sort by expert, and within an expert by descending bid.
    order_B = bid_B.argsort(descending=True, stable=True)
    order_B = order_B[expert_B[order_B].argsort(stable=True)]
    holder_B = expert_B[order_B]
    first_E = torch.searchsorted(holder_B, all_E)
    last_E = (first_E + capacity - 1).clamp_max(num_bidders - 1)
    full_E = (holder_B[last_E] == all_E) & (last_E - first_E == capacity - 1)
    price_E = torch.where(full_E, bid_B[order_B[last_E]], start_E)
    accepted_B = all_B - first_E[holder_B] < capacity
    result_B = torch.empty_like(expert_B)
    result_B[order_B] = torch.where(accepted_B, holder_B, num_experts)
    return result_B, price_E


def _balancing_prices(score_BE: Tensor) -> Tensor:
    """Return prices [E] that balance the softmax of (score - price) / temperature.

    Sinkhorn's iteration on the expert side.
    """
    price_E = score_BE.new_zeros(score_BE.shape[1])
    target = score_BE.shape[0] / score_BE.shape[1]
    for _ in range(_SINKHORN_STEPS):
        load_E = ((score_BE - price_E) / _TEMPERATURE).softmax(-1).sum(0)
        price_E = price_E + _TEMPERATURE * (load_E / target).clamp_min(1e-9).log()
    return price_E
