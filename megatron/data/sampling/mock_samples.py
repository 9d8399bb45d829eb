"""Samples of random tokens, for benchmarks and smoke tests without data files."""

from __future__ import annotations

import numpy as np

_MEAN_DOCUMENT = 512  # tokens


class MockSamples:
    """Random samples; `samples[i]` is int64 [S + 1] and depends on the seed and on i only.

    Small ids are more frequent, so that a model can learn something: with V ids, the entropy is
    ln V - 0.42 nats, where 0.42 is 1 minus Euler's constant. One token in 512 is the
    end-of-document token.

    Args:
        vocab_size: V.
        eod: the end-of-document id.
        seq_length: S.
        num_samples: number of samples.
        seed: seed of all samples.
        stream: number of the split; splits have different samples.
    """

    def __init__(
        self,
        vocab_size: int,
        eod: int,
        *,
        seq_length: int,
        num_samples: int,
        seed: int,
        stream: int,
    ):
        self._vocab_size = vocab_size
        self._eod = eod
        self._seq_length = seq_length
        self._num_samples = num_samples
        self._seed = seed
        self._stream = stream

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int) -> np.ndarray:
        """Draw sample i, int64 [S + 1]. Raises IndexError beyond the end."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of --mock-data: allowed 0 to {len(self) - 1}")
        # RandomState, because numpy guarantees that its streams do not change.
        high, low = divmod(i, 2**32)
        random = np.random.RandomState([self._seed % 2**32, self._stream, high, low])
        size = self._seq_length + 1
        factors = random.randint(0, self._vocab_size, (2, size), dtype=np.int64)
        sample = factors[0] * factors[1] // self._vocab_size
        sample[random.randint(0, _MEAN_DOCUMENT, size) == 0] = self._eod
        return sample

    def source(self, i: int) -> str:
        """Return the source of sample i, for messages."""
        return "--mock-data"
