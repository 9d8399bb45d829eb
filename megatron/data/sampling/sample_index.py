"""Samples of S + 1 tokens cut from a stream of shuffled documents.

Shape suffixes: S sequence length, T tokens of one epoch, E epochs, D documents, N samples.

The stream consists of E epochs of the documents, each in its own order. Sample i of the stream
is tokens i*S to i*S+S, both included: it shares its first token with the previous sample, where
that token was only a label. The samples are then shuffled. By Megatron's rule, if less than 80 %
of the last epoch is needed, the samples before it and those of it are shuffled separately, so
that the partial last epoch does not displace samples of the full ones.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from megatron.config.fields import require
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.sampling.index_cache import Arrays, cached_arrays, files_key
from megatron.io.mapped_file import advise_random_access
from megatron.log import get_logger

_SEPARATE_LAST_EPOCH_BELOW = 0.80
_LOGGED_DOCUMENTS = 20_000_000
"""Documents or samples from which on building takes seconds to minutes, and is logged."""
_ORDER_VERSION = 1  # part of the cache key; increase it when the order of samples changes


def parse_split(split: str) -> tuple[Fraction, Fraction, Fraction]:
    """Parse `--split` into shares of training, validation and test that add up to 1.

    "969,30,1" gives (969/1000, 30/1000, 1/1000). Missing shares at the end are 0.

    Raises:
        ValueError: `split` is not one to three non-negative numbers.
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
    total = sum(shares)
    train, valid, test = (Fraction(share) / total for share in [*shares, 0, 0][:3])
    return train, valid, test


def split_documents(num_documents: int, split: str) -> list[tuple[int, int]]:
    """Return the document ranges (start, stop) of training, validation and test.

    The boundaries are the cumulative shares, rounded to documents.
    """
    train, valid, _ = parse_split(split)
    train_end = round(num_documents * train)
    valid_end = round(num_documents * (train + valid))
    return [(0, train_end), (train_end, valid_end), (valid_end, num_documents)]


class SampleIndex:
    """Samples of a range of documents; `index[i]` is int64 [S + 1].

    Args:
        dataset: the tokens.
        documents: range (start, stop) of documents; None: all.
        seq_length: S, the tokens of a sample minus one.
        num_samples: number of samples, from as many epochs as they need; None: all samples of
            one epoch.
        seed: seed of the shuffles of documents and of samples.
        shuffle: False keeps documents and samples in file order.
        cache_dir: folder of the cached index; empty: no cache.

    Raises:
        ValueError: the range has fewer tokens than one sample.
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
        documents = documents or (0, dataset.num_documents)
        start, stop = documents
        require(seq_length > 0, "seq_length", seq_length, "a positive integer")
        require(
            num_samples is None or num_samples > 0,
            "num_samples",
            num_samples,
            "a positive integer, or None",
        )
        require(
            0 <= start <= stop <= dataset.num_documents,
            f"range of documents of {dataset.prefix}",
            documents,
            f"ranges within 0 to {dataset.num_documents}",
        )
        self.dataset = dataset
        self.seq_length = seq_length
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
            "algorithm": _ORDER_VERSION,
            "files": files_key(dataset.prefix + ".idx", dataset.prefix + ".bin"),
            "documents": [start, stop],
            "seq_length": seq_length,
            "num_samples": num_samples,
            "seed": seed,
            "shuffle": shuffle,
        }
        arrays = cached_arrays(cache_dir, "samples", key, self._build)
        self._order = arrays["order"]
        self._bounds = arrays["bounds"]
        self._samples = arrays["samples"]
        # Read-ahead fetches up to 8 MB around every page that is not in memory. Without it, the
        # first sample of a sparse 20 GB file takes 22 us instead of 3 ms, and 10,000 cold samples
        # of a 4 GB file take 1.8 times less time.
        advise_random_access(dataset.tokens)

    def _build(self) -> Arrays:
        dataset, (start, stop), seq_length, num_samples, seed, shuffle, _ = self._arguments
        lengths = dataset.document_lengths()[start:stop]
        tokens = int(lengths.sum())
        if tokens < seq_length + 1:
            raise ValueError(
                f"documents {start} to {stop} of {dataset.prefix} ({dataset.num_documents} "
                f"documents, {dataset.num_tokens} tokens) hold {tokens} tokens; one sample takes "
                f"{seq_length + 1}. Give more data, another --split or a smaller --seq-length"
            )
        if len(lengths) >= _LOGGED_DOCUMENTS or (num_samples or 0) >= _LOGGED_DOCUMENTS:
            get_logger().info(
                "building the sample index of %s: %d documents, %s samples",
                dataset.prefix,
                len(lengths),
                num_samples or "all",
            )
        return build_order(start, lengths, seq_length, num_samples, seed, shuffle)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> np.ndarray:
        """Return sample i, int64 [S + 1]. Raises IndexError beyond the end."""
        if not 0 <= i < len(self):
            raise IndexError(
                f"sample {i} of {self.dataset.prefix}: allowed 0 to {len(self) - 1}"
            )
        sample = np.empty(self.seq_length + 1, np.int64)
        position = int(self._samples[i]) * self.seq_length  # of the first token in the stream
        entry = int(np.searchsorted(self._bounds, position, side="right")) - 1
        offset = position - int(self._bounds[entry])
        filled = 0
        while filled < len(sample):
            available = int(self._bounds[entry + 1] - self._bounds[entry]) - offset
            count = min(len(sample) - filled, available)
            document = int(self._order[entry])
            sample[filled : filled + count] = self.dataset.read(document, offset, count)
            filled += count
            entry += 1
            offset = 0
        return sample

    def __reduce__(self) -> tuple:
        # A worker process maps the cache again instead of receiving the arrays.
        return (SampleIndex, self._arguments)

    def source(self, i: int) -> str:
        """Return the prefix of the dataset that sample i comes from, for messages."""
        return self.dataset.prefix


class RepeatedEpochs:
    """Samples of one epoch repeated, in a new order in each pass.

    With n samples in an epoch, sample i belongs to pass i // n. The order of a pass depends only
    on the seed and on the number of the pass, so it stays when the run gets longer. It is drawn
    when the pass is first used and replaces the previous one: 4 bytes per sample in each process
    that reads, and 6 s for 10^8 samples.

    Args:
        samples: the samples of one epoch, `SampleIndex(..., num_samples=None)`.
        num_samples: number of samples over all passes.
        seed: seed of the orders of the passes.
    """

    def __init__(self, samples: SampleIndex, num_samples: int, seed: int):
        require(num_samples > 0, "num_samples", num_samples, "a positive integer")
        self._arguments = (samples, num_samples, seed)
        self._samples = samples
        self._num_samples = num_samples
        self._seed = seed
        self._pass = -1
        self._order = np.empty(0, np.int32)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int) -> np.ndarray:
        """Return sample i, int64 [S + 1]. Raises IndexError beyond the end."""
        return self._samples[self._locate(i)]

    def __reduce__(self) -> tuple:
        # A worker process draws the order itself instead of receiving it.
        return (RepeatedEpochs, self._arguments)

    def source(self, i: int) -> str:
        """Return the prefix of the dataset that sample i comes from, for messages."""
        return self._samples.source(self._locate(i))

    def _locate(self, i: int) -> int:
        """Return the number of sample i within the epoch."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a cycle: allowed 0 to {len(self) - 1}")
        number, position = divmod(i, len(self._samples))
        if number != self._pass:
            self._order = np.empty(
                0, np.int32
            )  # frees the old order before drawing the new one
            self._order = self._draw_order(number)
            self._pass = number
        return int(self._order[position])

    def _draw_order(self, number: int) -> np.ndarray:
        size = len(self._samples)
        order = np.arange(size, dtype=smallest_int(size))
        np.random.RandomState([self._seed % 2**32, number]).shuffle(order)
        return order


def build_order(
    first: int,
    lengths: np.ndarray,
    seq_length: int,
    num_samples: int | None,
    seed: int,
    shuffle: bool,
) -> Arrays:
    """Build the arrays of a `SampleIndex`.

    The arrays are filled in place: they take 12 E D + 4 E T / S bytes, and the lengths another
    16 D while building. numpy's RandomState is used because its streams are frozen: if the order
    changed with numpy's version, a resumed run would see samples twice.

    Args:
        first: number of the first document.
        lengths: int64 [D], tokens of the documents, T in total.

    Returns:
        order: [E * D], documents in the order of the stream; bounds: int64 [E * D + 1], token
        offset of each of them in the stream; samples: [N], numbers of samples in the stream.
    """
    random = np.random.RandomState(seed % 2**32)
    tokens = int(lengths.sum())
    epochs = 1
    if num_samples is not None:
        epochs = -(-(num_samples * seq_length + 1) // tokens)
    order_ED = np.empty((epochs, len(lengths)), smallest_int(first + len(lengths)))
    bounds = np.zeros(order_ED.size + 1, np.int64)
    ends_ED = bounds[1:].reshape(order_ED.shape)
    for epoch, (order_D, ends_D) in enumerate(zip(order_ED, ends_ED)):
        order_D[:] = np.arange(len(lengths))
        if shuffle:
            random.shuffle(order_D)
        np.cumsum(lengths[order_D], out=ends_D)
        ends_D += epoch * tokens
    order_ED += first
    total = (epochs * tokens - 1) // seq_length
    if num_samples is None:
        num_samples = total
    samples = np.arange(total, dtype=smallest_int(total))
    if shuffle:
        boundary = _last_epoch_boundary(epochs, tokens, seq_length, num_samples)
        random.shuffle(samples[:boundary])
        random.shuffle(samples[boundary:])
    return {"order": order_ED.reshape(-1), "bounds": bounds, "samples": samples[:num_samples]}


def _last_epoch_boundary(epochs: int, tokens: int, seq_length: int, num_samples: int) -> int:
    """Return the number of samples before the last epoch if it is shuffled separately, else 0."""
    before_last = 0
    if epochs > 1:
        before_last = ((epochs - 1) * tokens - 1) // seq_length
    needed_of_last = num_samples - before_last
    samples_per_epoch = (tokens - 1) // seq_length
    if needed_of_last < int(_SEPARATE_LAST_EPOCH_BELOW * samples_per_epoch):
        return before_last
    return 0


def smallest_int(limit: int) -> type:
    """Return int32 if it can hold `limit`, else int64."""
    if limit <= np.iinfo(np.int32).max:
        return np.int32
    return np.int64
