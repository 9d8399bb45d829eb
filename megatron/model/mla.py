"""Multi-head latent attention (MLA): keys and values are projections of one small latent.

DeepSeek-V2 (DeepSeek-AI 2024), section 2.1. A token's latent of C features and its rotary key of R
features, which all heads share, determine the keys and values of all heads:

    latent = rms_norm(W_DKV x)               shared key = rotate(W_KR x)
    key of head h = [W_UK_h latent, shared key]        value of head h = W_UV_h latent
    query of head h = [nope, rotate(rope)]

Training expands the latents to keys and values, so that fused attention kernels apply. Decoding
with a cache of latents and shared keys does not expand them where that is more arithmetic. With

    nope . (W_UK_h latent) = (W_UK_h^T nope) . latent

queries are projected to the space of latents instead of all cached latents to that of keys, and
W_UV_h projects the weighted sum of latents instead of each of them ("absorbed"). W_UK and W_UV
are views of the weight of `kv_b_proj`: no product of weights is computed or stored, so that none
can be older than the weights.

Shape suffixes: B batch, S new tokens, L tokens in the cache, the new ones included, D hidden, H
heads, C latent, N features of a key without positions, R rotary features, K = N + R, V value
dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.attention import AttentionConfig
from megatron.config.model import ModelConfig
from megatron.config.rotary import RotaryConfig
from megatron.model.attend import ScoreOptions, attend
from megatron.model.attention_context import AttentionContext
from megatron.model.document_attention import document_attention
from megatron.model.rotary_scaling import latent_score_factor

LATENT_NORM_EPSILON = 1e-6
"""Epsilon of the norms of latents: DeepSeek's models have this one, whatever that of their other
norms is"""


class LatentAttention(nn.Module):
    """Causal attention over keys and values that are expanded from latents."""

    def __init__(
        self,
        config: ModelConfig,
        options: AttentionConfig,
        rotary: RotaryConfig | None = None,
    ):
        super().__init__()
        heads = config.num_attention_heads
        self.num_heads = heads
        self.latent_size = options.kv_lora_rank
        self.nope_size = options.qk_nope_head_dim
        self.rope_size = options.qk_rope_head_dim
        self.value_size = options.v_head_dim
        self.dropout = config.attention_dropout
        self.scale = (self.nope_size + self.rope_size) ** -0.5
        if rotary is not None and config.position_embedding_type == "rope":
            self.scale *= latent_score_factor(rotary)
        hidden = config.hidden_size
        query_size = heads * (self.nope_size + self.rope_size)
        bias = options.add_qkv_bias
        if options.q_lora_rank:
            self.q_a_proj = nn.Linear(hidden, options.q_lora_rank, bias)
            self.q_a_layernorm = nn.RMSNorm(options.q_lora_rank, eps=LATENT_NORM_EPSILON)
            self.q_b_proj = nn.Linear(options.q_lora_rank, query_size, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent_size + self.rope_size, bias)
        self.kv_a_layernorm = nn.RMSNorm(self.latent_size, eps=LATENT_NORM_EPSILON)
        self.kv_b_proj = LatentExpansion(
            self.latent_size, heads, self.nope_size, self.value_size
        )
        self.o_proj = nn.Linear(heads * self.value_size, hidden, options.attention_output_bias)

    def forward(self, x_BSD: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Attend to earlier tokens.

        Args:
            x_BSD: normalised hidden states.
            context: positions, documents and cached latents; None: plain causal attention
                without rotary positions.
        Returns:
            [B, S, D].
        """
        context = context or AttentionContext()
        nope_BHSN, rope_BHSR = self._queries(x_BSD, context)
        latent_B1LC, shared_B1LR = self._latents(x_BSD, context)
        mask_B1SL = None
        if context.cache is not None:
            latent_B1LC, shared_B1LR = context.cache.update(latent_B1LC, shared_B1LR)
            mask_B1SL = context.visible.mask(latent_B1LC.shape[2])
        if mask_B1SL is not None and self.absorbs(x_BSD.shape[1], latent_B1LC.shape[2]):
            y_BHSV = self._attend_to_latents(
                nope_BHSN, rope_BHSR, latent_B1LC, shared_B1LR, mask_B1SL
            )
        else:
            q_BHSK = torch.cat((nope_BHSN, rope_BHSR), -1)
            k_BHLK, v_BHLV = self._expand(latent_B1LC, shared_B1LR)
            y_BHSV = self._attend(q_BHSK, k_BHLK, v_BHLV, context, mask_B1SL)
        return self.o_proj(y_BHSV.transpose(1, 2).flatten(2))

    def absorbs(self, num_new: int, num_keys: int) -> bool:
        """Return whether attention to cached latents is less arithmetic than expanding them.

        Counted are a head's multiplications. One new token is always cheaper absorbed; with
        DeepSeek's sizes, as many as 170 are.

        Args:
            num_new: S.
            num_keys: L.
        """
        projection = self.latent_size * (self.nope_size + self.value_size)
        absorbed_width = 2 * self.latent_size + self.rope_size
        expanded_width = self.nope_size + self.rope_size + self.value_size
        absorbed = num_new * (projection + num_keys * absorbed_width)
        expanded = num_keys * (projection + num_new * expanded_width)
        return absorbed < expanded

    def _queries(self, x_BSD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Return the queries' parts without and with positions: [B, H, S, N], [B, H, S, R]."""
        if hasattr(self, "q_proj"):
            q_BSX = self.q_proj(x_BSD)
        else:
            q_BSX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        q_BHSK = q_BSX.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        nope_BHSN, rope_BHSR = q_BHSK.split((self.nope_size, self.rope_size), -1)
        if context.rotation is not None:
            rope_BHSR = context.rotation.apply(rope_BHSR)
        return nope_BHSN, rope_BHSR

    def _latents(self, x_BSD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Return what a cache holds of each token: [B, 1, S, C] and [B, 1, S, R]."""
        both_B1SX = self.kv_a_proj_with_mqa(x_BSD).unsqueeze(1)
        latent_B1SC, shared_B1SR = both_B1SX.split((self.latent_size, self.rope_size), -1)
        if context.rotation is not None:
            shared_B1SR = context.rotation.apply(shared_B1SR)
        return self.kv_a_layernorm(latent_B1SC), shared_B1SR

    def _expand(self, latent_B1LC: Tensor, shared_B1LR: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all heads: [B, H, L, K] and [B, H, L, V]."""
        both_BHLX = self.kv_b_proj(latent_B1LC)
        nope_BHLN, v_BHLV = both_BHLX.split((self.nope_size, self.value_size), -1)
        shared_BHLR = shared_B1LR.expand(-1, self.num_heads, -1, -1)
        return torch.cat((nope_BHLN, shared_BHLR), -1), v_BHLV

    def _attend(
        self,
        q_BHSK: Tensor,
        k_BHLK: Tensor,
        v_BHLV: Tensor,
        context: AttentionContext,
        mask_B1SL: Tensor | None,
    ) -> Tensor:
        """Attend to expanded keys and values.

        Flash kernels need heads of one size for keys and values, so the shorter ones are
        padded with zeros; torch otherwise writes all scores to memory. On a CPU the layer,
        forward and backward, took 0.86 (1024 tokens) to 1.07 (256) of the time without padding
        in fp32, and 1.11 to 1.16 in bf16; memory is linear in the length instead of quadratic.
        """
        width = max(q_BHSK.shape[-1], v_BHLV.shape[-1])
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q_BHSK, k_BHLK, v_BHLV))
        options = ScoreOptions(self.dropout if self.training else 0.0, self.scale)
        if context.documents is None:
            y = attend(q, k, v, options, mask_B1SL)
        else:
            y = document_attention(q, k, v, context.documents, options)
        return y[..., : self.value_size]

    def _attend_to_latents(
        self,
        nope_BHSN: Tensor,
        rope_BHSR: Tensor,
        latent_B1LC: Tensor,
        shared_B1LR: Tensor,
        mask_B1SL: Tensor,
    ) -> Tensor:
        """Attend to latents without expanding them: [B, H, S, V].

        The heads are rows of one product with the latents, which are read once for all heads.
        """
        query_BHSC = self.kv_b_proj(nope_BHSN, use="query")
        latent_BLC = latent_B1LC.squeeze(1)
        num_new = query_BHSC.shape[2]
        scores_BXL = query_BHSC.flatten(1, 2) @ latent_BLC.transpose(1, 2)
        scores_BXL = scores_BXL + rope_BHSR.flatten(1, 2) @ shared_B1LR.squeeze(1).mT
        scores_BHSL = scores_BXL.unflatten(1, (-1, num_new)).float() * self.scale
        weights_BHSL = scores_BHSL.masked_fill(~mask_B1SL, -torch.inf).softmax(-1)
        mean_BXC = weights_BHSL.to(latent_BLC.dtype).flatten(1, 2) @ latent_BLC
        return self.kv_b_proj(mean_BXC.unflatten(1, (-1, num_new)), use="value")


class LatentExpansion(nn.Linear):
    """Projection of latents to the keys' parts without positions and the values of all heads.

    All uses call this module instead of reading its weight: ZeRO 3 gathers a sharded weight when
    the module that owns it is called.

    Args:
        latent_size: C.
        heads: H.
        nope_size: N.
        value_size: V.
    """

    def __init__(self, latent_size: int, heads: int, nope_size: int, value_size: int):
        super().__init__(latent_size, heads * (nope_size + value_size), bias=False)
        self.num_heads = heads
        self.sizes = (nope_size, value_size)

    def forward(self, x: Tensor, use: str = "expand") -> Tensor:
        """Apply the weight of keys, that of values, or both.

        Args:
            x: latents [B, 1, L, C] to "expand"; parts of queries without positions
                [B, H, S, N] for "query"; weighted sums of latents [B, H, S, C] for "value".
            use: "expand", "query" or "value".
        Returns:
            Keys' parts and values [B, H, L, N + V]; queries of latents [B, H, S, C]; or the
            outputs of heads [B, H, S, V].
        """
        if use == "expand":
            x_BLX = super().forward(x.squeeze(1))
            return x_BLX.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        weight_HXC = self.weight.unflatten(0, (self.num_heads, -1))
        key_HNC, value_HVC = weight_HXC.split(self.sizes, 1)
        if use == "query":
            return x @ key_HNC
        return x @ value_HVC.mT
