"""Cache of attention states for generation: keys and values, or the latents of latent attention.

Rows are padded on the right: the state of a row's token is at its position, and a padded slot is
overwritten by the row's next token before any token looks at it. Layers with a sliding window keep
the states of all tokens, too.

Shape suffixes: B rows, S new tokens, L tokens in the cache, G heads, K features.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SPARE_SLOTS = 128
"""Free slots after the first tokens of a cache; later the number of slots doubles"""


class KVCache:
    """An `AttentionCache` of rows that begin at slot 0.

    Args:
        num_layers: number of attention layers.
        rows: B, number of rows.
        max_slots: largest number of tokens of a row.
    """

    slot_BS: Tensor
    is_key_BL: Tensor | None = None

    def __init__(
        self, num_layers: int, rows: int, max_slots: int, device: torch.device | None = None
    ):
        self.max_slots = max_slots
        self.device = device
        self.lengths = [0] * rows
        """Number of tokens of each row, without padding"""
        self.used_slots = 0
        """L, slots that hold a state after the forward pass that is announced"""
        self.common_start: int | None = 0
        """First slot of the new tokens if it is the same in all rows"""
        self._layers = [_LayerStates(self) for _ in range(num_layers)]

    def announce(self, lengths: list[int]) -> None:
        """Make room for the new tokens of the next forward pass, padded to the longest.

        Args:
            lengths: number of new tokens of each row.
        """
        width = max(lengths)
        start_B1 = torch.tensor(self.lengths, device=self.device)[:, None]
        self.slot_BS = start_B1 + torch.arange(width, device=self.device)
        self.common_start = self.lengths[0] if len(set(self.lengths)) == 1 else None
        self.used_slots = max(self.lengths) + width
        assert self.used_slots <= self.max_slots, "the cache has fewer slots than tokens"
        self.lengths = [old + new for old, new in zip(self.lengths, lengths, strict=True)]

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows but these, in this order."""
        if rows == list(range(len(self.lengths))):
            return
        self.lengths = [self.lengths[i] for i in rows]
        index_B = torch.tensor(rows, device=self.device)
        for layer in self._layers:
            layer.states = [state.index_select(0, index_B) for state in layer.states]

    def layer(self, index: int) -> _LayerStates:
        """Return the cache of the attention layer in block `index`."""
        return self._layers[index]


class _LayerStates:
    """States of one attention layer; two tensors [B, G, slots, K]."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.states: list[Tensor] = []

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Store the states of the announced tokens; return those of all tokens so far."""
        cache = self.cache
        if not self.states:
            slots = min(cache.max_slots, cache.used_slots + _SPARE_SLOTS)
            self.states = [_with_slots(new[:, :, :0], slots) for new in (first, second)]
        if self.states[0].shape[2] < cache.used_slots:
            slots = min(cache.max_slots, 2 * cache.used_slots)
            self.states = [_with_slots(old, slots) for old in self.states]
        for state, new in zip(self.states, (first, second), strict=True):
            if cache.common_start is None:
                index_BGSK = cache.slot_BS[:, None, :, None].expand_as(new)
                state.scatter_(2, index_BGSK, new)
            else:
                state[:, :, cache.common_start : cache.used_slots] = new
        first_BGLK, second_BGLK = (state[:, :, : cache.used_slots] for state in self.states)
        return first_BGLK, second_BGLK


def _with_slots(state: Tensor, slots: int) -> Tensor:
    """Copy states into a tensor with more slots, which are 0: a mask may read what is free."""
    rows, heads, used, features = state.shape
    grown = state.new_zeros(rows, heads, slots, features)
    grown[:, :, :used] = state
    return grown
