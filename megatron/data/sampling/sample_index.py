"""Samples of S + 1 tokens cut from a stream of shuffled documents.

Shape suffixes: S sequence length, T tokens of one epoch, E epochs, D documents, N samples.

The stream is E epochs of the documents, each epoch in an order of its own. Sample i of it is tokens i*S to i*S+S: it
shares its first token with the one before, because that token was only a label there. The samples are then shuffled:
over all epochs, or, when less than 80 % of the last epoch is needed, first those before it and then those of it
(Megatron's rule), so that the last, partial pass does not take the place of full ones.
"""

from __future__ import annotations

import mmap
from fractions import Fraction

import numpy as np

from megatron.config.schema import require
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.sampling.index_cache import Arrays, cached_arrays, files_key

LAST_EPOCH_APART_BELOW = 0.80
ALGORITHM = 1  # part of the cache key: raise it when the order of samples changes


def parse_split(split: str) -> tuple[Fraction, Fraction, Fraction]:
    """Shares of training, validation and test, adding up to 1: "969,30,1" -> (969/1000, 30/1000, 1/1000).

    Missing shares at the end are 0. Raises ValueError for anything but one to three non-negative numbers.
    """
    try:
        shares = [Fraction(part.strip()) for part in split.split(",")]
    except (ValueError, ZeroDivisionError):
        shares = []
    require(
        1 <= len(shares) <= 3 and min(shares) >= 0 and sum(shares) > 0,
        "--split",
        split,
        "one to three non-negative numbers with commas between them, not all 0",
        "The usual one is 969,30,1",
    )
    train, valid, test = (Fraction(s) / sum(shares) for s in [*shares, 0, 0][:3])
    return train, valid, test


def split_documents(num_documents: int, split: str) -> list[tuple[int, int]]:
    """Three ranges (start, stop) of documents: the shares' running sum, rounded to whole documents."""
    train, valid, _ = parse_split(split)
    bounds = [
        0,
        round(num_documents * train),
        round(num_documents * (train + valid)),
        num_documents,
    ]
    return list(zip(bounds[:-1], bounds[1:]))


class SampleIndex:
    """Samples of a range of documents: `index[i]` is int64 [S + 1].

    Args:
        dataset: the tokens.
        documents: (start, stop), the range to use; None: all.
        seq_length: S, tokens of a sample less one.
        num_samples: how many; as many epochs are taken as that needs. None: what one epoch gives.
        seed: of both shuffles.
        shuffle: False keeps documents and samples in file order.
        cache_dir: folder of the cached index; empty: none.

    Raises:
        ValueError: the range has no documents, or fewer tokens than one sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: tuple[int, int] | None,
        seq_length: int,
        num_samples: int | None,
        seed: int,
        shuffle: bool = True,
        cache_dir: str = "",
    ):
        require(seq_length > 0, "seq_length", seq_length, "a positive integer")
        require(
            num_samples is None or num_samples > 0,
            "num_samples",
            num_samples,
            "a positive integer, or None",
        )
        start, stop = documents = documents or (0, dataset.num_documents)
        require(
            0 <= start <= stop <= dataset.num_documents,
            f"range of documents of {dataset.prefix}",
            documents,
            f"ranges within 0 to {dataset.num_documents}",
        )
        self.dataset, self.seq_length = dataset, seq_length
        self._arguments = (
            dataset,
            documents,
            seq_length,
            num_samples,
            seed,
            shuffle,
            cache_dir,
        )
        key = {
            "algorithm": ALGORITHM,
            "files": files_key(dataset.prefix + ".idx", dataset.prefix + ".bin"),
            "documents": [start, stop],
            "seq_length": seq_length,
            "num_samples": num_samples,
            "seed": seed,
            "shuffle": shuffle,
        }
        arrays = cached_arrays(cache_dir, "samples", key, self._build)
        self._order, self._bounds, self._samples = (
            arrays["order"],
            arrays["bounds"],
            arrays["samples"],
        )
        _expect_random_reads(dataset.tokens)

    def _build(self) -> Arrays:
        dataset, (start, stop), seq_length, num_samples, seed, shuffle, _ = self._arguments
        lengths = dataset.document_lengths()[start:stop]
        tokens = int(lengths.sum())
        if tokens < seq_length + 1:
            raise ValueError(
                f"documents {start} to {stop} of {dataset.prefix} ({dataset.num_documents} documents, "
                f"{dataset.num_tokens} tokens) hold {tokens} tokens; one sample takes {seq_length + 1}. "
                f"Give more data, another --split or a smaller --seq-length"
            )
        return build_order(start, lengths, seq_length, num_samples, seed, shuffle)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> np.ndarray:
        """int64 [S + 1]: sample i. IndexError beyond the end."""
        if not 0 <= i < len(self):
            raise IndexError(
                f"sample {i} of {self.dataset.prefix}: allowed 0 to {len(self) - 1}"
            )
        left, at = self.seq_length + 1, 0
        out = np.empty(left, np.int64)
        position = int(self._samples[i]) * self.seq_length
        p = (
            int(np.searchsorted(self._bounds, position, side="right")) - 1
        )  # the document that holds the first token
        offset = position - int(self._bounds[p])
        while left:
            take = min(left, int(self._bounds[p + 1] - self._bounds[p]) - offset)
            out[at : at + take] = self.dataset.read(int(self._order[p]), offset, take)
            left, at, p, offset = left - take, at + take, p + 1, 0
        return out

    def __reduce__(self) -> tuple:
        return (
            SampleIndex,
            self._arguments,
        )  # a worker process maps the cache again instead of receiving it

    def source(self, i: int) -> str:
        """Prefix of the dataset that sample i comes from, for messages."""
        return self.dataset.prefix


def _expect_random_reads(tokens: np.ndarray) -> None:
    """Tell the kernel that a mapped .bin is not read in order. It would read ahead at every page that is not in memory,
    up to 8 MB on some disks: 3 ms instead of 22 us for a first sample of a 20 GB file of holes, 1.8 times the time of
    10,000 cold ones of a 4 GB file."""
    base = tokens
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_RANDOM)


class RepeatedEpochs:
    """The samples of one epoch again and again, each pass over them in a new order.

    `cycle[i]` is a sample of pass i // n, n being what one epoch gives. The order of a pass depends on the seed and the
    number of the pass alone, so it stays when the run gets longer. It is drawn when the pass is first asked for and
    replaces the one before: 4 bytes per sample in each process that reads, and 6 s for 10^8 samples.

    Args:
        samples: those of one epoch, `SampleIndex(..., num_samples=None)`.
        num_samples: how many the cycle gives.
        seed: of the passes' orders.
    """

    def __init__(self, samples: SampleIndex, num_samples: int, seed: int):
        require(num_samples > 0, "num_samples", num_samples, "a positive integer")
        self._arguments = samples, num_samples, seed
        self._samples, self._size, self._seed = self._arguments
        self._pass, self._order = -1, np.empty(0, np.int32)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> np.ndarray:
        """int64 [S + 1]: sample i. IndexError beyond the end."""
        return self._samples[self._locate(i)]

    def __reduce__(self) -> tuple:
        return (
            RepeatedEpochs,
            self._arguments,
        )  # without the order: a worker process draws it itself

    def source(self, i: int) -> str:
        """Prefix of the dataset that sample i comes from, for messages."""
        return self._samples.source(self._locate(i))

    def _locate(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a cycle: allowed 0 to {len(self) - 1}")
        number, place = divmod(i, len(self._samples))
        if number != self._pass:
            self._order = np.empty(0, np.int32)  # frees the last pass's before the next is made
            self._order = np.arange(len(self._samples), dtype=smallest_int(len(self._samples)))
            np.random.RandomState([self._seed % 2**32, number]).shuffle(self._order)
            self._pass = number
        return int(self._order[place])


def build_order(
    first: int,
    lengths: np.ndarray,
    seq_length: int,
    num_samples: int | None,
    seed: int,
    shuffle: bool,
) -> Arrays:
    """The arrays behind a SampleIndex, made in place: 12 E D + 4 E T / S bytes, and 16 D for lengths while building.

    numpy's RandomState is used because its streams are frozen: the order must not change with numpy's version, or a
    resumed run would see samples twice.

    Args:
        first: number of the first document.
        lengths: int64 [D], tokens of the documents, T in all.
    Returns:
        order: [E * D] documents; bounds: int64 [E * D + 1] where each starts in the stream; samples: [N] numbers of
        samples in the stream.
    """
    tokens, random = int(lengths.sum()), np.random.RandomState(seed % 2**32)
    epochs = 1 if num_samples is None else -(-(num_samples * seq_length + 1) // tokens)
    order_ED = np.empty((epochs, len(lengths)), smallest_int(first + len(lengths)))
    bounds = np.zeros(order_ED.size + 1, np.int64)
    for epoch, (order_D, ends_D) in enumerate(
        zip(order_ED, bounds[1:].reshape(order_ED.shape))
    ):
        order_D[:] = np.arange(len(lengths))
        if shuffle:
            random.shuffle(order_D)
        np.cumsum(lengths[order_D], out=ends_D)
        ends_D += epoch * tokens
    order_ED += first
    total = (epochs * tokens - 1) // seq_length
    wanted = total if num_samples is None else num_samples
    samples = np.arange(total, dtype=smallest_int(total))
    if shuffle:
        before_last = ((epochs - 1) * tokens - 1) // seq_length if epochs > 1 else 0
        needed, whole = wanted - before_last, (tokens - 1) // seq_length
        cut = before_last if needed < int(LAST_EPOCH_APART_BELOW * whole) else 0
        random.shuffle(samples[:cut])
        random.shuffle(samples[cut:])
    return {"order": order_ED.reshape(-1), "bounds": bounds, "samples": samples[:wanted]}


def smallest_int(limit: int) -> type:
    """int32 when it holds `limit`, else int64."""
    return np.int32 if limit <= np.iinfo(np.int32).max else np.int64
