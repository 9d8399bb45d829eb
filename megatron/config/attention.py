"""Config section `attention`: options of the attention layers beyond the shape of their heads."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    option,
    require,
    require_choices,
    require_not_negative,
    require_positive_integers,
    require_setting,
)
from megatron.config.model import ModelConfig
from megatron.config.needs import setting

_GQA = setting("attention", "gqa")
_MLA = setting("attention", "mla")


@dataclass(frozen=True)
class AttentionConfig:
    """Options of the attention layers; number and size of ordinary heads belong to the model."""

    attention: str = option("gqa", choices=("gqa", "mla"))
    """kind of attention; gqa: grouped queries; mla: multi-head latent attention (DeepSeek-V2),
    which caches one small latent per token and layer"""
    add_qkv_bias: bool = False
    """add biases to the projections of queries, keys and values; with mla to those of hidden
    states to latents"""
    attention_output_bias: bool = False
    """add a bias to the output projection of attention"""
    qk_norm: str = option("none", choices=("none", "head", "all-heads"), needs=_GQA)
    """normalise queries and keys before rotary positions; head: the features of each head (Qwen3,
    GLM-4.5); all-heads: those of all heads together (OLMoE)"""
    clip_qkv: float = option(0.0, needs=_GQA)
    """clamp queries, keys and values to -X .. X before rotary positions (OLMoE); 0: no limit"""

    attention_sinks: bool = option(False, needs=_GQA)
    """add a learned logit per head to the denominator of the softmax over keys (gpt-oss)"""
    window_size: int = option(0, needs=_GQA)
    """sliding window: a query sees this many last keys, its own included; 0: all"""
    window_layers: tuple[int, ...] = option((), needs=setting("window_size"))
    """indices of the blocks with a sliding window, counted from 0; empty: all"""
    q_lora_rank: int = option(0, needs=_MLA)
    """size of the latents of queries; 0: queries are projections of hidden states"""
    kv_lora_rank: int = option(512, needs=_MLA)
    """size of the latents of keys and values"""
    qk_rope_head_dim: int = option(64, needs=_MLA)
    """features of a head's queries and keys that are rotated; all heads share those of keys"""
    qk_nope_head_dim: int = option(128, needs=_MLA)
    """features of a head's queries and keys that are not rotated"""
    v_head_dim: int = option(128, needs=_MLA)
    """features of a head's values"""

    def __post_init__(self):
        require_choices(self)
        require_not_negative(self, "q_lora_rank", "clip_qkv", "window_size")
        require_positive_integers(
            self, "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"
        )

    def check_heads(self, model: ModelConfig) -> None:
        """Check that the sizes of attention heads fit together, and that windows have a block.

        Raises:
            ValueError: they do not.
        """
        require_setting(
            self,
            "window_layers",
            all(0 <= layer < model.num_layers for layer in self.window_layers),
            f"blocks from 0 to {model.num_layers - 1}",
        )
        has_rope = model.position_embedding_type == "rope"
        if self.attention == "mla":
            is_even = self.qk_rope_head_dim % 2 == 0
            allowed = "an even number with rotary positions"
            require_setting(self, "qk_rope_head_dim", is_even or not has_rope, allowed)
            return
        require_setting(
            model,
            "num_attention_heads",
            model.kv_channels > 0 or model.hidden_size % model.num_attention_heads == 0,
            f"a divisor of the hidden size {model.hidden_size}",
            "Or set --kv-channels.",
        )
        require(
            not has_rope or model.head_size % 2 == 0,
            "--kv-channels",
            model.head_size,
            "an even number with rotary positions",
        )

    def rotary_head_size(self, model: ModelConfig) -> int:
        """Return the features of a head to which rotary positions may apply."""
        if self.attention == "mla":
            return self.qk_rope_head_dim
        return model.head_size

    def window_of(self, layer: int) -> int:
        """Return the sliding window of block `layer`, counted from 0; 0: no limit."""
        if self.window_layers and layer not in self.window_layers:
            return 0
        return self.window_size
