"""Curves against tokens, FLOPs and seconds: against sums by hand, across resumes, with gaps."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron.analysis.curves import AXES, RunCurves, largest_common_position


def train(iteration, tokens, loss=1.0, flops=10.0, step_ms=100.0, **more):
    row = {"kind": "train", "iteration": iteration, "loss": loss, "consumed_tokens": tokens}
    return row | {"flops_per_token": flops, "step_time_ms": step_ms} | more


def evaluation(iteration, tokens, loss, kind="eval"):
    row = {"kind": kind, "iteration": iteration, "loss": loss, "consumed_tokens": tokens}
    return row | {"elapsed_s": 1e6}


ROWS = [
    {"kind": "run", "iteration": 0},
    evaluation(0, 0, 9.0),
    train(10, 1000, 5.0, flops=10.0, step_ms=100.0),
    evaluation(15, 1500, 4.0),
    train(20, 2000, 3.0, flops=30.0, step_ms=300.0),
    evaluation(20, 2000, 2.0),
    evaluation(20, 2000, 2.5, kind="eval/other"),
    {"kind": "eval_tasks", "iteration": 20},
]


def test_positions_equal_sums_by_hand():
    """FLOPs are 10 per token up to token 1,000, then 30; a step takes 0.1 s, then 0.3 s."""
    curves = RunCurves.from_rows(ROWS)
    loss = curves.curve("train")
    assert loss.value_R.tolist() == [5.0, 3.0]
    assert loss.iteration_R.tolist() == [10.0, 20.0]
    assert loss.tokens_R.tolist() == [1000.0, 2000.0]
    assert loss.flops_R.tolist() == [10_000.0, 40_000.0]
    assert loss.seconds_R.tolist() == [1.0, 4.0]
    held_out = curves.curve("eval")
    assert held_out.tokens_R.tolist() == [0.0, 1500.0, 2000.0]
    assert held_out.flops_R.tolist() == [0.0, 25_000.0, 40_000.0]
    assert held_out.seconds_R.tolist() == [0.0, 2.5, 4.0]
    assert curves.kinds == ["eval", "train", "eval/other"]
    assert len(curves.curve("eval/other")) == 1


@pytest.mark.parametrize(
    ("axis", "middle"), [("tokens", 1750.0), ("flops", 32_500.0), ("seconds", 3.25)]
)
def test_values_are_interpolated_linearly(axis, middle):
    loss = RunCurves.from_rows(ROWS).curve("eval")
    assert loss.at(axis, middle) == 3.0
    assert loss.at(axis, loss.end(axis)) == 2.0
    assert loss.at(axis, 0.0) == 9.0
    assert math.isnan(loss.at(axis, loss.end(axis) * 1.01))
    assert math.isnan(loss.at(axis, -1.0))
    positions = np.linspace(0, loss.end(axis), 23)
    expected = np.interp(positions, loss.axis(axis), loss.value_R)
    assert [loss.at(axis, p) for p in positions] == pytest.approx(expected, rel=1e-12)


def test_resumed_run_counts_repeated_steps_once():
    """A run killed after iteration 30 resumes at 20: the axes equal those of one piece."""
    straight = [train(i, 100 * i, loss=i, flops=i, step_ms=i) for i in (10, 20, 30, 40)]
    resumed = [
        *straight[:3],
        {"kind": "run", "iteration": 20},
        *straight[2:],
    ]
    expected = RunCurves.from_rows(straight).curve("train")
    curve = RunCurves.from_rows(resumed).curve("train")
    for name in ("iteration_R", "tokens_R", "flops_R", "seconds_R", "value_R"):
        np.testing.assert_array_equal(getattr(curve, name), getattr(expected, name))


def test_file_of_later_steps_counts_all():
    """The rates of the first row stand in for the steps that another file has."""
    curve = RunCurves.from_rows([train(110, 11_000, flops=2.0, step_ms=10.0)]).curve("train")
    assert curve.flops_R.tolist() == [22_000.0]
    assert curve.seconds_R.tolist() == [1.1]


def test_older_files_lack_the_axes():
    """Files of versions without FLOPs: this axis is missing, and the others are there."""
    rows = [row | {} for row in ROWS]
    for row in rows:
        row.pop("flops_per_token", None)
    curve = RunCurves.from_rows(rows).curve("eval")
    assert curve.flops_R is None
    assert math.isnan(curve.end("flops")) and math.isnan(curve.at("flops", 1.0))
    assert curve.at("seconds", 4.0) == 2.0
    del rows[4]["step_time_ms"]
    assert RunCurves.from_rows(rows).curve("eval").seconds_R is None


def test_losses_that_are_nan_stay():
    """Between two numbers a curve is interpolated; next to NaN it is NaN, on it as well."""
    losses = [4.0, math.nan, 2.0, 1.0]
    rows = [train(i, i, loss) for i, loss in enumerate(losses, 1)]
    curve = RunCurves.from_rows(rows).curve("train")
    assert curve.at("tokens", 1) == 4.0
    assert math.isnan(curve.at("tokens", 1.5)) and math.isnan(curve.at("tokens", 2))
    assert math.isnan(curve.at("tokens", 2.5))
    assert curve.at("tokens", 3) == 2.0 and curve.at("tokens", 3.5) == 1.5


def test_other_metrics_leave_out_missing_rows():
    rows = [
        train(1, 10, max_violation=3.0),
        train(2, 20),
        train(3, 30, max_violation=None),
        train(4, 40, max_violation=5),
    ]
    curve = RunCurves.from_rows(rows).curve("train", "max_violation")
    assert curve.value_R.tolist() == [3.0, 5.0]
    assert curve.tokens_R.tolist() == [10.0, 40.0]
    assert len(RunCurves.from_rows(rows).curve("eval")) == 0
    assert math.isnan(RunCurves.from_rows([]).curve("eval").end("tokens"))
    assert math.isnan(RunCurves.from_rows([]).curve("eval").at("tokens", 0.0))


def test_equal_positions_are_those_of_all():
    """Each axis has its own shortest run."""
    fast = RunCurves.from_rows([train(10, 1000, flops=4.0, step_ms=10.0)]).curve("train")
    slow = RunCurves.from_rows([train(5, 500, flops=10.0, step_ms=30.0)]).curve("train")
    assert largest_common_position([fast, slow], "tokens") == 500.0
    assert largest_common_position([fast, slow], "flops") == 4000.0
    assert largest_common_position([fast, slow], "seconds") == 0.1
    empty = RunCurves.from_rows([]).curve("train")
    for axis in AXES:
        assert math.isnan(largest_common_position([fast, empty], axis))
        assert math.isnan(largest_common_position([empty, fast], axis))
        assert math.isnan(largest_common_position([], axis))


def test_last_bits_of_flops_do_not_matter():
    """Sums of equal numbers in another order differ in the last bit: the end is still reached."""
    curve = RunCurves.from_rows([train(i, i, 1.0, flops=0.1) for i in range(1, 11)])
    loss = curve.curve("train")
    assert loss.at("flops", loss.end("flops") * (1 + 1e-12)) == 1.0


def test_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="the axis is 'steps'; allowed: tokens, flops, second"):
        RunCurves.from_rows(ROWS).curve("train").axis("steps")


def test_files_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"kind": "tr')
    assert RunCurves.read(path).curve("eval").end("flops") == 40_000.0
    with pytest.raises(OSError, match="missing"):
        RunCurves.read(tmp_path / "missing.jsonl")
