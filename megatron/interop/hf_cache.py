"""A cache of transformers as the cache that our attention layers take.

Shape suffixes: B batch, S new tokens, L tokens in the cache, the new ones included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config.fields import require
from megatron.model.attention_context import LayerCache


@dataclass(frozen=True, eq=False)
class HFLayerCache:
    """One layer of a cache of transformers; without one, the new tokens are all there are."""

    cache: Any
    """a `transformers.Cache`, or None"""
    index: int

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens; see `LayerCache.update`."""
        if self.cache is None:
            return first, second
        return self.cache.update(first, second, self.index)


@dataclass(frozen=True, eq=False)
class HFAttentionCache:
    """A cache of transformers, and the place of the new tokens in it; see `AttentionCache`."""

    cache: Any
    """a `transformers.Cache`, or None: nothing is cached, but padding is masked"""
    slot_BS: Tensor
    is_key_BL: Tensor | None

    def layer(self, index: int) -> LayerCache:
        """Return the cache of the attention layer in block `index`."""
        return HFLayerCache(self.cache, index)


@dataclass(frozen=True, eq=False)
class TokenPlacement:
    """Where new tokens are: their positions, which are padding, and what they look at."""

    padding_BS: Tensor | None
    """bool, True where a new token is padding; None: none is"""
    position_BS: Tensor | None
    """positions by the attention mask; None: 0 .. S - 1"""
    cache: HFAttentionCache | None
    """None: plain causal attention"""


def place_tokens(
    shape: tuple[int, int], device: torch.device, attention_mask: Tensor | None, cache: Any
) -> TokenPlacement:
    """Find out where new tokens are. Synchronises with the device if there is a mask.

    Args:
        shape: (B, S) of the new tokens.
        attention_mask: [B, L], 0 where a token is padding; None: none is.
        cache: a `transformers.Cache` with the earlier tokens, or None.
    Raises:
        ValueError: the mask has another shape.
    """
    batch, length = shape
    past = 0
    if cache is not None:
        past = int(cache.get_seq_length())
    is_key_BL = _keys(attention_mask, batch, past + length)
    if is_key_BL is None and cache is None:
        return TokenPlacement(None, None, None)
    slot_BS = torch.arange(past, past + length, device=device).expand(batch, -1)
    if is_key_BL is None:
        return TokenPlacement(None, slot_BS, HFAttentionCache(cache, slot_BS, None))
    padding_BS = ~is_key_BL[:, past:]
    if not bool(padding_BS.any()):
        padding_BS = None
    elif cache is None and _ends_with_padding(is_key_BL):
        return TokenPlacement(padding_BS, None, None)
    position_BL = (is_key_BL.cumsum(1) - 1).clamp_min(0)
    if cache is not None:
        # A static cache has room for later tokens, which no token looks at.
        num_keys = cache.get_mask_sizes(length, 0)[0]
        is_key_BL = F.pad(is_key_BL, (0, num_keys - past - length), value=True)
    attention_cache = HFAttentionCache(cache, slot_BS, is_key_BL)
    return TokenPlacement(padding_BS, position_BL[:, past:], attention_cache)


def _keys(attention_mask: Tensor | None, batch: int, num_tokens: int) -> Tensor | None:
    """Return the mask as bool [B, L]; None if it hides nothing."""
    if attention_mask is None:
        return None
    require(
        attention_mask.shape == (batch, num_tokens),
        "the shape of attention_mask",
        list(attention_mask.shape),
        f"{[batch, num_tokens]}, a number for each token so far",
    )
    is_key_BL = attention_mask.bool()
    return None if bool(is_key_BL.all()) else is_key_BL


def _ends_with_padding(is_key_BL: Tensor) -> bool:
    """Return whether all padding follows the tokens of its row, where causal attention does
    not look.
    """
    return not bool((is_key_BL[:, 1:] & ~is_key_BL[:, :-1]).any())
