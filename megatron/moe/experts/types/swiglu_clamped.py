"""Clamped SwiGLU (gpt-oss): bounded activations, and biases in both projections.

    g = min(W1 x + b1, limit)
    u = min(max(W3 x + b3, -limit), limit)
    E(x) = W2 (g * sigmoid(alpha * g) * (u + linear_offset)) + b2

Large activations of single tokens cannot grow without bound, which keeps them within the
range of 8-bit formats. With alpha 1, linear_offset 0 and without biases it is SwiGLU with
clamped inputs.

Source: gpt-oss (OpenAI 2025), its reference implementation. transformers' `GptOssExperts`
stores the gate and up projections interleaved and transposed, which maps as follows:

    w1 = gate_up_proj[:, :, 0::2].transpose(1, 2)    b1 = gate_up_proj_bias[:, 0::2]
    w3 = gate_up_proj[:, :, 1::2].transpose(1, 2)    b3 = gate_up_proj_bias[:, 1::2]
    w2 = down_proj.transpose(1, 2)                   b2 = down_proj_bias

Shape suffixes: as in `megatron.moe.experts.expert_type`, H expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.config.fields import require
from megatron.moe.dispatch.plan import PermutedTokens
from megatron.moe.experts.expert_type import ExpertContext, ExpertType


class SwiGLUClampedExperts(ExpertType, name="swiglu_clamped"):
    """The experts of gpt-oss. They have an activation of their own, whatever --activation is."""

    @dataclass(frozen=True)
    class Config:
        """Options of clamped SwiGLU; the defaults are those of gpt-oss."""

        limit: float = 7.0
        """upper bound of the gate projection, and bound of the up projection's magnitude"""
        alpha: float = 1.702
        """factor on the gate projection in the sigmoid"""
        linear_offset: float = 1.0
        """number added to the up projection"""
        linear_bias: bool = True
        """add biases to the experts' projections"""

        def __post_init__(self):
            require(self.limit > 0, "--expert-limit", self.limit, "a positive number")

    def __init__(self, config: Any, context: ExpertContext):
        super().__init__(config, context)
        c = context
        self.add_matrix("w1", c.ffn_size, c.hidden_size)
        self.add_matrix("w2", c.hidden_size, c.ffn_size, is_output=True)
        self.add_matrix("w3", c.ffn_size, c.hidden_size)
        self.add_vector("b1", c.ffn_size, exists=config.linear_bias)
        self.add_vector("b2", c.hidden_size, exists=config.linear_bias)
        self.add_vector("b3", c.ffn_size, exists=config.linear_bias)

    def apply_experts(self, x_TD: Tensor, weight_S: Tensor, rows: PermutedTokens) -> Tensor:
        c = self.config
        x_SD = self.gather(x_TD, rows)
        gate_SH = self.linear(x_SD, self.w1, rows, self.b1).clamp(max=c.limit)
        up_SH = self.linear(x_SD, self.w3, rows, self.b3).clamp(-c.limit, c.limit)
        hidden_SH = gate_SH * torch.sigmoid(c.alpha * gate_SH) * (up_SH + c.linear_offset)
        y_SD = self.linear(hidden_SH, self.w2, rows, self.b2)
        return self.combine(y_SD, weight_S, rows)
