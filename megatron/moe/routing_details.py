"""What an MoE layer measures of a routing beyond its counts: gate mass, margins, entropy.

These take passes over all scores and over the router's input, so the layer computes them
only while `MoELayer.counts_details` says so: in the steps that are logged, and in
evaluations. Everything is a sum on the device: over forward passes and ranks they add up,
and `megatron.moe.metrics` divides them.

Shape suffixes: T positions on this rank, R those that are not padding, D hidden, C choices
of the gate, A assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.magnitude_histogram import magnitude_histogram
from megatron.moe.routing import GateInput, Routing, RoutingScores

MAX_LISTED_EXPERTS = 1024
"""Largest number of routed experts of a layer whose experts are logged one by one"""
NEAR_TIE = 2.0**-8
"""Largest difference of a near tie, relative to the larger score: half of the distance of
neighbouring bf16 numbers at 1, by which rounding to bf16 can move a number"""
_SAMPLED_VALUES = 16384
"""Values of the router's input of one forward pass that enter its percentile: a histogram of
all of them would cost more than the router"""


@torch.no_grad()
def detail_counts(gate: Gate, inp: GateInput, routing: Routing) -> dict[str, Tensor]:
    """Return sums over this rank's tokens of one forward pass; padding does not count.

    - gate_mass_C: absolute weights by choice, up to MAX_LISTED_EXPERTS experts,
    - margin_sum, near_ties, margin_tokens: see `_margins`; only of gates that return what
      they compared, and whose tokens are routed independently of each other,
    - router_entropy_sum: of gates that return scores or logits,
    - router_input_squares, router_input_counts: the latter of evenly spaced tokens,
    - detailed_tokens, router_input_values: what these sums cover.
    """
    sums = _router_input(inp)
    num_tokens = inp.num_tokens
    one = torch.ones_like(sums["router_input_squares"])
    sums["detailed_tokens"] = one * num_tokens
    sums["router_input_values"] = one * num_tokens * inp.x_TD.shape[1]
    if gate.num_experts <= MAX_LISTED_EXPERTS:
        num_choices = gate.num_experts + len(gate.zero_computation_experts)
        mass_C = torch.zeros(num_choices, dtype=torch.float64, device=routing.weight_A.device)
        weight_A = routing.weight_A.detach().abs().double()
        sums["gate_mass_C"] = mass_C.scatter_add_(0, routing.expert_A, weight_A)
    scores = routing.scores or RoutingScores()
    logits_TC = routing.choice_logits_TC
    share_TC = scores.share_TC
    if share_TC is None and logits_TC is not None:
        share_TC = logits_TC.detach().softmax(-1)
    if share_TC is not None:
        sums["router_entropy_sum"] = _entropy_sum(share_TC)
    ranked_TC = scores.ranked_TC
    if ranked_TC is None and logits_TC is not None:
        ranked_TC = logits_TC.detach()
    if ranked_TC is not None and not gate.sees_other_tokens:
        sums |= _margins(gate, inp, routing, ranked_TC)
    return sums


def _router_input(inp: GateInput) -> dict[str, Tensor]:
    """Return the sum of squares of the router's input, and a histogram of a sample of it."""
    x_TD = inp.x_TD.detach()
    norm_T = torch.linalg.vector_norm(x_TD, dim=-1, dtype=torch.float32)
    rows = torch.arange(len(x_TD), device=x_TD.device)
    if inp.padding_T is not None:
        rows = inp.unpadded_R
        norm_T = norm_T[rows]
    most = max(1, _SAMPLED_VALUES // x_TD.shape[1])
    stride = max(1, -(-len(rows) // most))
    return {
        "router_input_squares": norm_T.double().square().sum(),
        "router_input_counts": magnitude_histogram(x_TD[rows[::stride]]),
    }


def _entropy_sum(share_TC: Tensor) -> Tensor:
    """Sum the entropies, in nats, of each token's scores divided by their sum.

    With s the scores and S their sum, it is log S - (sum s log s) / S; 0 where S is 0, and
    NaN where a score is.
    """
    total_T = share_TC.sum(-1)
    entropy_T = total_T.log() + torch.special.entr(share_TC).sum(-1) / total_T
    return torch.where(total_T == 0, 0.0, entropy_T).sum(dtype=torch.float64)


def _margins(
    gate: Gate, inp: GateInput, routing: Routing, ranked_TC: Tensor
) -> dict[str, Tensor]:
    """Compare the lowest selected score of each token with the highest one not selected.

    The margin is their difference. Tokens without one of them do not count, which an infinite
    difference shows. A NaN among the scores counts, so that it is seen in the sum.
    """
    selected = _selected(gate, inp, routing, ranked_TC)
    if selected is None:
        return {}
    row_A, column_A = selected
    lowest_R = torch.full_like(ranked_TC[:, 0], float("inf"))
    lowest_R.scatter_reduce_(0, row_A, ranked_TC[row_A, column_A], "amin")
    others_TC = ranked_TC.clone()
    others_TC[row_A, column_A] = float("-inf")
    highest_R = others_TC.amax(-1)
    margin_R = lowest_R - highest_R
    counts_R = ~(lowest_R.isinf() | highest_R.isinf())
    resolution_R = NEAR_TIE * torch.maximum(lowest_R.abs(), highest_R.abs())
    return {
        "margin_tokens": counts_R.sum(),
        "margin_sum": torch.where(counts_R, margin_R, 0.0).sum(dtype=torch.float64),
        "near_ties": (counts_R & (margin_R.abs() <= resolution_R)).sum(),
    }


def _selected(
    gate: Gate, inp: GateInput, routing: Routing, ranked_TC: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return row and column of each selected score; None if the columns are unknown."""
    num_rows, num_columns = ranked_TC.shape
    rows_R = torch.arange(num_rows, device=ranked_TC.device)
    if routing.scores is not None and routing.scores.selected_Tk is not None:
        selected_Tk = routing.scores.selected_Tk
        return rows_R.repeat_interleave(selected_Tk.shape[1]), selected_Tk.flatten()
    if num_columns != gate.num_experts + len(gate.zero_computation_experts):
        return None
    row_A = routing.token_A
    if inp.padding_T is not None:
        row_T = torch.zeros_like(inp.padding_T, dtype=torch.int64)
        row_T[inp.unpadded_R] = rows_R
        row_A = row_T[row_A]
    return row_A, routing.expert_A
