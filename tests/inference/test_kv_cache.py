"""The cache of attention states: slots, growth, dropped rows, against the simplest cache."""

from __future__ import annotations

import pytest
import torch

from helpers.list_cache import ListCache
from megatron.inference.kv_cache import KVCache

LENGTHS = [[3, 1, 5], [1, 1, 1], [1, 1, 1], [2, 4, 1], [150, 3, 2], [1, 1, 1]]
"""New tokens of the rows in each forward pass"""


def new_states(lengths: list[int], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    return torch.randn(rows, 2, width, 4), torch.randn(rows, 2, width, 3)


@pytest.mark.parametrize("equal", [False, True])
def test_states_are_those_of_simplest_cache(equal):
    """Rows of different and of equal lengths, past the slots that the cache begins with."""
    torch.manual_seed(0)
    cache = KVCache(2, 3, max_slots=400)
    reference = ListCache(2, 3)
    for lengths in LENGTHS:
        if equal:
            lengths = [max(lengths)] * 3
        cache.announce(lengths)
        reference.add(lengths)
        assert torch.equal(cache.slot_BS, reference.slot_BS)
        for index in range(2):
            states = new_states(lengths, 3)
            actual = cache.layer(index).update(*states)
            expected = reference.layer(index).update(*states)
            for row, length in enumerate(cache.lengths):
                for a, b in zip(actual, expected, strict=True):
                    assert torch.equal(a[row, :, :length], b[row, :, :length])
    assert cache.lengths == reference.lengths_B.tolist()


def test_memory_grows_in_blocks_up_to_limit():
    cache = KVCache(1, 1, max_slots=300)
    layer = cache.layer(0)
    sizes = []
    for _ in range(300):
        cache.announce([1])
        first, second = layer.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 2))
        assert first.shape[2] == second.shape[2] == cache.used_slots
        sizes.append(layer.states[0].shape[2])
    assert sorted(set(sizes)) == [129, 260, 300]
    with pytest.raises(AssertionError, match="fewer slots than tokens"):
        cache.announce([1])


def test_rows_are_dropped():
    cache = KVCache(1, 3, max_slots=8)
    cache.announce([2, 3, 1])
    first, second = cache.layer(0).update(*new_states([2, 3, 1], 3))
    cache.keep_rows([0, 1, 2])
    cache.keep_rows([0, 2])
    assert cache.lengths == [2, 1]
    cache.announce([1, 1])
    assert cache.slot_BS.tolist() == [[2], [1]] and cache.used_slots == 3
    first_new, second_new = new_states([1], 2)
    first_all, second_all = cache.layer(0).update(first_new, second_new)
    assert torch.equal(first_all[0, :, :2], first[0, :, :2])
    assert torch.equal(second_all[1, :, :1], second[2, :, :1])
    assert torch.equal(first_all[1, :, 1], first_new[1, :, 0])
