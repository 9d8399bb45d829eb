"""Grouped experts: the MLPs of all local experts as stacked weights.

Shape suffixes: E experts on this rank, T tokens, S rows (one per assignment, sorted by
expert), D hidden, H expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.moe.dispatch.plan import PermutedTokens
from megatron.moe.experts.activations import is_gated
from megatron.moe.experts.expert_init import ExpertInit
from megatron.moe.experts.grouped_mlp import grouped_mlp


class GroupedExperts(nn.Module):
    """All experts of one rank as stacked weights in Hugging Face's [E, out, in] layout.

    w1 is the gate (first) projection [E, H, D], w3 the up projection [E, H, D] (gated
    activations only), and w2 the down projection [E, D, H].

    Args:
        num_local: number of experts on this rank.
        activation: a name of `megatron.moe.experts.activations`.
        init: distribution and seed of the initial weights.
        backend: value of --moe-backend; see `megatron.moe.experts.backends`.
    Raises:
        ValueError: unknown activation.
    """

    initialises_itself = True

    def __init__(
        self,
        num_local: int,
        hidden_size: int,
        ffn_size: int,
        activation: str,
        *,
        init: ExpertInit | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.num_local = num_local
        self.activation = activation
        self.backend = backend
        self.w1 = nn.Parameter(torch.empty(num_local, ffn_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_local, hidden_size, ffn_size))
        if is_gated(activation):
            self.w3 = nn.Parameter(torch.empty(num_local, ffn_size, hidden_size))
        if not self.w1.is_meta:
            self._draw_weights(init or ExpertInit())

    @torch.no_grad()
    def _draw_weights(self, init: ExpertInit) -> None:
        """Draw each expert's weights from its own generator: w1, w2, then w3."""
        for local in range(self.num_local):
            generator = init.generator(local)
            self.w1.data[local].normal_(0, init.init_std, generator=generator)
            self.w2.data[local].normal_(0, init.output_std, generator=generator)
            if is_gated(self.activation):
                self.w3.data[local].normal_(0, init.init_std, generator=generator)

    def forward(self, x_TD: Tensor, weight_S: Tensor, rows: PermutedTokens) -> Tensor:
        """Return the weighted sum of each token's experts: [T, D].

        With experts on several ranks, T counts rows received from all of them, one expert each.
        """
        w3 = None
        if is_gated(self.activation):
            w3 = self.w3
        return grouped_mlp(
            x_TD, weight_S, self.w1, w3, self.w2, rows, self.activation, self.backend
        )
