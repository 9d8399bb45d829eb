"""Histograms of absolute values, whose percentiles are exact up to the width of a bin."""

import math

import pytest
import torch

from megatron.moe.magnitude_histogram import (
    NUM_MAGNITUDES,
    RELATIVE_BIN_WIDTH,
    magnitude_histogram,
    magnitude_percentile,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e3])
def test_percentile_is_within_a_bin(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    values = (scale * torch.randn(40, 50, generator=generator)).to(dtype)
    counts = magnitude_histogram(values)
    assert counts.shape == (NUM_MAGNITUDES,) and counts.sum() == 2000
    ordered = sorted(abs(value) for value in values.flatten().tolist())
    for percent in (1, 50, 99, 100):
        exact = ordered[math.ceil(percent * 2000 / 100) - 1]
        got = magnitude_percentile(counts, percent)
        assert got == pytest.approx(exact, rel=RELATIVE_BIN_WIDTH)


def test_counts_of_parts_add_up():
    values = torch.linspace(-3, 5, 101)
    parts = magnitude_histogram(values[:30]) + magnitude_histogram(values[30:])
    assert torch.equal(parts, magnitude_histogram(values))


def test_values_out_of_range_are_counted_at_ends():
    tiny = torch.tensor([0.0, 1e-30, -1e-12])
    huge = torch.tensor([1e30, float("inf"), float("nan")])
    assert magnitude_histogram(tiny)[0] == 3 and magnitude_histogram(huge)[-1] == 3
    assert 0 < magnitude_percentile(magnitude_histogram(tiny), 99) < 1e-9
    assert math.isnan(magnitude_percentile(magnitude_histogram(huge), 99))


def test_percentile_interpolates_within_its_bin():
    """Half of the values in [1, 1 + 1/32): the 25th percentile is a quarter above 1 of 1/32."""
    counts = magnitude_histogram(torch.tensor([1.0, 1.0, 4.0, 4.0]))
    assert magnitude_percentile(counts, 25) == pytest.approx(1 + 1 / 64)
    assert magnitude_percentile(counts, 50) == pytest.approx(1 + 1 / 32)
