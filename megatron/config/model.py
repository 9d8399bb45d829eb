"""Config section `model`: shape of the decoder-only transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.config.fields import (
    option,
    require,
    require_choices,
    require_each,
    require_not_negative,
    require_positive_integers,
    require_positive_numbers,
    require_setting,
)
from megatron.config.moe import MoEConfig
from megatron.config.needs import Need, setting

GATED_ACTIVATIONS = ("swiglu", "geglu")
"""Activations with a third weight matrix, whose product multiplies the activated one"""
ACTIVATIONS = ("gelu", "relu", "silu", *GATED_ACTIVATIONS)


def _uses_dense_width(values: Mapping[str, Any]) -> bool:
    """Return whether a layer or an expert has the width of a dense feed-forward layer."""
    if not values.get("moe_ffn_hidden_size"):
        return True
    moe = MoEConfig(**{field.name: values[field.name] for field in fields(MoEConfig)})
    return not all(map(moe.is_moe_layer, range(values["num_layers"])))


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder-only transformer."""

    num_layers: int = 4
    """number of transformer blocks"""
    hidden_size: int = 256
    """width of the residual stream"""
    ffn_hidden_size: int = option(
        0,
        needs=Need(
            rule=_uses_dense_width, text="a dense layer, or without --moe-ffn-hidden-size"
        ),
    )
    """hidden size of a dense feed-forward layer; 0: 4 x hidden size (8/3 of it, rounded up
    to a multiple of 64, for swiglu and geglu)"""
    num_attention_heads: int = 4
    """number of query heads"""
    num_query_groups: int = option(0, needs=setting("attention", "gqa"))
    """number of key/value heads (grouped-query attention); 0: as many as query heads"""
    kv_channels: int = option(0, needs=setting("attention", "gqa"))
    """dimension of one attention head; 0: hidden size / heads"""
    seq_length: int = 256
    """tokens per training sample"""
    max_position_embeddings: int = 0
    """number of positions (rows of the table of learned positions); 0: the sequence
    length"""
    position_embedding_type: str = option("rope", choices=("rope", "learned"))
    """rotary or learned absolute positions"""
    rotary_base: float = option(10000.0, needs=setting("position_embedding_type", "rope"))
    """base of the rotary frequencies"""
    normalization: str = option("RMSNorm", choices=("RMSNorm", "LayerNorm"))
    """kind of normalisation layer"""
    norm_epsilon: float = option(1e-5, "--layernorm-epsilon")
    """epsilon of the normalisation layers"""
    activation: str = option("gelu", choices=ACTIVATIONS)
    """activation function of dense layers and experts; swiglu and geglu add a third weight
    matrix"""
    swiglu: bool = False
    """the same as --activation swiglu"""
    untie_embeddings_and_output_weights: bool = False
    """give the output layer its own weights instead of the embedding's"""
    init_method_std: float = 0.02
    """standard deviation of the initial weights; divided by sqrt(2 x layers) for output
    projections"""
    attention_dropout: float = 0.0
    """dropout probability of attention weights"""
    hidden_dropout: float = 0.0
    """dropout probability of the outputs of attention and feed-forward layers"""
    make_vocab_size_divisible_by: int = 128
    """the vocabulary size is padded to a multiple of this number"""
    vocab_size: int = 0
    """vocabulary size, at least the tokenizer's; 0: the tokenizer's"""

    def __post_init__(self):
        require_positive_integers(
            self,
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "seq_length",
            "make_vocab_size_divisible_by",
        )
        require_positive_numbers(self, "rotary_base", "norm_epsilon", "init_method_std")
        require_not_negative(
            self,
            "ffn_hidden_size",
            "num_query_groups",
            "kv_channels",
            "max_position_embeddings",
            "vocab_size",
        )
        require_choices(self)
        require_setting(
            self,
            "activation",
            not self.swiglu or self.activation in ("gelu", "swiglu"),
            "only swiglu with --swiglu",
            "Leave one of the two out.",
        )
        heads = self.num_attention_heads
        require(
            heads % self.query_groups == 0,
            "--num-query-groups",
            self.query_groups,
            f"a divisor of the {heads} heads",
        )
        require_setting(
            self,
            "max_position_embeddings",
            self.max_positions >= self.seq_length,
            f"at least the sequence length {self.seq_length}",
        )
        dropouts = ("attention_dropout", "hidden_dropout")
        require_each(self, dropouts, lambda value: 0 <= value < 1, "0 <= p < 1")

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Dimension of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def max_positions(self) -> int:
        """Number of positions that the model can represent."""
        return self.max_position_embeddings or self.seq_length

    @property
    def act(self) -> str:
        """Activation function, with `swiglu` taken into account."""
        if self.swiglu:
            return "swiglu"
        return self.activation

    @property
    def ffn_size(self) -> int:
        """Hidden size of a dense feed-forward layer."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        if self.act in GATED_ACTIVATIONS:
            return _round_up(-(-8 * self.hidden_size // 3), 64)
        return 4 * self.hidden_size

    def padded_vocab(self, vocab_size: int) -> int:
        """Return `vocab_size` rounded up to the required multiple."""
        return _round_up(vocab_size, self.make_vocab_size_divisible_by)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
