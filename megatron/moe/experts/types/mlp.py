"""Plain experts: the MLP that dense layers have, with the model's --activation.

    E(x) = W2 act(W1 x + b1) + b2                       gelu, relu, silu
    E(x) = W2 (act(W1 x + b1) * (W3 x + b3)) + b2       swiglu, geglu

The biases exist with --expert-linear-bias only. Without them the experts are computed by
one fused operation, `megatron.moe.experts.grouped_mlp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron.moe.dispatch.plan import PermutedTokens
from megatron.moe.experts.activations import activate, is_gated
from megatron.moe.experts.expert_type import ExpertContext, ExpertType
from megatron.moe.experts.grouped_mlp import grouped_mlp


class MLPExperts(ExpertType, name="mlp"):
    """MLPs as stacked weights in Hugging Face's [E, out, in] layout.

    w1 is the gate (first) projection [E, H, D], w3 the up projection [E, H, D] (gated
    activations only), and w2 the down projection [E, D, H].

    Raises:
        ValueError: unknown activation.
    """

    @dataclass(frozen=True)
    class Config:
        """Options of plain experts."""

        linear_bias: bool = False
        """add biases to the experts' projections"""

    def __init__(self, config: Any, context: ExpertContext):
        super().__init__(config, context)
        c = context
        self.is_gated = is_gated(c.activation)
        self.add_matrix("w1", c.ffn_size, c.hidden_size)
        self.add_matrix("w2", c.hidden_size, c.ffn_size, is_output=True)
        if self.is_gated:
            self.add_matrix("w3", c.ffn_size, c.hidden_size)
        if config.linear_bias:
            self.add_vector("b1", c.ffn_size)
            self.add_vector("b2", c.hidden_size)
            if self.is_gated:
                self.add_vector("b3", c.ffn_size)

    def apply_experts(self, x_TD: Tensor, weight_S: Tensor, rows: PermutedTokens) -> Tensor:
        if self.config.linear_bias:
            return self._apply_with_biases(x_TD, weight_S, rows)
        w3 = None
        if self.is_gated:
            w3 = self.w3
        c = self.context
        return grouped_mlp(x_TD, weight_S, self.w1, w3, self.w2, rows, c.activation, c.backend)

    def _apply_with_biases(
        self, x_TD: Tensor, weight_S: Tensor, rows: PermutedTokens
    ) -> Tensor:
        """Compute biased experts. The weights multiply b2, too, so they come last."""
        x_SD = self.gather(x_TD, rows)
        gate_SH = self.linear(x_SD, self.w1, rows, self.b1)
        up_SH = None
        if self.is_gated:
            up_SH = self.linear(x_SD, self.w3, rows, self.b3)
        hidden_SH = activate(self.context.activation, gate_SH, up_SH)
        y_SD = self.linear(hidden_SH, self.w2, rows, self.b2)
        return self.combine(y_SD, weight_S, rows)
