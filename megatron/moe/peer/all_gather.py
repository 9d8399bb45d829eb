"""PEER with sharded experts: all-gather the tokens, reduce-scatter the outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.moe.dispatch.all_to_all import AllToAll
from megatron.moe.dispatch.permute import GatherWeights
from megatron.moe.dispatch.plan import PermutedTokens, exclusive_cumsum


@dataclass(frozen=True, slots=True)
class GatheredTokens:
    """All ranks' tokens and those of their assignments whose experts this rank holds; made by `share_tokens`."""

    x_TD: Tensor
    """tokens of all ranks that share the experts, rank by rank"""
    token_S: Tensor
    """int64, which of them each assignment is of"""
    expert_S: Tensor
    """int64, which of this rank's experts"""
    weight_S: Tensor
    tokens: list[int]
    """tokens of each rank"""


def all_gather_tokens(
    x_TD: Tensor,
    rows: PermutedTokens,
    weight_A: Tensor,
    kept_E: Tensor,
    group: dist.ProcessGroup,
) -> GatheredTokens:
    """Gather all ranks' tokens, once each, and send each assignment to the rank that holds its expert.

    For experts so small that a token's row outweighs them: with k assignments a token this moves P rows instead of k.

    Args:
        rows: this rank's assignments, sorted by expert.
        kept_E: how many each of all experts has.
    """
    ep_size = dist.get_world_size(group)
    kept_PE = kept_E.view(ep_size, -1)
    sent_P2 = torch.stack(
        [kept_PE.sum(1), torch.full((ep_size,), len(x_TD), device=kept_E.device)], 1
    )
    received_P2 = torch.empty_like(sent_P2)
    dist.all_to_all_single(received_P2, sent_P2, group=group)
    (send, _), (receive, tokens) = torch.stack([sent_P2, received_P2]).transpose(1, 2).tolist()
    # The same for all assignments at once: an int64 per assignment is little beside a row per token.
    token_S, weight_S = (
        rows.token_S[: sum(send)],
        GatherWeights.apply(weight_A, rows)[: sum(send)],
    )
    expert_S = torch.repeat_interleave(
        torch.arange(kept_PE.shape[1], device=kept_E.device).repeat(ep_size),
        kept_E,
        output_size=sum(send),
    )
    tokens_sent = AllToAll((x_TD.repeat(ep_size, 1),), [len(x_TD)] * ep_size, tokens, group)
    (weight_R,) = AllToAll((weight_S,), send, receive, group).finish()
    (ids_R2,) = AllToAll((torch.stack([token_S, expert_S], 1),), send, receive, group).finish()
    first_R = torch.repeat_interleave(
        exclusive_cumsum(received_P2[:, 1]), received_P2[:, 0], output_size=len(ids_R2)
    )
    (x_all_TD,) = tokens_sent.finish()
    return GatheredTokens(x_all_TD, ids_R2[:, 0] + first_R, ids_R2[:, 1], weight_R, tokens)


def reduce_scatter_outputs(
    y_TD: Tensor, shared: GatheredTokens, group: dist.ProcessGroup
) -> Tensor:
    """Sum up the ranks' parts of every token's output and hand each rank its own tokens: a reduce-scatter of uneven
    pieces, added in the order of ranks and in fp32, so that it is repeatable."""
    ep_size, mine = dist.get_world_size(group), shared.tokens[dist.get_rank(group)]
    (parts,) = AllToAll((y_TD,), shared.tokens, [mine] * ep_size, group).finish()
    wide = torch.promote_types(y_TD.dtype, torch.float32)
    return parts.view(ep_size, mine, y_TD.shape[1]).sum(0, dtype=wide).to(y_TD.dtype)
