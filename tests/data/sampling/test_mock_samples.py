"""Samples of --mock-data."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from megatron.config.schema import DataConfig
from megatron.data.sampling.mock_samples import MockSamples
from megatron.data.splits import build_splits
from megatron.tokenizer.null import NullTokenizer


def mock(vocab_size: int = 1000, **changes) -> MockSamples:
    options = {"seq_length": 64, "num_samples": 50, "seed": 3, "stream": 0, **changes}
    return MockSamples(vocab_size, vocab_size - 1, **options)


def reference(seed: int, stream: int, i: int, vocab_size: int, seq_length: int) -> list[int]:
    """Sample i, token by token."""
    random = np.random.RandomState([seed, stream, 0, i])
    first = random.randint(0, vocab_size, seq_length + 1, dtype=np.int64).tolist()
    second = random.randint(0, vocab_size, seq_length + 1, dtype=np.int64).tolist()
    ends = random.randint(0, 512, seq_length + 1).tolist()
    tokens = []
    for a, b, end in zip(first, second, ends):
        tokens.append(vocab_size - 1 if end == 0 else a * b // vocab_size)
    return tokens


def test_samples_equal_the_reference():
    samples = mock(seed=2**32 + 3)
    for i in (0, 1, 49):
        assert samples[i].tolist() == reference(3, 0, i, 1000, 64)
        assert samples[i].dtype == np.int64


def test_first_tokens_never_change():
    """Recorded: a resumed run of a later version sees the same data."""
    assert mock()[0][:6].tolist() == [440, 45, 198, 864, 47, 539]


def test_samples_depend_on_seed_split_and_number():
    kinds = [mock(), mock(seed=4), mock(stream=1)]
    rows = [tuple(samples[i]) for samples in kinds for i in range(50)]
    assert len(set(rows)) == 150
    longer = mock(num_samples=5000)
    assert all((longer[i] == mock()[i]).all() for i in range(50))


def test_large_numbers_of_samples():
    samples = mock(num_samples=2**33)
    assert (samples[2**32 + 5] != samples[5]).any()
    assert len(samples) == 2**33


@pytest.mark.parametrize("vocab_size", [1, 2, 257, 2**31 - 1])
def test_ids_are_in_the_vocabulary(vocab_size):
    samples = mock(vocab_size, seq_length=500)
    tokens = np.concatenate([samples[i] for i in range(50)])
    assert tokens.min() >= 0 and tokens.max() < vocab_size
    if vocab_size > 2:
        ends = (tokens == vocab_size - 1).mean()
        assert 1 / 1024 < ends < 1 / 256
        assert np.mean(tokens < vocab_size / 2) > 0.8, "small ids are more frequent"


def test_entropy_is_as_documented():
    samples = mock(100, seq_length=2000, num_samples=200)
    tokens = np.concatenate([samples[i] for i in range(200)])
    shares = np.bincount(tokens, minlength=100) / len(tokens)
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    assert entropy == pytest.approx(np.log(100) - 0.42, abs=0.05)


def test_number_beyond_the_end_is_an_error():
    samples = mock()
    for i in (-1, 50):
        with pytest.raises(IndexError, match=f"sample {i} of --mock-data: allowed 0 to 49"):
            samples[i]
    assert samples.source(3) == "--mock-data"


def test_all_splits_are_mocked():
    made = build_splits(
        DataConfig(mock_data=True, eod_mask_loss=True),
        seq_length=8,
        train_samples=5,
        valid_samples=4,
        test_samples=3,
        seed=1,
        tokenizer=NullTokenizer(99),
    )
    assert {name: len(samples) for name, samples in made.items()} == {
        "train": 5,
        "valid": 4,
        "test": 3,
    }
    assert len({tuple(samples[0]) for samples in made.values()}) == 3
    assert made["train"][4].tolist() == reference(1, 0, 4, 100, 8)


def test_worker_processes_draw_the_same_samples():
    samples = mock()
    copy = pickle.loads(pickle.dumps(samples))
    assert all((copy[i] == samples[i]).all() for i in range(50))
