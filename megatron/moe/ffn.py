"""Input context and output of every feed-forward layer, dense or MoE."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FFNContext:
    """Inputs of a feed-forward layer in addition to the hidden states."""

    token_ids_BS: Tensor | None = None
    """int64 token ids"""
    carry: Tensor | None = None
    """carry of the previous MoE layer's gate, threaded through the layers as in
    jax.lax.scan"""
    progress: float = 0.0
    """consumed / total training samples, in [0, 1]"""


@dataclass(frozen=True, slots=True)
class FFNOutput:
    """Output of a feed-forward layer."""

    y: Tensor
    """[B, S, D], to be added to the residual stream"""
    aux_loss: Tensor | None = None
    """0-d fp32 auxiliary loss; None from a dense layer"""
    carry: Tensor | None = None
    """carry for the next MoE layer's gate; None if there is none"""
