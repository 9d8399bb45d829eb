"""The dense feed-forward layer; with another width, also the shared expert inside a mixture layer.

Shape suffixes: D hidden, H width of the layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.moe.experts.activations import activate, is_gated
from megatron.moe.ffn import FFNContext, FFNOutput


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) for the gated kinds, down(act(up(x))) otherwise. No biases."""

    def __init__(self, hidden_size: int, ffn_size: int, activation: str):
        super().__init__()
        self.activation = activation
        if is_gated(activation):
            self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: Tensor, context: FFNContext | None = None) -> FFNOutput:
        """[..., D] -> FFNOutput with y [..., D]; a dense layer does not use the context and has no aux loss."""
        up_H = self.up_proj(x)
        act_H = (
            activate(self.activation, self.gate_proj(x), up_H)
            if is_gated(self.activation)
            else activate(self.activation, up_H, None)
        )
        return FFNOutput(self.down_proj(act_H))
