"""Tests of the benchmark of routing metrics."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import routing_metrics
from helpers.benchmark_runs import run_quickly


def test_interval_has_one_logged_step():
    """Nine ordinary steps and a logged one, round by round."""
    seconds = {
        routing_metrics.ON: [1.0, 2.0],
        routing_metrics.ON_LOGGED: [3.0, 2.0],
        routing_metrics.OFF: [1.0, 1.0],
        routing_metrics.OFF_LOGGED: [1.0, 1.0],
    }
    assert routing_metrics.interval_ratios(seconds) == [12 / 10, 20 / 10]


@pytest.mark.slow
def test_routing_metrics_runs_quickly(tmp_path):
    printed, table, _ = run_quickly("routing_metrics.py", tmp_path)
    assert [(row["name"], row["bar"]) for row in table] == [
        ("interval of 10 steps", 1.01),
        ("interval of 10 steps, CPU time", None),
        ("interval of 10 steps, from costs alone", 1.01),
        ("with metrics, CPU time", None),
        ("with metrics, logged, CPU time", None),
    ]
    assert printed.count("ms per step") == 4 and printed.count("per logged step") == 3
    assert table[2]["holds"], "CPU time does not depend on a busy machine"
