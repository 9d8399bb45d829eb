"""Several datasets as one, in given proportions, and the three splits of a run."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron.config.schema import DataConfig, require
from megatron.data.cache import Arrays, cached_arrays
from megatron.data.indexed import IndexedDataset
from megatron.data.samples import Cycle, SampleIndex, parse_split, smallest_int, split_documents
from megatron.data.streaming import Production, StreamSamples, open_streams
from megatron.tokenizer.base import Tokenizer

SPLITS = ("train", "valid", "test")
EOD_DOCUMENTS = 16  # how many documents, spread over a dataset, stand for all


class Samples(Protocol):
    """What a loader reads: `SampleIndex`, `Cycle`, `StreamSamples` and `Blend`."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> np.ndarray:
        """int64 [S + 1]"""

    def source(self, i: int) -> str:
        """Prefix of the dataset that sample i comes from."""


def parse_blend(words: Sequence[str], flag: str = "--data-path") -> list[tuple[float | None, str]]:
    """`w1 p1 w2 p2 ...` or `p1 p2 ...` -> [(weight, prefix)]; the weight is None (by size) when none is given.

    Raises:
        ValueError: weights and prefixes do not alternate, or a weight is not a positive number.
    """
    words = list(words)
    numbers = [_number(word) for word in words]
    if all(n is None for n in numbers):
        return [(None, word) for word in words]
    paired = len(words) % 2 == 0 and None not in numbers[::2] and not any(n is not None for n in numbers[1::2])
    require(paired, flag, " ".join(words), "weight prefix weight prefix ..., or prefixes alone",
            "A prefix that is itself a number is written as ./7")
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

    def __init__(self, datasets: Sequence[Samples], weights: Sequence[float], num_samples: int, seed: int,
                 cache_dir: str = ""):
        require(len(weights) == len(datasets) > 0 and all(0 < w < math.inf for w in weights), "weights of a blend",
                list(weights), "one positive number per dataset")
        self.datasets = list(datasets)
        self._arguments = (self.datasets, weights, num_samples, seed, cache_dir)
        units = _whole(weights)
        key = {"units": units, "num_samples": num_samples, "seed": seed}
        arrays = cached_arrays(cache_dir, "blend", key, lambda: build_blend(units, num_samples, seed))
        self._choice, self._position = arrays["choice"], arrays["position"]
        for k, (dataset, needed) in enumerate(zip(self.datasets, arrays["counts"])):
            if len(dataset) < needed:
                raise ValueError(f"dataset {k} of the blend has {len(dataset)} samples; its weight {weights[k]} takes "
                                 f"{needed} of {num_samples}. Build it with that many")

    def __len__(self) -> int:
        return len(self._choice)

    def __getitem__(self, i: int) -> np.ndarray:
        """int64 [S + 1]: sample i. IndexError beyond the end."""
        dataset, position = self._locate(i)
        return dataset[position]

    def __reduce__(self) -> tuple:
        return Blend, self._arguments  # a worker process maps the cache again instead of receiving it

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
    choice = interleave(units, num_samples, np.random.RandomState(seed % 2**32).permutation(len(units)).tolist())
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
    due = [(-(-total // unit), rank[k], k) for k, unit in enumerate(units)]  # heap of (time it closes, tie, dataset)
    heapq.heapify(due)
    for t in range(num_samples):
        while opening and opening[0][0] <= t:
            heapq.heappush(due, heapq.heappop(opening)[1])
        k = heapq.heappop(due)[2]
        choice[t] = k
        counts[k] = j = counts[k] + 1
        heapq.heappush(opening, (j * total // units[k], (-(-(j + 1) * total // units[k]), rank[k], k)))
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


def build_splits(data: DataConfig, *, seq_length: int, train_samples: int, valid_samples: int, test_samples: int,
                 seed: int, tokenizer: Tokenizer | None = None, vocab_size: int | None = None,
                 production: Production | None = None) -> dict[str, Samples | None]:
    """The samples of a run: {"train", "valid", "test"} -> that many samples, or None where 0 are asked for.

    A split comes from its own `--<split>-data-path`, or else from its share (`--split`) of the documents of each
    prefix of `--data-path`; that of training may also come from `--streaming-data-path`. With `--dataloader-type
    cyclic`, each training dataset is a `Cycle` of its own one epoch, also in a blend: the weights hold at any point of
    the run, and a small dataset comes round more often.

    Args:
        tokenizer: compared with what the datasets' sidecars record; None: not compared.
        vocab_size: largest vocabulary a sidecar may record; None: not compared.
        production: for `--streaming-data-path`, which also needs the tokenizer.

    Raises:
        FileNotFoundError: a dataset is missing.
        ValueError: a dataset is damaged, made by another tokenizer, or too small; a split has no documents; an option
            needs end-of-document tokens that the data lacks.
    """
    parse_split(data.split)  # a malformed one is an error also when it is not needed
    opened: dict[str, IndexedDataset] = {}
    splits: dict[str, Samples | None] = {}
    for which, samples in zip(SPLITS, (train_samples, valid_samples, test_samples)):
        splits[which] = None
        if samples == 0:
            continue
        if which == "train" and data.streaming_data_path:
            splits[which] = _stream(data, seq_length, samples, seed, tokenizer, production)
            continue
        own = getattr(data, f"{which}_data_path")
        blend = parse_blend(own or data.data_path)
        if not blend:
            advice = f"--{which}-data-path" if data.streaming_data_path else "one of the two"
            raise ValueError(f"--{which}-data-path and --data-path are both empty, and {samples} {which} samples are "
                             f"asked for. Give {advice}" + ("" if which == "train" else ", or --eval-iters 0"))
        for _, prefix in blend:
            if prefix not in opened:
                opened[prefix] = IndexedDataset(prefix)
                check_sidecar(opened[prefix], tokenizer, vocab_size)
                check_eod(opened[prefix], data, tokenizer)
        parts = [(opened[prefix], _documents(opened[prefix], which, "" if own else data.split)) for _, prefix in blend]
        weights = [weight for weight, _ in blend]
        if weights[0] is None:
            weights = [max(1, int(d.document_lengths()[start:stop].sum())) for d, (start, stop) in parts]
        cache = data.data_cache_path or str(Path(blend[0][1]).parent / "index_cache")
        drawn = []
        for part, needed in zip(parts, quotas(weights, samples)):
            needed = max(1, needed)
            if which == "train" and data.dataloader_type == "cyclic":
                drawn.append(Cycle(SampleIndex(*part, seq_length, None, seed, cache_dir=cache), needed, seed))
            else:
                drawn.append(SampleIndex(*part, seq_length, needed, seed, cache_dir=cache))
        splits[which] = drawn[0] if len(drawn) == 1 else Blend(drawn, weights, samples, seed, cache_dir=cache)
    return splits


def _stream(data: DataConfig, seq_length: int, num_samples: int, seed: int, tokenizer: Tokenizer,
            production: Production) -> Samples:
    """The samples of `--streaming-data-path`, whose producers are started if this process is the one to do so."""
    weights, entries = zip(*parse_blend(data.streaming_data_path, "--streaming-data-path"))
    cache, streams = open_streams(data, entries, tokenizer, production)
    if weights[0] is None:
        sizes = [stream.size for stream in streams]
        weights = sizes if all(sizes) else [1] * len(sizes)
    drawn = [StreamSamples(stream, tokenizer.vocab_size, seq_length, max(1, needed), seed,
                           data.streaming_shuffle_samples)
             for stream, needed in zip(streams, quotas(weights, num_samples))]
    if production.starts:
        for samples in drawn:
            samples.start()
    return drawn[0] if len(drawn) == 1 else Blend(drawn, weights, num_samples, seed, cache_dir=cache)


def _documents(dataset: IndexedDataset, which: str, split: str) -> tuple[int, int]:
    """The documents of one split of a dataset; all of them when `split` is empty."""
    if not split:
        return 0, dataset.num_documents
    ranges = split_documents(dataset.num_documents, split)
    start, stop = ranges[SPLITS.index(which)]
    if start == stop:
        counts = ", ".join(f"{b - a} {name}" for name, (a, b) in zip(SPLITS, ranges))
        raise ValueError(f"the {which} split of {dataset.prefix} is empty: --split {split} of {dataset.num_documents} "
                         f"documents ({dataset.num_tokens} tokens) gives {counts} documents. Give it a larger share, "
                         f"or its own --{which}-data-path" + ("" if which == "train" else ", or --eval-iters 0"))
    return start, stop


def check_sidecar(dataset: IndexedDataset, tokenizer: Tokenizer | None, vocab_size: int | None = None) -> None:
    """Compare what a dataset's sidecar records with the run's tokenizer. A missing sidecar or entry is fine.

    Raises:
        ValueError: they contradict each other.
    """
    record = dataset.sidecar or {}
    path = os.fspath(dataset.prefix) + ".json"
    for entry, ours in (("vocab_hash", tokenizer and tokenizer.fingerprint), ("eod", tokenizer and tokenizer.eod)):
        if tokenizer is not None and record.get(entry) not in (None, ours):
            raise ValueError(f"{path} records {entry} {record[entry]} of {record.get('tokenizer')}, this run's "
                             f"{tokenizer.name} has {ours}: the ids mean other tokens. Use the tokenizer of the "
                             f"data, or preprocess the text again with this one")
    recorded = record.get("vocab_size", 0)
    if vocab_size is not None and (not isinstance(recorded, int) or recorded > vocab_size):
        raise ValueError(f"{path} records a vocabulary of {record['vocab_size']} tokens; allowed in this run: "
                         f"{vocab_size}. Use the tokenizer of the data")


def check_eod(dataset: IndexedDataset, data: DataConfig, tokenizer: Tokenizer | None) -> None:
    """Look at the ends of a few documents when an option of `data` needs end-of-document tokens.

    Raises:
        ValueError: a document ends without one, so that the option would silently do nothing there.
    """
    if not data.eod_flags or tokenizer is None:
        return
    filled = np.flatnonzero(dataset.document_lengths())
    for document in filled[:: max(1, len(filled) // EOD_DOCUMENTS)].tolist():
        if (last := int(dataset.read(document)[-1])) != tokenizer.eod:
            raise ValueError(f"{data.eod_flags[0]} is set, but document {document} of {dataset.prefix} ends with token "
                             f"{last}, not with the end-of-document token {tokenizer.eod}; it would have no effect "
                             f"there. Preprocess the text again with --append-eod, or leave the flag out")
