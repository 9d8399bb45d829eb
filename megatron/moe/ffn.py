"""What every feed-forward layer, dense or MoE, takes and returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FFNContext:
    """What a block hands to its feed-forward layer, dense or mixture, beside the hidden states."""

    token_ids_BS: Tensor | None = None
    carry: Tensor | None = None
    progress: float = 0.0


@dataclass(frozen=True, slots=True)
class FFNOutput:
    """What every feed-forward layer, dense or mixture, returns."""

    y: Tensor
    """[B, S, D], to be added to the residual stream"""
    aux_loss: Tensor | None = None
    """0-d fp32, None from a dense layer"""
    carry: Tensor | None = None
