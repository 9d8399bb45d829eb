"""Causal self-attention with grouped queries.

Shape suffixes: B batch, S sequence, D hidden, H query heads, G key/value heads, K head
dimension.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.model.document_attention import DocumentLayout, attend, document_attention
from megatron.model.rotary import Rotation


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over earlier tokens; each key/value head serves H / G query heads.

    Grouped-query attention: Ainslie et al. 2023.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_groups = config.query_groups
        self.head_size = config.head_size
        self.dropout = config.attention_dropout
        q_size = self.num_heads * self.head_size
        kv_size = self.num_groups * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation | None = None,
        documents: DocumentLayout | None = None,
    ) -> Tensor:
        """Attend to earlier tokens.

        Args:
            x_BSD: normalised hidden states.
            rotation: rotation of queries and keys; None without rotary positions.
            documents: documents of the samples, to which attention is limited; None: plain
                causal attention.
        Returns:
            [B, S, D].
        """
        q_BHSK = self._split_heads(self.q_proj(x_BSD), self.num_heads)
        k_BGSK = self._split_heads(self.k_proj(x_BSD), self.num_groups)
        v_BGSK = self._split_heads(self.v_proj(x_BSD), self.num_groups)
        if rotation is not None:
            q_BHSK = rotation.apply(q_BHSK)
            k_BGSK = rotation.apply(k_BGSK)
        dropout = self.dropout if self.training else 0.0
        if documents is None:
            y_BHSK = attend(q_BHSK, k_BGSK, v_BGSK, dropout)
        else:
            y_BHSK = document_attention(q_BHSK, k_BGSK, v_BGSK, documents, dropout)
        return self.o_proj(y_BHSK.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor, heads: int) -> Tensor:
        """Reshape [B, S, heads * K] -> [B, heads, S, K]."""
        return x.unflatten(-1, (heads, self.head_size)).transpose(1, 2)
