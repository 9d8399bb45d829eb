"""BASE: each token goes to one expert, by the assignment with equal loads that has the highest total score.

Paper: BASE Layers: Simplifying Training of Large, Sparse Models (Lewis et al. 2021).

    training:    maximise sum_t z_{t, a_t}  with at most ceil(T / E) tokens per expert,  z = W x
    evaluation:  a_t = argmax_e z_te
    w = sigmoid(z_{t, a_t}),  no losses: loads are equal by construction

The assignment is found by an auction (Bertsekas 1992), all tokens without an expert bidding at once, its prices started
where a softened assignment is balanced. It is within `TOLERANCE` of the best one, see there.

Departures: the paper assigns the tokens of all ranks together, after shuffling them over the ranks; here each rank
assigns its own, because a gate does not communicate: loads are equal on every rank and therefore over all. In training
a token's expert depends on the other tokens of its rank's micro-batch, later ones of its sequence included, as in the
paper; in evaluation it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.routing import GateInput, Routing

TOLERANCE = 0.02
"""the mean score is at most this far from the best possible one, in units of the spread: a token's best score minus its
worst, averaged over tokens. Ordinary scores end ten times nearer; a smaller one costs more rounds than it is worth"""
SOFTNESS, SOFT_STEPS = 0.05, 20
"""temperature, in units of the spread, and steps of the softened assignment that prices start from"""
MAX_ROUNDS = 2000
"""a guard: far more than ordinary scores need"""


class BaseGate(Gate, name="base"):
    """One expert per token, all experts equally often in training."""

    sees_other_tokens: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 1, 1

    def forward(self, inp: GateInput) -> Routing:
        num_tokens = inp.x_TD.shape[0]
        logits_TE = linear_fp32(inp.x_TD, self.router)
        favourite_T, rounds = logits_TE.detach().argmax(-1), 0
        expert_T = favourite_T
        if self.training:
            expert_T, rounds = balanced_assignment(logits_TE)
        return Routing(
            token_A=torch.arange(num_tokens, device=expert_T.device),
            token_major=True,
            expert_A=expert_T,
            weight_A=logits_TE.gather(1, expert_T[:, None])[:, 0].sigmoid(),
            aux_loss=logits_TE.new_zeros(()),
            metric_means={
                "favourite_expert_fraction": (expert_T == favourite_T).sum()
                / max(1, num_tokens),
                "auction_rounds": logits_TE.new_tensor(float(rounds)),
            },
        )


@torch.no_grad()
def balanced_assignment(score_TE: Tensor, max_rounds: int = MAX_ROUNDS) -> tuple[Tensor, int]:
    """One expert for each token, at most ceil(T / E) tokens per expert, the sum of scores (nearly) as high as can be.

    Each round, every token without an expert bids for the one where score minus price is highest: so much that the
    second best would be as good, plus epsilon. An expert holds its ceil(T / E) highest bids, and when it is full its
    price is the lowest of them. No token is then more than epsilon better off elsewhere, so the sum is within T epsilon
    of the best one, provided that experts with free places have the lowest price: prices start at 0, or anywhere when
    no place is free in the end, which tokens without wishes see to. Prices rise, so it terminates. The last few tokens
    take most rounds: once they cannot matter more than a quarter of the tolerance, they take the free places.

    Args:
        score_TE: of any size; NaN counts as 0.
        max_rounds: the tokens then without an expert take the free places: balanced, but perhaps not within tolerance.
    Returns:
        expert_T int64, and the number of rounds.
    """
    (num_tokens, num_experts), device = score_TE.shape, score_TE.device
    if num_tokens == 0 or num_experts == 1:
        return torch.zeros(num_tokens, dtype=torch.int64, device=device), 0
    places = -(-num_tokens // num_experts)
    wishless = places * num_experts - num_tokens if num_tokens > num_experts else 0
    score_TE = score_TE.nan_to_num().double()
    score_TE = score_TE - score_TE.amax(-1, keepdim=True)
    range_T = -score_TE.amin(-1)
    spread = range_T.mean().clamp_min(1e-12)
    score_TE, rows = F.pad(score_TE, (0, 0, 0, wishless)), num_tokens + wishless
    start_E = score_TE.new_zeros(num_experts)
    if rows % num_experts == 0:
        start_E = soft_prices((score_TE / spread).float()).double() * spread
    worst = (range_T.max() + start_E.max() - start_E.min()).clamp_min(
        1e-12
    )  # what one token in a wrong place can cost
    few, epsilon = (
        int(TOLERANCE / 4 * num_tokens * spread / worst),
        TOLERANCE * 3 / 4 * spread * num_tokens / rows,
    )
    price_E, bid_T = start_E, score_TE.new_zeros(rows)
    all_E, all_T = torch.arange(num_experts, device=device), torch.arange(rows, device=device)
    expert_T, nobody = torch.full_like(all_T, num_experts), num_experts
    for rounds in range(max_rounds + 1):
        free_F = (expert_T == nobody).nonzero()[:, 0]
        if len(free_F) <= few or rounds == max_rounds:
            break
        value_F2, choice_F2 = (score_TE[free_F] - price_E).topk(2, dim=-1)
        expert_T[free_F] = choice_F2[:, 0]
        bid_T[free_F] = price_E[choice_F2[:, 0]] + value_F2[:, 0] - value_F2[:, 1] + epsilon
        order_T = bid_T.argsort(descending=True, stable=True)
        order_T = order_T[
            expert_T[order_T].argsort(stable=True)
        ]  # by expert, then from the highest bid
        holder_T = expert_T[order_T]
        first_E = torch.searchsorted(holder_T, all_E)
        last_E = (first_E + places - 1).clamp_max(rows - 1)
        full_E = (holder_T[last_E] == all_E) & (last_E - first_E == places - 1)
        price_E = torch.where(full_E, bid_T[order_T[last_E]], start_E)
        expert_T[order_T] = torch.where(all_T - first_E[holder_T] < places, holder_T, nobody)
    free_E = places - (expert_T == all_E[:, None]).sum(-1)
    expert_T[free_F] = all_E.repeat_interleave(free_E)[: len(free_F)]
    return expert_T[:num_tokens], rounds


def soft_prices(score_TE: Tensor) -> Tensor:
    """Prices [E] at which the softmax of (score - price) / SOFTNESS is nearly balanced (Sinkhorn's iteration)."""
    price_E, wanted = (
        score_TE.new_zeros(score_TE.shape[1]),
        score_TE.shape[0] / score_TE.shape[1],
    )
    for _ in range(SOFT_STEPS):
        load_E = ((score_TE - price_E) / SOFTNESS).softmax(-1).sum(0)
        price_E = price_E + SOFTNESS * (load_E / wanted).clamp_min(1e-9).log()
    return price_E
