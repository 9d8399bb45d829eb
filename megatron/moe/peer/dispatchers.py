"""Token dispatchers of PEER: tokens go to all ranks, assignments to the experts' ranks.

A PEER expert is so small that a token's row outweighs it. Rather than one row per
assignment, as the all-to-all of other experts sends, each token travels once to every
rank: with k assignments per token and P ranks this moves P rows per token instead of k.

Shape suffixes: T tokens on this rank, D hidden, E experts of all ranks, A assignments
of the gate, S dispatched assignments sorted by expert, R assignments received by this
rank, P ranks that share the experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.moe.dispatch.all_to_all import AllToAll
from megatron.moe.dispatch.dispatchers import TokenDispatcher
from megatron.moe.dispatch.permute import GatherWeights
from megatron.moe.dispatch.plan import DispatchPlan, exclusive_cumsum
from megatron.moe.routing import Routing


class PEERLocalDispatcher(TokenDispatcher):
    """Dispatcher for PEER experts that are all on this rank: no communication.

    The experts take the gate's assignments in any order, and their output is already
    the weighted sum per token.
    """

    def start(self, x_TD: Tensor, routing: Routing, plan: DispatchPlan) -> tuple[Tensor, ...]:
        if plan.routed is None:
            return x_TD, routing.token_A, routing.expert_A, routing.weight_A
        num_rows = sum(plan.routed.counts())
        dispatched_S = plan.routed.source_index_S[:num_rows]
        weight_S = GatherWeights.apply(routing.weight_A, plan.routed)[:num_rows]
        return x_TD, routing.token_A[dispatched_S], routing.expert_A[dispatched_S], weight_S

    def finish(self, in_flight: tuple[Tensor, ...]) -> tuple[tuple, None]:
        return in_flight, None

    def combine(self, expert_output: Tensor, metadata: None) -> Tensor:
        return expert_output


@dataclass(frozen=True, slots=True)
class _TokensInFlight:
    """Tokens on their way to all ranks, and the assignments of this rank's experts."""

    tokens: AllToAll
    tokens_per_rank: list[int]
    token_R: Tensor
    """int64, token of each assignment, counted over the tokens of all ranks"""
    expert_R: Tensor
    """int64, expert of each assignment, counted over this rank's experts"""
    weight_R: Tensor


class AllGatherDispatcher(TokenDispatcher):
    """Dispatcher for sharded PEER experts: all-gather tokens, reduce-scatter outputs.

    Both are implemented by all-to-alls, because ranks may hold different numbers of
    tokens.

    Args:
        group: ranks that share the experts.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def start(self, x_TD: Tensor, routing: Routing, plan: DispatchPlan) -> _TokensInFlight:
        """Start gathering the tokens, then exchange the (small) assignments."""
        counts = _exchange_counts(plan.dispatched_C, len(x_TD), self.group)
        ep_size = len(counts.tokens_per_rank)
        tokens = AllToAll(
            (x_TD.repeat(ep_size, 1),),
            [len(x_TD)] * ep_size,
            counts.tokens_per_rank,
            self.group,
        )
        num_sent = sum(counts.input_splits)
        token_S = plan.routed.token_S[:num_sent]
        weight_S = GatherWeights.apply(routing.weight_A, plan.routed)[:num_sent]
        num_local = len(plan.dispatched_C) // ep_size
        local_expert_E = torch.arange(num_local, device=x_TD.device).repeat(ep_size)
        expert_S = torch.repeat_interleave(
            local_expert_E, plan.dispatched_C, output_size=num_sent
        )
        weight_R = self._exchange_rows(weight_S, counts)
        ids_R2 = self._exchange_rows(torch.stack([token_S, expert_S], 1), counts)
        first_token_R = torch.repeat_interleave(
            exclusive_cumsum(counts.received_P2[:, 1]),
            counts.received_P2[:, 0],
            output_size=len(ids_R2),
        )
        token_R = ids_R2[:, 0] + first_token_R
        return _TokensInFlight(tokens, counts.tokens_per_rank, token_R, ids_R2[:, 1], weight_R)

    def finish(self, in_flight: _TokensInFlight) -> tuple[tuple, list[int]]:
        (x_all_TD,) = in_flight.tokens.finish()
        expert_inputs = (x_all_TD, in_flight.token_R, in_flight.expert_R, in_flight.weight_R)
        return expert_inputs, in_flight.tokens_per_rank

    def combine(self, expert_output: Tensor, metadata: list[int]) -> Tensor:
        """Sum the ranks' parts of the output of each of this rank's tokens.

        The sum is taken in rank order and in fp32 or wider, so it is deterministic.
        """
        ep_size = len(metadata)
        num_tokens = metadata[dist.get_rank(self.group)]
        all_to_all = AllToAll((expert_output,), metadata, [num_tokens] * ep_size, self.group)
        (parts,) = all_to_all.finish()
        parts_PTD = parts.view(ep_size, num_tokens, expert_output.shape[1])
        wide = torch.promote_types(expert_output.dtype, torch.float32)
        return parts_PTD.sum(0, dtype=wide).to(expert_output.dtype)

    def _exchange_rows(self, rows: Tensor, counts: _Counts) -> Tensor:
        all_to_all = AllToAll((rows,), counts.input_splits, counts.output_splits, self.group)
        (received,) = all_to_all.finish()
        return received


@dataclass(frozen=True, slots=True)
class _Counts:
    """Numbers of assignments and tokens that the ranks exchange."""

    input_splits: list[int]
    """assignments sent to each rank"""
    output_splits: list[int]
    """assignments received from each rank"""
    tokens_per_rank: list[int]
    received_P2: Tensor
    """(assignments, tokens) received from each rank"""


def _exchange_counts(
    dispatched_E: Tensor, num_tokens: int, group: dist.ProcessGroup
) -> _Counts:
    """Exchange numbers of assignments and tokens, with one copy to the host."""
    ep_size = dist.get_world_size(group)
    assignments_P = dispatched_E.view(ep_size, -1).sum(1)
    tokens_P = torch.full((ep_size,), num_tokens, device=dispatched_E.device)
    sent_P2 = torch.stack([assignments_P, tokens_P], 1)
    received_P2 = torch.empty_like(sent_P2)
    dist.all_to_all_single(received_P2, sent_P2, group=group)
    sent, received = torch.stack([sent_P2, received_P2]).transpose(1, 2).tolist()
    return _Counts(
        input_splits=sent[0],
        output_splits=received[0],
        tokens_per_rank=received[1],
        received_P2=received_P2,
    )
