"""Losses that make consecutive tokens use the same few experts (BlockFFN, Song et al. 2025).

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.moe.routing import GateInput

_LARGEST_SHARE = 1 - 1e-5
"""Keeps the logarithm of 1 - share finite."""


def continues_sequence(inp: GateInput) -> Tensor:
    """Return bool [T]: the token before is of the same sequence."""
    num_tokens = len(inp.x_TD)
    follows_T = torch.ones(num_tokens, dtype=torch.bool, device=inp.x_TD.device)
    follows_T[:1] = False
    if inp.sequence_T is not None:
        follows_T[1:] = inp.sequence_T[1:] == inp.sequence_T[:-1]
    return follows_T


def locality_loss(logits_TE: Tensor, follows_T: Tensor, sharpness: float) -> Tensor:
    """Compute the mean cross-entropy between the soft patterns of neighbours.

    A pattern is sigmoid(sharpness * z). That of the next token is the target; both sides
    receive gradient.

    Args:
        logits_TE: fp32.
        follows_T: `continues_sequence`.
    Returns:
        0-d fp32; 0 when there are no neighbours.
    """
    sharp_TE = sharpness * logits_TE
    loss_TE = F.binary_cross_entropy_with_logits(
        sharp_TE[:-1], sharp_TE[1:].sigmoid(), reduction="none"
    )
    pair_T1 = follows_T[1:, None]
    # A mask instead of an index: the number of pairs would be read from the device.
    total = (loss_TE * pair_T1).sum()
    return total / (pair_T1.sum() * logits_TE.shape[1]).clamp_min(1)


def chunk_loss(
    activation_TE: Tensor, follows_T: Tensor, chunk_length: int
) -> tuple[Tensor, Tensor]:
    """Compute the mean probability that an expert is used in a chunk, summed over chunks.

    A chunk is chunk_length consecutive tokens of a sequence, or the rest of it. A token
    uses expert e with the probability a_e / sum_j a_j.

    Args:
        activation_TE: fp32, not negative.
        follows_T: `continues_sequence`.
    Returns:
        The sum over chunks (0-d fp32, differentiable) and the number of chunks (0-d).
    """
    num_tokens = len(activation_TE)
    total_T1 = activation_TE.sum(-1, keepdim=True)
    share_TE = activation_TE / torch.where(total_T1 > 0, total_T1, 1)
    unused_TE = torch.log1p(-share_TE.clamp_max(_LARGEST_SHARE))
    # Differences of a running sum, in fp64, are deterministic sums over the chunks.
    running_TE = unused_TE.double().cumsum(0)
    index_T = torch.arange(num_tokens, device=activation_TE.device)
    start_T = torch.where(follows_T, 0, index_T).cummax(0).values
    first_T = index_T - (index_T - start_T) % chunk_length
    begins_T = first_T == index_T
    is_last_T = torch.ones_like(begins_T)
    is_last_T[:-1] = begins_T[1:]
    before_TE = F.pad(running_TE, (0, 0, 1, 0))[first_T]
    used_TE = 1 - (running_TE - before_TE).exp()
    total = (used_TE * is_last_T[:, None]).sum().float() / max(1, activation_TE.shape[1])
    return total, is_last_T.sum()
