"""Grouped experts: the MLPs of all local experts as stacked weights, run on rows sorted by expert.

Letters: E_local experts on this rank, N rows (tokens, repeated once per expert they visit), D hidden, H expert width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.schema import ACTIVATIONS, require


def is_gated(activation: str) -> bool:
    """Whether the activation multiplies a gate projection with an up projection (three matrices)."""
    return activation in ("swiglu", "geglu")


def activate(activation: str, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """act(gate), or act(gate) * up for the gated kinds.

    Raises:
        ValueError: unknown activation.
    """
    require(activation in ACTIVATIONS, "activation", activation, " ".join(ACTIVATIONS))
    if is_gated(activation):
        assert up is not None, f"{activation} needs an up projection"
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * up
    return {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation](gate)


class GroupedExperts(nn.Module):
    """All experts of one rank as stacked weights in Hugging Face's [E, out, in] layout.

    w1 is the gate (first) projection [E_local, H, D], w3 the up projection [E_local, H, D] (gated kinds only), w2 the
    down projection [E_local, D, H]. Each expert's weights are drawn from a generator seeded by (seed, layer, expert),
    so they do not depend on how the experts are sharded.

    Args:
        first: global number of this rank's first expert.
        init_std: of w1 and w3.
        output_std: of w2.
    """

    initialises_itself = True

    def __init__(self, num_local: int, hidden_size: int, ffn_size: int, activation: str, *, first: int = 0,
                 seed: int = 0, layer: int = 0, init_std: float = 0.02, output_std: float | None = None):
        super().__init__()
        self.num_local, self.activation = num_local, activation
        self.w1 = nn.Parameter(torch.empty(num_local, ffn_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_local, hidden_size, ffn_size))
        if is_gated(activation):
            self.w3 = nn.Parameter(torch.empty(num_local, ffn_size, hidden_size))
        if self.w1.is_meta:
            return
        output_std = init_std if output_std is None else output_std
        with torch.no_grad():
            for local in range(num_local):
                generator = torch.Generator().manual_seed(_expert_seed(seed, layer, first + local))
                for name, std in (("w1", init_std), ("w2", output_std), ("w3", init_std)):
                    if is_gated(activation) or name != "w3":
                        getattr(self, name).data[local].normal_(0, std, generator=generator)

    def forward(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        """Run expert e on its `counts[e]` consecutive rows.

        Args:
            rows_ND: rows sorted by local expert; sum(counts) of them.
        Returns:
            [N, D], row for row.
        """
        # unbind once: indexing a stacked weight in the loop would zero-fill the whole stack in every backward.
        w1, w2 = self.w1.unbind(), self.w2.unbind()
        w3 = self.w3.unbind() if is_gated(self.activation) else [None] * self.num_local
        outputs = []
        for x_nD, a, b, c in zip(rows_ND.split(counts), w1, w2, w3, strict=True):
            up_nH = None if c is None else F.linear(x_nD, c)
            outputs.append(F.linear(activate(self.activation, F.linear(x_nD, a), up_nH), b))
        return torch.cat(outputs)


def _expert_seed(seed: int, layer: int, expert: int) -> int:
    return (seed * 1_000_003 + layer * 65_537 + expert + 1) * 2_654_435_761 % 2**63


def expert_output_std(init_std: float, num_layers: int) -> float:
    """std of down projections, init_std / sqrt(2 x layers): each of the 2L branches adds its share of the variance."""
    return init_std / math.sqrt(2 * num_layers)
