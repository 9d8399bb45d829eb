"""Dense feed-forward layer; with another width, also the shared expert of an MoE layer.

Shape suffixes: D hidden, H width of the layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.moe.experts.activations import activate, is_gated
from megatron.moe.ffn import FFNContext, FFNOutput


class MLP(nn.Module):
    """Feed-forward layer without biases.

    It computes down(act(gate(x)) * up(x)) for gated activations and down(act(up(x)))
    otherwise.
    """

    def __init__(self, hidden_size: int, ffn_size: int, activation: str):
        super().__init__()
        self.activation = activation
        if is_gated(activation):
            self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: Tensor, context: FFNContext | None = None) -> FFNOutput:
        """Apply the layer to x [..., D].

        A dense layer ignores the context and has no auxiliary loss.
        """
        up_H = self.up_proj(x)
        if is_gated(self.activation):
            hidden_H = activate(self.activation, self.gate_proj(x), up_H)
        else:
            hidden_H = activate(self.activation, up_H)
        return FFNOutput(self.down_proj(hidden_H))
