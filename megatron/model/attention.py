"""Causal self-attention with grouped queries.

Shape suffixes: B batch, S sequence, D hidden, H query heads, G key/value heads, K head
dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.config.attention import AttentionConfig
from megatron.config.model import ModelConfig
from megatron.model.attend import ScoreOptions, attend
from megatron.model.attention_context import AttentionContext
from megatron.model.document_attention import document_attention
from megatron.model.norm import build_norm


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over earlier tokens; each key/value head serves H / G query heads.

    Grouped-query attention: Ainslie et al. 2023.

    Args:
        config: number and size of heads.
        options: None: the defaults.
        layer: index of the block, which some options depend on.
    """

    def __init__(
        self, config: ModelConfig, options: AttentionConfig | None = None, layer: int = 0
    ):
        super().__init__()
        options = options or AttentionConfig()
        self.num_heads = config.num_attention_heads
        self.num_groups = config.query_groups
        self.head_size = config.head_size
        self.dropout = config.attention_dropout
        q_size = self.num_heads * self.head_size
        kv_size = self.num_groups * self.head_size
        bias = options.add_qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, options.attention_output_bias)
        self.qk_norm = options.qk_norm
        self.clip = options.clip_qkv
        self.window = options.window_of(layer)
        self.sinks = None
        if options.attention_sinks:
            self.sinks = nn.Parameter(torch.zeros(self.num_heads))
        if self.qk_norm == "head":
            self.q_norm = build_norm(config, self.head_size)
            self.k_norm = build_norm(config, self.head_size)
        if self.qk_norm == "all-heads":
            self.q_norm = build_norm(config, q_size)
            self.k_norm = build_norm(config, kv_size)

    def forward(self, x_BSD: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Attend to earlier tokens.

        Args:
            x_BSD: normalised hidden states.
            context: positions, documents and cached keys; None: plain causal attention
                without rotary positions.
        Returns:
            [B, S, D].
        """
        context = context or AttentionContext()
        q_BHSK, k_BGSK, v_BGSK = self._project(x_BSD)
        if context.rotation is not None:
            q_BHSK = context.rotation.apply(q_BHSK)
            k_BGSK = context.rotation.apply(k_BGSK)
        y_BHSK = self._attend(q_BHSK, k_BGSK, v_BGSK, context)
        return self.o_proj(y_BHSK.transpose(1, 2).flatten(2))

    def _project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values before rotary positions."""
        q = self.q_proj(x_BSD)
        k = self.k_proj(x_BSD)
        v = self.v_proj(x_BSD)
        if self.qk_norm == "all-heads":
            q = self.q_norm(q)
            k = self.k_norm(k)
        q_BSHK = q.unflatten(-1, (self.num_heads, self.head_size))
        k_BSGK = k.unflatten(-1, (self.num_groups, self.head_size))
        v_BSGK = v.unflatten(-1, (self.num_groups, self.head_size))
        if self.qk_norm == "head":
            q_BSHK = self.q_norm(q_BSHK)
            k_BSGK = self.k_norm(k_BSGK)
        heads = []
        for x_BSHK in (q_BSHK, k_BSGK, v_BSGK):
            if self.clip:
                x_BSHK = x_BSHK.clamp(-self.clip, self.clip)
            heads.append(x_BSHK.transpose(1, 2))
        return tuple(heads)

    def _attend(
        self, q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, context: AttentionContext
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        options = ScoreOptions(dropout, window=self.window, sinks_H=self.sinks)
        if context.documents is not None:
            return document_attention(q_BHSK, k_BGSK, v_BGSK, context.documents, options)
        mask_B1SL = None
        if context.cache is not None:
            k_BGSK, v_BGSK = context.cache.update(k_BGSK, v_BGSK)
            mask_B1SL = context.visible.mask(k_BGSK.shape[2], self.window)
        return attend(q_BHSK, k_BGSK, v_BGSK, options, mask_B1SL)
