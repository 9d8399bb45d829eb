"""Curves of groups: means and spread over seeds, and points that keep the extremes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from megatron.analysis.report.groups import RunGroup
from megatron.analysis.report.history import bucket_edges
from megatron.analysis.report.runs import KindRows, ReportRun
from megatron.analysis.report.series import (
    FEWEST_POINTS,
    LOSS_POINTS,
    MOST_METRIC_POINTS,
    MOST_POINTS,
    group_series,
    points_of_losses,
    points_of_metrics,
)
from megatron.analysis.report.sources import RunSource

NAN = float("nan")


def run(iterations, losses, flops_rate=2.0, step_seconds=3.0):
    iteration_R = np.array(iterations, dtype=np.float64)
    flops_R = None if flops_rate is None else flops_rate * iteration_R
    values = {"loss": np.array(losses, dtype=np.float64)}
    seconds_R = step_seconds * iteration_R
    rows = KindRows("train", iteration_R, 100 * iteration_R, flops_R, seconds_R, values)
    return ReportRun(RunSource(Path("x"), "x"), rows, {})


def naive(runs, most_points):
    """Compute the points of a group with loops over Python numbers."""
    rows: dict[float, list[float]] = {}
    for one in runs:
        for iteration, loss in zip(one.train.iteration_R, one.train.values["loss"]):
            rows.setdefault(float(iteration), []).append(float(loss))
    iterations = sorted(rows)
    count = min(len(iterations), most_points)
    points = []
    for p in range(count):
        part = iterations[p * len(iterations) // count : (p + 1) * len(iterations) // count]
        means, spreads, all_values = [], [], []
        for iteration in part:
            values = [value for value in rows[iteration] if not math.isnan(value)]
            all_values += values
            if values:
                means.append(sum(values) / len(values))
            if len(values) > 1:
                mean = sum(values) / len(values)
                square = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
                spreads.append(math.sqrt(square))
        points.append(
            (
                sum(part) / len(part),
                sum(means) / len(means) if means else NAN,
                sum(means) / len(means) - sum(spreads) / len(spreads) if spreads else NAN,
                min(all_values, default=NAN),
                max(all_values, default=NAN),
            )
        )
    return np.array(points)


@pytest.mark.parametrize("most_points", [3, 7, 100])
def test_points_equal_a_naive_computation(most_points):
    """With a seed that ends early, one that logs at other steps, and values that are NaN."""
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(3, 20))
    losses[0, 4] = NAN
    losses[:, 9] = NAN
    runs = [
        run(range(1, 21), losses[0]),
        run(range(1, 15), losses[1, :14]),
        run(range(2, 42, 2), losses[2]),
    ]
    series = group_series(RunGroup("g", tuple(runs)), "train", "loss", most_points)
    expected = naive(runs, most_points)
    found = np.stack(
        [series.positions["iteration"], series.mean, series.low, series.least, series.most], 1
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(series.high - series.mean, series.mean - series.low)
    np.testing.assert_allclose(series.positions["tokens"], 100 * series.positions["iteration"])


def test_one_seed_has_rows_as_points():
    series = group_series(RunGroup("g", (run([10, 20, 30], [3, NAN, 1]),)), "train", "loss")
    np.testing.assert_array_equal(series.mean, [3, NAN, 1])
    np.testing.assert_array_equal(series.most, [3, NAN, 1])
    assert not series.has_spread and series.rows_per_point == 1
    np.testing.assert_array_equal(series.positions["flops"], [20, 40, 60])
    np.testing.assert_array_equal(series.positions["seconds"], [30, 60, 90])
    np.testing.assert_array_equal(series.num_seeds, [1, 0, 1])


def test_few_points_keep_the_extremes():
    losses = np.ones(60_000)
    losses[12_345] = 50.0
    losses[54_321] = -7.0
    series = group_series(RunGroup("g", (run(range(60_000), losses),)), "train", "loss", 400)
    assert len(series) == 400 and series.rows_per_point == 150
    assert series.most.max() == 50 and series.least.min() == -7
    assert series.mean.max() == pytest.approx(1 + 49 / 150)


def test_time_does_not_run_backwards_where_a_slow_seed_ends():
    """Or where it has no row: the group needs the mean time of the seeds that train."""
    slow = run([10, 20], [1, 1], step_seconds=5.0)
    fast = run([10, 20, 30, 40], [1, 1, 1, 1], step_seconds=1.0)
    series = group_series(RunGroup("g", (slow, fast)), "train", "loss")
    assert series.positions["seconds"].tolist() == [30, 60, 70, 80]
    assert series.positions["tokens"].tolist() == [1000, 2000, 3000, 4000]
    seldom = run([20, 40], [1, 1], step_seconds=5.0)
    series = group_series(RunGroup("g", (seldom, fast)), "train", "loss")
    assert series.positions["seconds"].tolist() == [30, 60, 90, 120]


def test_positions_of_seeds_of_any_length_never_decrease():
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(5):
        rows = np.sort(rng.choice(200, 40, replace=False))[: rng.integers(1, 40)]
        runs.append(run(rows, np.ones(len(rows)), step_seconds=rng.uniform(1, 9)))
    for most_points in (1000, 7):
        group = RunGroup("g", tuple(runs))
        series = group_series(group, "train", "loss", most_points)
        assert all((np.diff(values) >= 0).all() for values in series.positions.values())


def test_unknown_positions_are_those_of_the_other_seeds():
    unknown = run([1, 2], [1, 2], step_seconds=NAN)
    series = group_series(RunGroup("g", (unknown,)), "train", "loss")
    assert np.isnan(series.positions["seconds"]).all()
    series = group_series(RunGroup("g", (unknown, run([1, 2], [1, 2]))), "train", "loss")
    assert series.positions["seconds"].tolist() == [3, 6]


def test_position_that_a_seed_lacks_is_missing():
    runs = (run([1, 2], [1, 2]), run([1, 2], [1, 2], flops_rate=None))
    series = group_series(RunGroup("g", runs), "train", "loss")
    assert "flops" not in series.positions and "tokens" in series.positions


def test_metric_or_kind_that_is_missing():
    group = RunGroup("g", (run([1], [1]),))
    assert group_series(group, "train", "load_cv") is None
    assert group_series(group, "eval", "loss") is None


def test_seed_without_the_metric_is_not_counted():
    other = run([1, 2, 3], [5, 6, 7])
    values = {"loss": other.train.values["loss"], "load_cv": np.array([1.0, 2.0, 3.0])}
    with_metric = dataclasses.replace(
        other, train=dataclasses.replace(other.train, values=values)
    )
    group = RunGroup("g", (run([1, 2, 3], [1, 2, 3]), with_metric))
    series = group_series(group, "train", "load_cv")
    assert series.mean.tolist() == [1, 2, 3] and series.num_seeds.tolist() == [1, 1, 1]
    assert series.positions["iteration"].tolist() == [1, 2, 3]


def test_many_curves_have_fewer_points():
    counts = [points_of_losses(number) for number in (0, 1, 60, 100, 1200, 10_000)]
    assert counts[0] == counts[1] == MOST_POINTS and counts[-1] == FEWEST_POINTS
    assert counts == sorted(counts, reverse=True)
    assert points_of_losses(300) * 300 == LOSS_POINTS
    assert points_of_metrics(30) == MOST_METRIC_POINTS > points_of_metrics(1000)
    assert points_of_metrics(30_000) == FEWEST_POINTS


@pytest.mark.parametrize("length, most", [(1, 5), (5, 5), (7, 3), (100, 99), (60_000, 400)])
def test_buckets_are_of_nearly_equal_size(length, most):
    edges = bucket_edges(length, most)
    sizes = np.diff(edges)
    assert edges[0] == 0 and edges[-1] == length and len(sizes) == min(length, most)
    assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1
