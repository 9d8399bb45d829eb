"""Normalisation layers: torch's fused ones."""

from __future__ import annotations

from torch import nn

from megatron.config.model import ModelConfig


def build_norm(config: ModelConfig) -> nn.RMSNorm | nn.LayerNorm:
    """Build the configured normalisation over the last dimension, [..., D] -> [..., D]."""
    kinds = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
    return kinds[config.normalization](config.hidden_size, eps=config.norm_epsilon)
