"""Statistics over seeds, against sums by hand, scipy's own intervals, and simulated tests."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from megatron.analysis.compare import seed_statistics
from megatron.analysis.compare.seed_statistics import (
    PairedComparison,
    SeedStatistics,
    compare_pairs,
    detectable_difference,
    holm,
    pooled_std,
)

T_975_2 = 4.302652729911275
"""97.5 % quantile of Student's t with 2 degrees of freedom, from a printed table"""
LOSSES = [3.10, 3.14, 3.06]


def test_interval_equals_one_by_hand():
    found = SeedStatistics.of(LOSSES)
    half = T_975_2 * statistics.stdev(LOSSES) / math.sqrt(3)
    assert found.n == 3
    assert found.mean == pytest.approx(3.1, abs=1e-12)
    assert found.std == pytest.approx(0.04, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((3.1 - half, 3.1 + half), rel=1e-9)


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan]])
def test_no_finite_value_is_nan(values):
    found = SeedStatistics.of(values)
    assert found.n == 0 and math.isnan(found.mean) and math.isnan(found.std)


def test_one_seed_has_no_interval():
    found = SeedStatistics.of([2.5, math.nan])
    assert (found.n, found.mean) == (1, 2.5)
    assert math.isnan(found.std) and math.isnan(found.low) and math.isnan(found.high)


def test_pairs_equal_scipy():
    """Seeds that only one side has, and seeds that diverged, are no pairs."""
    ours = {1: 3.0, 2: 3.2, 3: 2.9, 4: 9.9, 5: math.nan, 6: 1.0}
    baseline = {6: math.inf, 5: 3.0, 3: 3.0, 2: 3.25, 1: 3.12}
    found = compare_pairs(ours, baseline)
    reference = stats.ttest_rel([3.0, 3.2, 2.9], [3.12, 3.25, 3.0])
    interval = reference.confidence_interval(0.95)
    assert found.seeds == (1, 2, 3) and found.n == 3
    assert found.difference == pytest.approx(-0.09, abs=1e-12)
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_too_few_pairs_have_no_test():
    none = compare_pairs({1: 3.0}, {2: 3.0})
    assert none.n == 0 and math.isnan(none.difference) and math.isnan(none.p_value)
    one = compare_pairs({1: 3.0}, {1: 3.5})
    assert one.n == 1 and one.difference == -0.5
    assert math.isnan(one.p_value) and math.isnan(one.low)


@pytest.mark.parametrize(("shift", "p_value"), [(0.0, 1.0), (0.5, 0.0)])
def test_equal_differences_have_a_p_value(shift, p_value):
    """Runs with the same result would be 0 / 0 in the formula."""
    found = compare_pairs({1: 2.0 + shift, 2: 4.0 + shift}, {1: 2.0, 2: 4.0})
    assert found.p_value == p_value
    assert found.low == found.high == found.difference == shift


def test_holm_equals_an_example():
    """0.01 x 4 = 0.04, 0.02 x 3 = 0.06, 0.022 x 2 is less than 0.06, 0.5 x 1."""
    assert holm([0.022, 0.01, math.nan, 0.5, 0.02]) == pytest.approx(
        [0.06, 0.04, math.nan, 0.5, 0.06], nan_ok=True
    )
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_as_the_step_down_rule(p_values):
    """The rule as Holm states it: reject in order of p while p_(i) <= alpha / (m - i)."""
    alpha = 0.05
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] * (len(p_values) - rank) > alpha:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def comparison(n: int, std: float) -> PairedComparison:
    return PairedComparison(tuple(range(n)), 0.0, std, 0.0, 0.0, 1.0)


def test_pooled_spread_weighs_degrees_of_freedom():
    pooled = pooled_std([comparison(2, 0.3), comparison(4, 0.1), comparison(1, math.nan)])
    assert pooled == pytest.approx(math.sqrt((1 * 0.09 + 3 * 0.01) / 4))
    assert math.isnan(pooled_std([comparison(1, math.nan)]))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_detectable_difference_is_found_as_often_as_stated(n):
    """20,000 simulated studies: the share that finds the difference is 0.8 +- 4 sigma."""
    shift = detectable_difference(0.02, n)
    random = np.random.default_rng(5)
    differences = random.normal(shift, 0.02, size=(20_000, n))
    found = (stats.ttest_1samp(differences, 0.0, axis=1).pvalue < 0.05).mean()
    assert abs(found - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 20_000)
    assert detectable_difference(0.04, n) == pytest.approx(2 * shift)


def test_detectable_difference_needs_two_pairs():
    assert math.isnan(detectable_difference(0.1, 1))
    assert math.isnan(detectable_difference(math.nan, 3))
    assert detectable_difference(0.0, 3) == 0.0


def test_missing_scipy_is_named(monkeypatch):
    def missing(module, extra, needed_by):
        raise ValueError(f"{needed_by} needs {module} of {extra}")

    monkeypatch.setattr(seed_statistics, "import_optional", missing)
    with pytest.raises(ValueError, match="the summary of a study needs scipy.stats of analys"):
        SeedStatistics.of(LOSSES)
