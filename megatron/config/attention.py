"""Config section `attention`: options of the attention layers beyond the shape of their heads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionConfig:
    """Options of the attention layers; the number and size of heads belong to the model."""

    add_qkv_bias: bool = False
    """add biases to the projections of queries, keys and values"""
    attention_output_bias: bool = False
    """add a bias to the output projection of attention"""
