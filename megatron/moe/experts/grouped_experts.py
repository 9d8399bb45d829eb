"""Grouped experts: the MLPs of all local experts as stacked weights.

Shape suffixes: E_local experts on this rank, T tokens, S rows (tokens, once per expert they visit), D hidden, H expert width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron.moe.dispatch.plan import PermutedTokens
from megatron.moe.experts.activations import is_gated
from megatron.moe.experts.grouped_mlp import grouped_mlp


class GroupedExperts(nn.Module):
    """All experts of one rank as stacked weights in Hugging Face's [E, out, in] layout.

    w1 is the gate (first) projection [E_local, H, D], w3 the up projection [E_local, H, D] (gated kinds only), w2 the
    down projection [E_local, D, H]. Each expert's weights are drawn from a generator seeded by (seed, layer, expert),
    so they do not depend on how the experts are sharded.

    Args:
        first: global number of this rank's first expert.
        init_std: of w1 and w3.
        output_std: of w2.
        backend: what multiplies, see `megatron.moe.experts.grouped_linear`.
    """

    initialises_itself = True

    def __init__(
        self,
        num_local: int,
        hidden_size: int,
        ffn_size: int,
        activation: str,
        *,
        first: int = 0,
        seed: int = 0,
        layer: int = 0,
        init_std: float = 0.02,
        output_std: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.num_local, self.activation, self.backend = num_local, activation, backend
        self.w1 = nn.Parameter(torch.empty(num_local, ffn_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_local, hidden_size, ffn_size))
        if is_gated(activation):
            self.w3 = nn.Parameter(torch.empty(num_local, ffn_size, hidden_size))
        if self.w1.is_meta:
            return
        output_std = init_std if output_std is None else output_std
        with torch.no_grad():
            for local in range(num_local):
                generator = torch.Generator().manual_seed(
                    _expert_seed(seed, layer, first + local)
                )
                for name, std in (("w1", init_std), ("w2", output_std), ("w3", init_std)):
                    if is_gated(activation) or name != "w3":
                        getattr(self, name).data[local].normal_(0, std, generator=generator)

    def forward(self, x_TD: Tensor, weight_S: Tensor, rows: PermutedTokens) -> Tensor:
        """Weighted sum of each token's experts: [T, D]; see `expert_mlp`."""
        w3 = self.w3 if is_gated(self.activation) else None
        return grouped_mlp(
            x_TD, weight_S, self.w1, w3, self.w2, rows, self.activation, self.backend
        )


def _expert_seed(seed: int, layer: int, expert: int) -> int:
    return (seed * 1_000_003 + layer * 65_537 + expert + 1) * 2_654_435_761 % 2**63


def expert_output_std(init_std: float, num_layers: int) -> float:
    """std of down projections, init_std / sqrt(2 x layers): each of the 2L branches adds its share of the variance."""
    return init_std / math.sqrt(2 * num_layers)
