"""Blend of several datasets in given proportions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from megatron.config.fields import require
from megatron.data.sampling.index_cache import Arrays, cached_arrays
from megatron.data.sampling.interleave import interleave
from megatron.data.sampling.sample_index import smallest_int

_MAX_DATASETS = 1 << 16  # their numbers are stored as uint16
_BLOCK_SAMPLES = 1 << 20  # samples numbered at a time: 40 bytes each for a moment
_LONGEST_SHOWN_BLEND = 200  # characters, in a message


class Samples(Protocol):
    """Samples that a loader reads: `SampleIndex`, `RepeatedEpochs`, `StreamSamples` or `Blend`."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, i: int) -> np.ndarray:
        """Return sample i, int64 [S + 1]."""

    def source(self, i: int) -> str:
        """Return the prefix of the dataset that sample i comes from, for messages."""


def parse_blend(
    words: Sequence[str], flag: str = "--data-path"
) -> list[tuple[float | None, str]]:
    """Parse `weight prefix weight prefix ...` or `prefix prefix ...`.

    Args:
        flag: flag that `words` come from, for messages.

    Returns:
        (weight, prefix) of each dataset; the weight is None, which stands for the size of the
        dataset, if no weights are given.

    Raises:
        ValueError: weights and prefixes do not alternate, or a weight is not a positive number.
    """
    words = list(words)
    numbers = [_parse_number(word) for word in words]
    if all(number is None for number in numbers):
        return [(None, word) for word in words]
    weights = numbers[::2]
    misplaced = _first_misplaced(numbers)
    if misplaced is not None:
        shown = textwrap.shorten(" ".join(words), _LONGEST_SHOWN_BLEND, placeholder=" ...")
        raise ValueError(
            f"{flag} is {shown!r}; allowed: weight prefix weight prefix ..., or prefixes alone. "
            f"Word {misplaced + 1} is {words[misplaced]!r}. A prefix that is itself a number is "
            "written as ./7"
        )
    for weight in weights:
        require(0 < weight < math.inf, f"a weight of {flag}", weight, "a positive number")
    return list(zip(weights, words[1::2]))


def _first_misplaced(numbers: Sequence[float | None]) -> int | None:
    """Return the index of the first word that breaks the order of weights and prefixes."""
    for i, number in enumerate(numbers):
        is_weight = number is not None
        if is_weight != (i % 2 == 0):
            return i
    if len(numbers) % 2:
        return len(numbers) - 1  # a weight without a prefix
    return None


def _parse_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


class Blend:
    """Interleaved samples of several datasets whose proportions hold at every point.

    Among the first t samples, dataset k has more than w_k * t - 1 and fewer than w_k * t + 1,
    where w_k is its share. The samples of a dataset come in their own order.

    Args:
        datasets: the datasets; dataset k needs as many samples as fall to it, for which
            `quotas(weights, num_samples)[k]` suffice.
        weights: positive numbers in any unit.
        num_samples: number of samples of the blend.
        seed: decides which dataset comes first when several are due.
        cache_dir: folder of the cached index; empty: no cache.

    Raises:
        ValueError: a weight is not positive, or a dataset has too few samples.
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
        require(
            len(datasets) <= _MAX_DATASETS,
            "number of datasets of a blend",
            len(datasets),
            f"up to {_MAX_DATASETS}",
            "Merge some with tools/merge_datasets.py",
        )
        self.datasets = list(datasets)
        self._arguments = (self.datasets, weights, num_samples, seed, cache_dir)
        units = _integer_weights(weights)
        arrays = cached_arrays(
            cache_dir,
            "blend",
            {"units": units, "num_samples": num_samples, "seed": seed},
            lambda: build_blend(units, num_samples, seed),
        )
        self._choice = arrays["choice"]
        self._position = arrays["position"]
        for k, (dataset, needed) in enumerate(zip(self.datasets, arrays["counts"])):
            if len(dataset) < needed:
                raise ValueError(
                    f"dataset {k} of the blend has {len(dataset)} samples; its weight "
                    f"{weights[k]} takes {needed} of {num_samples}. Build it with that many"
                )

    def __len__(self) -> int:
        return len(self._choice)

    def __getitem__(self, i: int) -> np.ndarray:
        """Return sample i, int64 [S + 1]. Raises IndexError beyond the end."""
        dataset, position = self._locate(i)
        return dataset[position]

    def __reduce__(self) -> tuple:
        # A worker process maps the cache again instead of receiving the arrays.
        return (Blend, self._arguments)

    def source(self, i: int) -> str:
        """Return the prefix of the dataset that sample i comes from, for messages."""
        dataset, position = self._locate(i)
        return dataset.source(position)

    def _locate(self, i: int) -> tuple[Samples, int]:
        """Return (dataset, number within the dataset) of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a blend: allowed 0 to {len(self) - 1}")
        return self.datasets[self._choice[i]], int(self._position[i])


def build_blend(units: Sequence[int], num_samples: int, seed: int) -> Arrays:
    """Build the arrays of a `Blend` of K datasets and N samples.

    Returns:
        choice: uint16 [N], dataset of each sample; position: [N], number of the sample within
        its dataset; counts: int64 [K], samples taken from each dataset.
    """
    tie_ranks = np.random.RandomState(seed % 2**32).permutation(len(units)).tolist()
    choice = interleave(units, num_samples, tie_ranks)
    counts = np.bincount(choice, minlength=len(units)).astype(np.int64)
    return {"choice": choice, "position": _positions(choice, counts), "counts": counts}


def _positions(choice: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Number the samples of each dataset in their order, in one pass for all datasets.

    Args:
        choice: [N], dataset of each sample.
        counts: [K], samples of each dataset.
    """
    position = np.empty(len(choice), smallest_int(len(choice)))
    given = np.zeros(len(counts), np.int64)
    for at in range(0, len(choice), _BLOCK_SAMPLES):
        block = choice[at : at + _BLOCK_SAMPLES]
        by_dataset = np.argsort(block, kind="stable")
        counts_in_block = np.bincount(block, minlength=len(counts))
        first_entry = np.cumsum(counts_in_block) - counts_in_block
        numbers = np.arange(len(block)) + np.repeat(given - first_entry, counts_in_block)
        position[at : at + len(block)][by_dataset] = numbers
        given += counts_in_block
    return position


def quotas(weights: Sequence[float], num_samples: int) -> list[int]:
    """Return the number of samples that suffices from each dataset: its share, rounded up."""
    units = _integer_weights(weights)
    total = sum(units)
    return [_ceil_div(num_samples * unit, total) for unit in units]


def _integer_weights(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers exactly proportional to the weights."""
    fractions = [Fraction(weight) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*integers)
    return [integer // divisor for integer in integers]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
