"""Several datasets as one, in given proportions, and the three splits of a run."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from megatron.config.schema import require
from megatron.data.sampling.index_cache import Arrays, cached_arrays
from megatron.data.sampling.sample_index import smallest_int


class Samples(Protocol):
    """What a loader reads: `SampleIndex`, `Cycle`, `StreamSamples` and `Blend`."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> np.ndarray:
        """int64 [S + 1]"""

    def source(self, i: int) -> str:
        """Prefix of the dataset that sample i comes from."""


def parse_blend(
    words: Sequence[str], flag: str = "--data-path"
) -> list[tuple[float | None, str]]:
    """`w1 p1 w2 p2 ...` or `p1 p2 ...` -> [(weight, prefix)]; the weight is None (by size) when none is given.

    Raises:
        ValueError: weights and prefixes do not alternate, or a weight is not a positive number.
    """
    words = list(words)
    numbers = [_number(word) for word in words]
    if all(n is None for n in numbers):
        return [(None, word) for word in words]
    paired = (
        len(words) % 2 == 0
        and None not in numbers[::2]
        and not any(n is not None for n in numbers[1::2])
    )
    require(
        paired,
        flag,
        " ".join(words),
        "weight prefix weight prefix ..., or prefixes alone",
        "A prefix that is itself a number is written as ./7",
    )
    for weight in numbers[::2]:
        require(0 < weight < math.inf, f"a weight of {flag}", weight, "a positive number")
    return list(zip(numbers[::2], words[1::2]))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


class Blend:
    """Samples of several datasets, interleaved so that none is ever ahead or behind by a sample.

    Among the first t samples, dataset k has more than w_k * t - 1 and fewer than w_k * t + 1, w_k being its share. Each
    dataset's samples come in their own order.

    Args:
        datasets: what to draw from; dataset k must have `quotas(weights, num_samples)[k]` samples, or as many as fall
            to it.
        weights: positive numbers, in any unit.
        num_samples: samples of the blend.
        seed: decides which dataset goes first when several are due.
        cache_dir: folder of the cached index; empty: none.

    Raises:
        ValueError: a dataset has too few samples.
    """

    def __init__(
        self,
        datasets: Sequence[Samples],
        weights: Sequence[float],
        num_samples: int,
        seed: int,
        cache_dir: str = "",
    ):
        require(
            len(weights) == len(datasets) > 0 and all(0 < w < math.inf for w in weights),
            "weights of a blend",
            list(weights),
            "one positive number per dataset",
        )
        self.datasets = list(datasets)
        self._arguments = (self.datasets, weights, num_samples, seed, cache_dir)
        units = _whole(weights)
        key = {"units": units, "num_samples": num_samples, "seed": seed}
        arrays = cached_arrays(
            cache_dir, "blend", key, lambda: build_blend(units, num_samples, seed)
        )
        self._choice, self._position = arrays["choice"], arrays["position"]
        for k, (dataset, needed) in enumerate(zip(self.datasets, arrays["counts"])):
            if len(dataset) < needed:
                raise ValueError(
                    f"dataset {k} of the blend has {len(dataset)} samples; its weight {weights[k]} takes "
                    f"{needed} of {num_samples}. Build it with that many"
                )

    def __len__(self) -> int:
        return len(self._choice)

    def __getitem__(self, i: int) -> np.ndarray:
        """int64 [S + 1]: sample i. IndexError beyond the end."""
        dataset, position = self._locate(i)
        return dataset[position]

    def __reduce__(self) -> tuple:
        return (
            Blend,
            self._arguments,
        )  # a worker process maps the cache again instead of receiving it

    def source(self, i: int) -> str:
        """Prefix of the dataset that sample i comes from, for messages."""
        dataset, position = self._locate(i)
        return dataset.source(position)

    def _locate(self, i: int) -> tuple[Samples, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a blend: allowed 0 to {len(self) - 1}")
        return self.datasets[self._choice[i]], int(self._position[i])


def build_blend(units: Sequence[int], num_samples: int, seed: int) -> Arrays:
    """The arrays behind a Blend: choice [N] (dataset of each sample), position [N] (its number there), counts [K]."""
    choice = interleave(
        units, num_samples, np.random.RandomState(seed % 2**32).permutation(len(units)).tolist()
    )
    position = np.empty(num_samples, smallest_int(num_samples))
    counts = np.bincount(choice, minlength=len(units))
    for k, count in enumerate(counts):
        position[choice == k] = np.arange(count)
    return {"choice": choice, "position": position, "counts": counts.astype(np.int64)}


def interleave(units: Sequence[int], num_samples: int, rank: Sequence[int]) -> np.ndarray:
    """uint16 [N]: which dataset each sample comes from.

    The j-th sample of a dataset with share w is due between floor((j - 1) / w) and ceil(j / w): keeping all of these
    windows is what keeps every count within 1 of w * t. Taking, among the samples whose window is open, the one that
    closes first keeps them all whenever that is possible at all (unit jobs with release times and deadlines on one
    machine), and shares that add up to 1 make it possible. Each step depends on the one before, so this is a loop and
    not array code (sorting by deadline alone, or taking the largest deficit, drifts further than 1 with several
    datasets); it takes 0.7 s for a million samples, once per node.

    Args:
        units: positive whole numbers proportional to the shares; whole, so that no rounding adds up.
        rank: breaks ties between equal deadlines.
    """
    total = sum(units)
    choice, counts = np.empty(num_samples, np.uint16), [0] * len(units)
    opening: list[tuple] = []  # heap of (time at which the window opens, entry of `due`)
    due = [
        (-(-total // unit), rank[k], k) for k, unit in enumerate(units)
    ]  # heap of (time it closes, tie, dataset)
    heapq.heapify(due)
    for t in range(num_samples):
        while opening and opening[0][0] <= t:
            heapq.heappush(due, heapq.heappop(opening)[1])
        k = heapq.heappop(due)[2]
        choice[t] = k
        counts[k] = j = counts[k] + 1
        heapq.heappush(
            opening, (j * total // units[k], (-(-(j + 1) * total // units[k]), rank[k], k))
        )
    return choice


def quotas(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples that suffice from each dataset for a blend: its share, rounded up."""
    units = _whole(weights)
    return [-(-num_samples * unit // sum(units)) for unit in units]


def _whole(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers exactly proportional to the weights."""
    exact = [Fraction(weight) for weight in weights]
    scale = math.lcm(*(f.denominator for f in exact))
    whole = [int(f * scale) for f in exact]
    return [n // math.gcd(*whole) for n in whole]
