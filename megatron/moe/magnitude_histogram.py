"""Histograms of absolute values in bins of equal relative width, and their percentiles.

Counts of forward passes and ranks add up, which percentiles do not. The bins are the 5
leading bits of the significand at each exponent of two, read from the bits of an fp32
number, so that a bin is at most 1/32 of its values wide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron.moe.dispatch.plan import bincount_static

_SIGNIFICAND_BITS = 5
_LOWEST_EXPONENT = -32
"""Smaller values are counted in the first bin, which begins at 0."""
_NUM_EXPONENTS = 64
"""Values from 2^32 on, infinities and NaN are counted in the last bin."""
NUM_MAGNITUDES = _NUM_EXPONENTS << _SIGNIFICAND_BITS
RELATIVE_BIN_WIDTH = 2.0**-_SIGNIFICAND_BITS
_FP32_BIAS = 127
_FP32_SIGNIFICAND_BITS = 23


def magnitude_histogram(values: Tensor) -> Tensor:
    """Count absolute values: int64 [NUM_MAGNITUDES]. Does not synchronise with the device.

    Args:
        values: of any shape and floating-point dtype.
    """
    bits = values.float().abs().flatten().view(torch.int32)
    first = (_FP32_BIAS + _LOWEST_EXPONENT) << _SIGNIFICAND_BITS
    bins = (bits >> (_FP32_SIGNIFICAND_BITS - _SIGNIFICAND_BITS)) - first
    return bincount_static(bins.clamp(0, NUM_MAGNITUDES - 1).long(), NUM_MAGNITUDES)


def magnitude_percentile(counts: Tensor, percent: int) -> float:
    """Return the value up to which `percent` % of the absolute values lie.

    It is interpolated linearly within its bin; NaN in the last one, whose values have no end.

    Args:
        counts: sum of `magnitude_histogram`, with at least one value.
    """
    below = counts.double().cumsum(0)
    # In integers, because a rounded product may fall on the other side of a count.
    bin_number = int((below * 100 < percent * below[-1]).sum())
    if bin_number == NUM_MAGNITUDES - 1:
        return math.nan
    count = float(counts[bin_number])
    fraction = (percent * float(below[-1]) / 100 - (float(below[bin_number]) - count)) / count
    low = 0.0
    if bin_number > 0:
        low = _edge(bin_number)
    return low + fraction * (_edge(bin_number + 1) - low)


def _edge(bin_number: int) -> float:
    """Return the lower end of a bin."""
    exponent, step = divmod(bin_number, 1 << _SIGNIFICAND_BITS)
    return 2.0 ** (_LOWEST_EXPONENT + exponent) * (1 + step * RELATIVE_BIN_WIDTH)
