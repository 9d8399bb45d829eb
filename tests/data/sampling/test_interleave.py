"""The order of a blend against a heap over all windows, value by value."""

from __future__ import annotations

import hashlib
import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.sampling import blend, interleave
from megatron.data.sampling.blend import build_blend


def reference(units: list[int], num_samples: int, tie_ranks: list[int]) -> list[int]:
    """Take, of the samples whose window is open, the one whose window closes first."""
    total = sum(units)
    choice = []
    counts = [0] * len(units)
    upcoming = []
    due = [(-(-total // unit), tie_ranks[k], k) for k, unit in enumerate(units)]
    heapq.heapify(due)
    for t in range(num_samples):
        while upcoming and upcoming[0][0] <= t:
            heapq.heappush(due, heapq.heappop(upcoming)[1])
        k = heapq.heappop(due)[2]
        choice.append(k)
        counts[k] += 1
        opens = counts[k] * total // units[k]
        closes = -(-(counts[k] + 1) * total // units[k])
        heapq.heappush(upcoming, (opens, (closes, tie_ranks[k], k)))
    return choice


def assert_equals_reference(units: list[int], num_samples: int, seed: int = 1) -> None:
    tie_ranks = np.random.RandomState(seed).permutation(len(units)).tolist()
    choice = interleave.interleave(units, num_samples, tie_ranks)
    assert choice.dtype == np.uint16
    assert choice.tolist() == reference(units, num_samples, tie_ranks)


@pytest.fixture
def repairs(monkeypatch) -> list[bool]:
    """Record the result of every repair of a lane."""
    results = []
    repair = interleave._Lanes._repair

    def recorded(*arguments):
        results.append(repair(*arguments))
        return results[-1]

    monkeypatch.setattr(interleave._Lanes, "_repair", recorded)
    return results


@pytest.mark.parametrize(("lanes", "steps"), [(1, 1), (2, 3), (5, 7), (16, 2), (64, 40)])
@settings(max_examples=40, deadline=None)
@given(
    units=st.lists(
        st.integers(1, 5) | st.integers(1, 10**6) | st.just(2**40), min_size=1, max_size=12
    ),
    num_samples=st.integers(0, 700),
    seed=st.integers(0, 99),
)
def test_lanes_equal_the_heap(lanes, steps, units, num_samples, seed):
    """For any size of the lanes, with shares that are equal, tiny or almost everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleave, "_MAX_LANES", lanes)
        patch.setattr(interleave, "_LANE_STEPS", steps)
        assert_equals_reference(units, num_samples, seed)


@pytest.mark.parametrize(
    "units",
    [
        [1],
        [1] * 9,
        [3, 1],
        [7, 3, 3, 1],
        [10**12, 1],
        [1, 10**9, 10**6, 10**3],
        [2**54 - 1, 2**53 + 5, 7],
        [2**70, 3**40, 5],
        [2**61, 2**60, 1],
    ],
)
def test_special_shares_equal_the_heap(units):
    """Full lanes with shares that divide evenly, that are extreme, or beyond 64 bits."""
    assert_equals_reference(units, 20_000)


def test_many_datasets_equal_the_heap():
    random = np.random.RandomState(3)
    for size in (interleave._MAX_LANE_DATASETS, interleave._MAX_LANE_DATASETS + 1, 700):
        assert_equals_reference(random.randint(1, 10**9, size).tolist(), 3000)


def test_wrong_guesses_are_repaired(monkeypatch, repairs):
    """Lanes shorter than it takes two orders to meet, and lanes in which they meet."""
    monkeypatch.setattr(interleave, "_MAX_LANES", 50)
    monkeypatch.setattr(interleave, "_LANE_STEPS", 4)
    units = [int(10**6 / (rank + 1)) for rank in range(30)]
    assert_equals_reference(units, 5000)
    assert True in repairs and False in repairs


def test_few_samples_are_repaired(monkeypatch):
    """Repairs are one by one; they must stay the exception for lanes to be worth it."""
    repaired = []
    choose = interleave._choose_one_by_one

    def counted(*arguments):
        for dataset in choose(*arguments):
            repaired.append(dataset)
            yield dataset

    monkeypatch.setattr(interleave, "_choose_one_by_one", counted)
    random = np.random.RandomState(5)
    for size in (2, 16, 100):
        units = np.exp(random.normal(20, 1.5, size)).astype(int).tolist()
        repaired.clear()
        interleave.interleave(units, 200_000, list(range(size)))
        assert len(repaired) < 20_000


def test_large_numbers_are_left_to_python(monkeypatch):
    """Lanes are int64: what does not fit must not reach them."""

    def fail(*arguments):
        raise AssertionError("lanes are used")

    monkeypatch.setattr(interleave, "_Lanes", fail)
    for units in ([2**61, 5], [2**40, 1, 1], [1] * 2000):
        num_samples = 2**25 if units[0] == 2**40 else 10
        assert interleave._fits_in_lanes(units, num_samples) == (units[0] < 2**61)
    assert_equals_reference([2**61, 5], 9000)
    assert not interleave._fits_in_lanes([1, 2**59], 10)
    with pytest.raises(AssertionError, match="lanes are used"):
        assert_equals_reference([2**40, 1, 1], 9000)


def test_order_is_pinned():
    """A resumed run continues in this order."""
    arrays = build_blend([7, 5, 11, 1], 50_000, 1234)
    digests = {
        name: hashlib.sha256(arrays[name].astype("<i8").tobytes()).hexdigest()[:16]
        for name in ("choice", "position")
    }
    assert digests == {"choice": "e5bccd305cb69902", "position": "1daed1f937bc96ab"}
    assert arrays["choice"][:12].tolist() == [2, 0, 1, 2, 0, 2, 2, 1, 0, 2, 0, 2]


@pytest.mark.parametrize("block", [1, 7, 1000, 1 << 20])
def test_positions_count_each_dataset(monkeypatch, block):
    monkeypatch.setattr(blend, "_BLOCK_SAMPLES", block)
    arrays = build_blend([5, 3, 2**20, 9], 3000, 7)
    counts = [0] * 4
    for choice, position in zip(arrays["choice"].tolist(), arrays["position"].tolist()):
        assert position == counts[choice]
        counts[choice] += 1
    assert arrays["counts"].tolist() == counts and arrays["position"].dtype == np.int32
