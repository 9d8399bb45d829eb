"""Similarity of the experts of an MoE layer, and of the rows of its router.

Shape suffixes: E experts or rows of a router, P parameters of one expert, N sampled ones.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.moe.gate import Gate
from megatron.moe.layer import MoELayer

MAX_SAMPLED_PARAMETERS = 65_536
"""Parameters of an expert from which its cosine to others is computed. For unrelated experts the
standard deviation of the estimate is 1 / sqrt(65536) = 0.004."""
_SAMPLING_SEED = 0


def sampled_expert_weights(layer: MoELayer) -> Tensor:
    """Return the same parameters of each expert of this rank: fp32 [E, N].

    They are all parameters where an expert has at most MAX_SAMPLED_PARAMETERS, otherwise as many
    positions drawn with replacement, the same on all ranks and in all calls.
    """
    stacks = [p.detach() for _, p in sorted(layer.experts.named_parameters())]
    sizes = [stack[0].numel() for stack in stacks]
    if sum(sizes) <= MAX_SAMPLED_PARAMETERS:
        return torch.cat([stack.flatten(1).float() for stack in stacks], dim=1)
    generator = torch.Generator().manual_seed(_SAMPLING_SEED)
    position_N = torch.randint(sum(sizes), (MAX_SAMPLED_PARAMETERS,), generator=generator)
    position_N = position_N.to(stacks[0].device)
    columns = []
    for stack, size in zip(stacks, sizes, strict=True):
        here_N = position_N[(position_N >= 0) & (position_N < size)]
        columns.append(stack.flatten(1)[:, here_N].float())
        position_N = position_N - size
    return torch.cat(columns, dim=1)


def all_gather_experts(weight_EN: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows of all experts, in their order. A collective of the expert-parallel group."""
    if group is None:
        return weight_EN
    parts = [torch.empty_like(weight_EN) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, weight_EN.contiguous(), group=group)
    return torch.cat(parts)


def pairwise_cosine(vectors_EN: Tensor) -> tuple[float, float] | None:
    """Return the mean and the largest cosine of two different rows; None for fewer than two.

    The cosine with a zero vector is 0.
    """
    num_rows = len(vectors_EN)
    if num_rows < 2:
        return None
    unit_EN = F.normalize(vectors_EN.float(), dim=-1)
    cosine_EE = unit_EN @ unit_EN.T
    is_other_EE = ~torch.eye(num_rows, dtype=torch.bool, device=cosine_EE.device)
    cosines = cosine_EE[is_other_EE]
    return float(cosines.mean(dtype=torch.float64)), float(cosines.max())


def router_weights(gate: Gate) -> Tensor | None:
    """Return a copy of what a gate learns to choose by: fp32 [parameters], on the CPU.

    Parameters of zero-computation experts are not part of it. None for a gate without parameters.
    """
    own = {id(p) for p in gate.zero_computation_experts.parameters()}
    parts = [p.detach().flatten() for p in gate.parameters() if id(p) not in own]
    if not parts:
        return None
    return torch.cat([part.float().cpu() for part in parts])


def router_rows(gate: Gate) -> Tensor | None:
    """Return the matrix of a gate's linear router [E, D]; None for a gate without one."""
    router = getattr(gate, "router", None)
    if not isinstance(router, nn.Linear):
        return None
    return router.weight.detach()


def relative_distance(before: Tensor, now: Tensor) -> float:
    """Return |now - before| / |before| in the Euclidean norm; NaN where both are 0."""
    return float((now - before).double().norm() / before.double().norm())
