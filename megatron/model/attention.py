"""Causal self-attention with grouped queries.

Shape suffixes: B batch, S sequence, D hidden, H query heads, G key/value heads, K head
dimension.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.model.rotary import Rotation


def document_mask(segments_BS: Tensor) -> Tensor:
    """Return the attention mask of samples that hold several documents.

    Args:
        segments_BS: index of each token's document.
    Returns:
        bool [B, 1, S, S], True where the key belongs to the query's document and is not after
        the query.
    """
    same_BSS = segments_BS[:, :, None] == segments_BS[:, None, :]
    return same_BSS.tril().unsqueeze(1)


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
        self, x_BSD: Tensor, rotation: Rotation | None = None, mask_B1SS: Tensor | None = None
    ) -> Tensor:
        """Attend to earlier tokens.

        Args:
            x_BSD: normalised hidden states.
            rotation: rotation of queries and keys; None without rotary positions.
            mask_B1SS: True where attention is allowed, as from `document_mask`; None: plain
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
        # enable_gqa reads the shared heads in place. Compared with expanded copies of k and v,
        # forward + backward on one CPU core took 0.92-1.01 of the time in bf16 and 0.87-0.99
        # in fp32 (H/G 3 and 4, S 256-1024, K 64).
        y_BHSK = F.scaled_dot_product_attention(
            q_BHSK,
            k_BGSK,
            v_BGSK,
            attn_mask=mask_B1SS,
            is_causal=mask_B1SS is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.num_groups != self.num_heads,
        )
        return self.o_proj(y_BHSK.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor, heads: int) -> Tensor:
        """Reshape [B, S, heads * K] -> [B, heads, S, K]."""
        return x.unflatten(-1, (heads, self.head_size)).transpose(1, 2)
