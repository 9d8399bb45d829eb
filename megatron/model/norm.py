"""Normalisation layers: torch's fused ones."""

from __future__ import annotations

from torch import nn

from megatron.config.model import ModelConfig


def build_norm(config: ModelConfig, size: int | None = None) -> nn.RMSNorm | nn.LayerNorm:
    """Build the configured normalisation over the last dimension, [..., D] -> [..., D].

    Args:
        size: D; None: that of hidden states.
    """
    kinds = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
    return kinds[config.normalization](size or config.hidden_size, eps=config.norm_epsilon)
