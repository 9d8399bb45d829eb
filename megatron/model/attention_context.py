"""What an attention layer gets in addition to hidden states: positions, documents and cached keys.

Shape suffixes: B batch, S new tokens, L tokens in the cache, the new ones included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron.model.document_attention import DocumentLayout
from megatron.model.rotary import Rotation


class LayerCache(Protocol):
    """Cached states of one attention layer, such as keys and values."""

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens.

        Args:
            first: keys [B, G, S, K]; with latent attention the latents [B, 1, S, C].
            second: values [B, G, S, K]; with latent attention the rotated keys [B, 1, S, R].
        Returns:
            The states of all tokens so far, [B, G, L, K] each, or [B, 1, L, C] and
            [B, 1, L, R]. That of a new token is at its slot, see `AttentionCache`.
        """


class AttentionCache(Protocol):
    """Cached states of all attention layers, and the place of the new tokens in them."""

    slot_BS: Tensor
    """index of each new token's state among the L cached ones, int64. The new tokens of a row
    have increasing slots"""
    is_key_BL: Tensor | None
    """bool, False where a cached state is padding, which no token looks at; None: without
    padding, or with padding only after the tokens that look"""

    def layer(self, index: int) -> LayerCache:
        """Return the cache of the attention layer in block `index`."""


@dataclass(frozen=True, eq=False)
class VisibleKeys:
    """Which of the cached keys a new token looks at. Made once for all layers."""

    slot_BS: Tensor
    """see `AttentionCache`"""
    is_key_BL: Tensor | None = None
    """see `AttentionCache`"""
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, num_keys: int, window: int = 0) -> Tensor | None:
        """Return the mask over the cached keys.

        Args:
            num_keys: L.
            window: number of last keys that a query sees, its own included; 0: all.
        Returns:
            Bool [B, 1, S, L], True where a query looks at a key: at those not after its own,
            in the window, that are not padding, and always at its own. None: causal attention
            in the window, because all keys are new and none is padding.
        """
        if num_keys == self.slot_BS.shape[1] and self.is_key_BL is None:
            return None
        if window not in self._masks:
            self._masks[window] = self._build_mask(num_keys, window)
        return self._masks[window]

    def _build_mask(self, num_keys: int, window: int) -> Tensor:
        key_L = torch.arange(num_keys, device=self.slot_BS.device)
        distance_BSL = self.slot_BS[:, :, None] - key_L
        mask_BSL = distance_BSL >= 0
        if window:
            mask_BSL &= distance_BSL < window
        if self.is_key_BL is not None:
            # A query of padding would see no key, and its softmax would be 0 / 0.
            mask_BSL &= self.is_key_BL[:, None] | (distance_BSL == 0)
        return mask_BSL.unsqueeze(1)


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """What an attention layer gets in addition to hidden states."""

    rotation: Rotation | None = None
    """rotation of queries and keys; None without rotary positions"""
    documents: DocumentLayout | None = None
    """documents of the samples, to which attention is limited; None: plain causal attention"""
    cache: LayerCache | None = None
    """states of earlier tokens in this layer; None: only the tokens of the call attend"""
    visible: VisibleKeys | None = None
    """which cached keys each token looks at; None without a cache"""
