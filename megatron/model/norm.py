"""Normalisation layers, torch's own fused ones."""

from __future__ import annotations

from torch import nn

from megatron.config.schema import ModelConfig


def build_norm(config: ModelConfig) -> nn.RMSNorm | nn.LayerNorm:
    """The configured normalisation over the last dimension, [..., D] -> [..., D]."""
    kind = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization]
    return kind(config.hidden_size, eps=config.norm_epsilon)
