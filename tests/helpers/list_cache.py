"""The simplest cache of attention states: tensors that grow by concatenation."""

from __future__ import annotations

import torch
from torch import Tensor


class ListCache:
    """An `AttentionCache` of rows padded on the right, whose padding is overwritten.

    Args:
        lengths: number of real tokens of each row that are in the cache.
    """

    is_key_BL: Tensor | None = None
    slot_BS: Tensor

    def __init__(self, num_layers: int, rows: int):
        self.layers = [_Layer(self) for _ in range(num_layers)]
        self.lengths_B = torch.zeros(rows, dtype=torch.int64)

    def add(self, lengths: list[int]) -> None:
        """Announce new tokens, before a forward pass with the longest of these lengths."""
        self.slot_BS = self.lengths_B[:, None] + torch.arange(max(lengths))
        self.lengths_B = self.lengths_B + torch.tensor(lengths)

    def layer(self, index: int) -> _Layer:
        return self.layers[index]


class _Layer:
    def __init__(self, cache: ListCache):
        self.cache = cache
        self.states: list[Tensor] | None = None

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        states = []
        slot_BS = self.cache.slot_BS
        needed = int(slot_BS.max()) + 1
        for i, new in enumerate((first, second)):
            rows, heads, _, features = new.shape
            grown = new.new_zeros(rows, heads, needed, features)
            if self.states is not None:
                old = self.states[i]
                grown[:, :, : old.shape[2]] = old
            index = slot_BS[:, None, :, None].expand_as(new)
            states.append(grown.scatter(2, index, new))
        self.states = states
        return states[0], states[1]
