"""One pre-norm transformer block around any feed-forward layer.

Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.config.attention import AttentionConfig
from megatron.config.model import ModelConfig
from megatron.config.rotary import RotaryConfig
from megatron.model.attention import Attention
from megatron.model.attention_context import AttentionCache, AttentionContext, VisibleKeys
from megatron.model.mla import LatentAttention
from megatron.model.norm import build_norm
from megatron.moe.ffn import FFNContext, FFNOutput


class Block(nn.Module):
    """h += dropout(attention(norm(h))); h += dropout(ffn(norm(h))).

    Args:
        config: shape of the model.
        ffn: dense or MoE layer, `(x_BSD, FFNContext) -> FFNOutput`.
        attention: options of the attention layer; None: the defaults.
        rotary: options of rotary positions; None: the defaults.
        layer: index of the block, which options of attention may depend on.
    """

    def __init__(
        self,
        config: ModelConfig,
        ffn: nn.Module,
        attention: AttentionConfig | None = None,
        rotary: RotaryConfig | None = None,
        layer: int = 0,
    ):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = build_norm(config)
        self.self_attn = _build_attention(config, attention, rotary, layer)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = ffn

    def forward(
        self,
        h_BSD: Tensor,
        attention: AttentionContext | None = None,
        context: FFNContext | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the block.

        Args:
            h_BSD: residual stream.
            attention: passed to the attention layer.
            context: passed to the feed-forward layer.
        Returns:
            The new residual stream [B, S, D], and the feed-forward layer's auxiliary loss and
            carry. They are plain tensors in a tuple so that a pipeline stage can send them.
        """
        attended_BSD = self.self_attn(self.input_layernorm(h_BSD), attention)
        h_BSD = h_BSD + F.dropout(attended_BSD, self.dropout, self.training)
        normed_BSD = self.post_attention_layernorm(h_BSD)
        out: FFNOutput = self.mlp(normed_BSD, context or FFNContext())
        h_BSD = h_BSD + F.dropout(out.y, self.dropout, self.training)
        return h_BSD, out.aux_loss, out.carry

    @property
    def carry_key(self) -> Hashable | None:
        """Key of the blocks among which carries are passed; None: this block has no carry."""
        return getattr(self.mlp, "carry_key", None)

    def recompute_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return the contexts that `torch.utils.checkpoint` enters for the forward pass and for
        its recomputation.
        """
        if hasattr(self.mlp, "recompute_contexts"):
            return self.mlp.recompute_contexts()
        return nullcontext(), nullcontext()


def run_blocks(
    blocks: Iterable[Block],
    h_BSD: Tensor,
    attention: AttentionContext,
    context: FFNContext,
    cache: AttentionCache | None = None,
    *,
    recompute: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Run the blocks of a model one after the other.

    Args:
        h_BSD: residual stream.
        attention: what all attention layers get, without a cache.
        context: what all feed-forward layers get, without a carry.
        cache: attention states of earlier tokens; None: there are none.
        recompute: store only the inputs of blocks, and run their forward pass again during
            the backward pass.
    Returns:
        The residual stream, and the auxiliary loss of each MoE layer.
    """
    if cache is not None:
        attention = replace(attention, visible=VisibleKeys(cache.slot_BS, cache.is_key_BL))
    carries: dict[Hashable, Tensor | None] = {}
    aux_losses: list[Tensor] = []
    for i, block in enumerate(blocks):
        context = replace(context, carry=carries.get(block.carry_key))
        if cache is not None:
            attention = replace(attention, cache=cache.layer(i))
        h_BSD, aux_loss, carry = _run_block(block, h_BSD, attention, context, recompute)
        if aux_loss is not None:  # an MoE layer
            aux_losses.append(aux_loss)
            carries[block.carry_key] = carry
    return h_BSD, aux_losses


def _run_block(
    block: Block,
    h_BSD: Tensor,
    attention: AttentionContext,
    context: FFNContext,
    recompute: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not recompute or not torch.is_grad_enabled():
        return block(h_BSD, attention, context)
    return checkpoint(
        block,
        h_BSD,
        attention,
        context,
        use_reentrant=False,
        context_fn=block.recompute_contexts,
    )


def _build_attention(
    config: ModelConfig,
    options: AttentionConfig | None,
    rotary: RotaryConfig | None,
    layer: int,
) -> Attention | LatentAttention:
    if options is not None and options.attention == "mla":
        return LatentAttention(config, options, rotary)
    return Attention(config, options, layer)
