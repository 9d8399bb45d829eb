"""Rotary position embeddings (Su et al. 2021), in the rotate-half layout of Hugging Face's Llama.

Shape suffixes: B batch, S sequence, H heads, K head dimension, P number of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, fp32 [B or 1, 1, S, K]; heads are broadcast."""

    cos: Tensor
    sin: Tensor

    def apply(self, x_BHSK: Tensor) -> Tensor:
        """Rotate queries or keys [B, H, S, K].

        Computes in fp32 (in fp64 for fp64 inputs) and returns the dtype of the input.
        """
        first, second = x_BHSK.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return (x_BHSK * self.cos + turned * self.sin).to(x_BHSK.dtype)


class Rotary(nn.Module):
    """Table of rotations. The angle of pair i at position p is p * base^(-2i / K).

    Args:
        head_size: K, even.
        max_positions: P.
        base: base of the frequencies.
    """

    cos_PK: Tensor
    sin_PK: Tensor

    def __init__(self, head_size: int, max_positions: int, base: float = 10000.0):
        super().__init__()
        self.head_size = head_size
        self.max_positions = max_positions
        self.base = base
        self._build()

    def _build(self, device: torch.device | None = None) -> None:
        table_PK = torch.empty(self.max_positions, self.head_size, device=device)
        if table_PK.is_meta:
            # Shapes only: arithmetic on `meta` imports torch's compiler (2 s).
            self.register_buffer("cos_PK", table_PK, persistent=False)
            self.register_buffer("sin_PK", table_PK, persistent=False)
            return
        exponent_k = torch.arange(0, self.head_size, 2, device=device).float() / self.head_size
        position_P = torch.arange(self.max_positions, device=device).float()
        angle_PK = torch.outer(position_P, self.base**-exponent_k).repeat(1, 2)
        self.register_buffer("cos_PK", angle_PK.cos(), persistent=False)
        self.register_buffer("sin_PK", angle_PK.sin(), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> Rotary:
        # .bfloat16() would round the table and .to_empty() would leave it uninitialised: let
        # torch move the buffers, then compute them again on the new device.
        super()._apply(fn, recurse)
        self._build(self.cos_PK.device)
        return self

    def forward(self, length: int, position_ids_BS: Tensor | None = None) -> Rotation:
        """Return the rotations of positions 0 .. length - 1, or of the given positions.

        Args:
            length: S.
            position_ids_BS: int64, below P; None: 0 .. S - 1.
        """
        if position_ids_BS is None:
            return Rotation(self.cos_PK[None, None, :length], self.sin_PK[None, None, :length])
        cos_B1SK = self.cos_PK[position_ids_BS].unsqueeze(1)
        sin_B1SK = self.sin_PK[position_ids_BS].unsqueeze(1)
        return Rotation(cos_B1SK, sin_B1SK)
