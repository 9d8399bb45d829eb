"""Statistics over seeds: confidence intervals, paired comparisons, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.optional_packages import import_optional

CONFIDENCE = 0.95
"""level of all intervals; a difference is shown if its p-value is below 1 - CONFIDENCE"""
POWER = 0.8
"""probability with which a difference of the detectable size is found"""
_NEEDED_BY = "the summary of a study"


@dataclass(frozen=True)
class SeedStatistics:
    """Mean and spread of a measure over seeds."""

    n: int
    """number of seeds with a finite value"""
    mean: float
    """NaN without any"""
    std: float
    """standard deviation of the sample (n - 1); NaN for fewer than two seeds"""
    low: float
    """lower end of the interval that contains the expected value with probability CONFIDENCE,
    from Student's t; NaN for fewer than two seeds"""
    high: float
    """its upper end"""

    @staticmethod
    def of(values: Sequence[float]) -> SeedStatistics:
        """Compute the statistics of the finite ones among the values."""
        finite = np.array([value for value in values if math.isfinite(value)], dtype=float)
        n = len(finite)
        if not n:
            return SeedStatistics(0, math.nan, math.nan, math.nan, math.nan)
        mean = float(finite.mean())
        if n < 2:
            return SeedStatistics(n, mean, math.nan, math.nan, math.nan)
        std = float(finite.std(ddof=1))
        half = _t_quantile(n - 1) * std / math.sqrt(n)
        return SeedStatistics(n, mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class PairedComparison:
    """Difference of a configuration from the baseline over the seeds that both have."""

    seeds: tuple[int, ...]
    """the common seeds with finite values"""
    difference: float
    """mean of (configuration - baseline); NaN without common seeds"""
    std: float
    """standard deviation of the differences; NaN for fewer than two seeds"""
    low: float
    """lower end of the interval of the expected difference; NaN for fewer than two seeds"""
    high: float
    """its upper end"""
    p_value: float
    """two-sided, of Student's paired t-test; NaN for fewer than two seeds"""

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.seeds)


def compare_pairs(ours: Mapping[int, float], baseline: Mapping[int, float]) -> PairedComparison:
    """Compare two measures by seed with Student's paired t-test.

    Seeds that one of them lacks, or with a value that is not finite, are left out.
    """
    seeds = tuple(
        seed
        for seed in sorted(ours.keys() & baseline.keys())
        if math.isfinite(ours[seed]) and math.isfinite(baseline[seed])
    )
    ours_S = np.array([ours[seed] for seed in seeds], dtype=float)
    baseline_S = np.array([baseline[seed] for seed in seeds], dtype=float)
    statistics = SeedStatistics.of(ours_S - baseline_S)
    return PairedComparison(
        seeds=seeds,
        difference=statistics.mean,
        std=statistics.std,
        low=statistics.low,
        high=statistics.high,
        p_value=_paired_p_value(ours_S, baseline_S),
    )


def _paired_p_value(ours_S: np.ndarray, baseline_S: np.ndarray) -> float:
    if len(ours_S) < 2:
        return math.nan
    difference_S = ours_S - baseline_S
    if (difference_S == difference_S[0]).all():
        # The statistic of equal differences is 0 / 0, or infinite.
        return float(difference_S[0] == 0)
    stats = import_optional("scipy.stats", "analysis", _NEEDED_BY)
    return float(stats.ttest_rel(ours_S, baseline_S).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for the number of comparisons (Holm 1979, step-down).

    The chance that any of several true null hypotheses is rejected is then at most the level of
    the test. NaN stays NaN and does not count as a comparison.
    """
    order = sorted(
        (i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i]
    )
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def pooled_std(comparisons: Sequence[PairedComparison]) -> float:
    """Return the standard deviation of paired differences over all comparisons.

    Variances are weighted by their degrees of freedom, n - 1: with few seeds the spread of a
    single comparison is too uncertain to plan with. NaN if no comparison has two pairs.
    """
    known = [comparison for comparison in comparisons if comparison.n >= 2]
    if not known:
        return math.nan
    degrees = [comparison.n - 1 for comparison in known]
    variances = [comparison.std**2 for comparison in known]
    return math.sqrt(np.average(variances, weights=degrees))


def detectable_difference(std: float, n: int) -> float:
    """Return the difference that a paired t-test with n pairs finds with probability POWER.

    The power is that of the noncentral t distribution, for a single comparison at the level
    1 - CONFIDENCE.

    Args:
        std: standard deviation of the differences.
        n: number of pairs; NaN is returned for fewer than two.
    """
    if n < 2 or math.isnan(std):
        return math.nan
    stats = import_optional("scipy.stats", "analysis", _NEEDED_BY)
    optimize = import_optional("scipy.optimize", "analysis", _NEEDED_BY)
    critical = _t_quantile(n - 1)

    def missing_power(shift: float) -> float:
        # A significant difference of the wrong sign has a probability below 1e-6 here.
        return float(stats.nct.sf(critical, n - 1, shift)) - POWER

    shift = optimize.brentq(missing_power, 0.0, 10 * critical)
    return shift * std / math.sqrt(n)


def _t_quantile(degrees: int) -> float:
    stats = import_optional("scipy.stats", "analysis", _NEEDED_BY)
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))
