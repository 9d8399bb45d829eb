"""Rotary position embeddings (Su et al. 2021), in the rotate-half layout of Hugging Face's Llama.

Shape suffixes: B batch, S sequence, H heads, K head dimension, R rotated dimensions of a head,
F rotated pairs, P number of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.config.rotary import RotaryConfig
from megatron.model.rotary_scaling import FrequencyScaling, build_scaling


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, fp32 [B or 1, 1, S, R]; heads are broadcast."""

    cos: Tensor
    sin: Tensor

    def apply(self, x_BHSK: Tensor) -> Tensor:
        """Rotate the first R dimensions of queries or keys [B, H, S, K].

        Computes in fp32 (in fp64 for fp64 inputs) and returns the dtype of the input.
        """
        rotated_size = self.cos.shape[-1]
        if rotated_size == x_BHSK.shape[-1]:
            return self._rotate(x_BHSK)
        x_BHSR = x_BHSK[..., :rotated_size]
        return torch.cat((self._rotate(x_BHSR), x_BHSK[..., rotated_size:]), -1)

    def _rotate(self, x_BHSR: Tensor) -> Tensor:
        first, second = x_BHSR.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return (x_BHSR * self.cos + turned * self.sin).to(x_BHSR.dtype)


class Rotary(nn.Module):
    """Table of rotations. The angle of pair i at position p is p * base^(-2i / R).

    Args:
        rotated_size: R, even.
        max_positions: P.
        base: base of the frequencies.
        scaling: change of the frequencies; None: they stay.
    """

    cos_PR: Tensor
    sin_PR: Tensor

    def __init__(
        self,
        rotated_size: int,
        max_positions: int,
        base: float = 10000.0,
        scaling: FrequencyScaling | None = None,
    ):
        super().__init__()
        self.rotated_size = rotated_size
        self.max_positions = max_positions
        self.base = base
        self.scaling = scaling
        self._build()

    def _build(self, device: torch.device | None = None) -> None:
        table_PR = torch.empty(self.max_positions, self.rotated_size, device=device)
        if table_PR.is_meta:
            # Shapes only: arithmetic on `meta` imports torch's compiler (2 s), and so does
            # `empty_like` (0.5 s).
            self.register_buffer("cos_PR", table_PR, persistent=False)
            sin_PR = torch.empty(table_PR.shape, device="meta")
            self.register_buffer("sin_PR", sin_PR, persistent=False)
            return
        position_P = torch.arange(self.max_positions, device=device).float()
        angle_PR = torch.outer(position_P, self._frequencies(device)).repeat(1, 2)
        amplitude = 1.0 if self.scaling is None else self.scaling.amplitude
        self.register_buffer("cos_PR", angle_PR.cos() * amplitude, persistent=False)
        self.register_buffer("sin_PR", angle_PR.sin() * amplitude, persistent=False)

    def _frequencies(self, device: torch.device | None) -> Tensor:
        """Return the angle per position of each pair of dimensions, fp32."""
        exponent_F = torch.arange(0, self.rotated_size, 2, device=device).float()
        frequency_F = 1 / self.base ** (exponent_F / self.rotated_size)
        if self.scaling is None:
            return frequency_F
        return self.scaling.scale(frequency_F, self.base)

    def _apply(self, fn: Callable, recurse: bool = True) -> Rotary:
        # .bfloat16() would round the table and .to_empty() would leave it uninitialised: let
        # torch move the buffers, then compute them again on the new device.
        super()._apply(fn, recurse)
        self._build(self.cos_PR.device)
        return self

    def forward(self, length: int, position_ids_BS: Tensor | None = None) -> Rotation:
        """Return the rotations of positions 0 .. length - 1, or of the given positions.

        Args:
            length: S.
            position_ids_BS: int64, below P; None: 0 .. S - 1.
        """
        if position_ids_BS is None:
            return Rotation(self.cos_PR[None, None, :length], self.sin_PR[None, None, :length])
        cos_B1SR = self.cos_PR[position_ids_BS].unsqueeze(1)
        sin_B1SR = self.sin_PR[position_ids_BS].unsqueeze(1)
        return Rotation(cos_B1SR, sin_B1SR)


def build_rotary(
    model: ModelConfig, options: RotaryConfig, head_size: int | None = None
) -> Rotary:
    """Build the table of rotations of a model's queries and keys.

    Args:
        head_size: dimensions of a head to which rotary positions may apply; None: all.
    """
    rotated_size = options.rotated_size(head_size or model.head_size)
    scaling = build_scaling(options, model.max_positions)
    return Rotary(rotated_size, model.max_positions, model.rotary_base, scaling)
