"""Final figures of groups, the summary in words, and what is wrong with runs."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from helpers.report_runs import SEQUENCE, eval_row, rows_of_run, start_row, train_row, write_run
from megatron.analysis.report import words
from megatron.analysis.report.finals import (
    constant_value,
    final_loss,
    held_out_kinds,
    main_held_out_kind,
    metric_median,
    metric_quantiles,
)
from megatron.analysis.report.groups import RunGroup, group_runs
from megatron.analysis.report.problems import run_problems
from megatron.analysis.report.runs import read_run
from megatron.analysis.report.sources import RunSource


@pytest.fixture
def read(tmp_path):
    """Write rows as a run, and read it as a report does."""
    numbers = iter(range(100))

    def read_rows(rows, **source):
        folder = write_run(tmp_path / f"run{next(numbers)}", rows)
        path = folder / "metrics.jsonl"
        return read_run(RunSource(path, folder.name, **source), 200)

    return read_rows


def test_final_loss_is_of_the_last_row(read):
    group = RunGroup("g", tuple(read(rows_of_run(seed)) for seed in (1, 2)))
    for kind in ("eval", "eval/code", "test", "train"):
        lasts = [[r for r in rows_of_run(s) if r["kind"] == kind][-1]["loss"] for s in (1, 2)]
        found = final_loss(group, kind)
        low, high = stats.t.interval(0.95, 1, np.mean(lasts), stats.sem(lasts))
        assert (found.n, found.mean) == (2, pytest.approx(np.mean(lasts)))
        np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-12)
    assert final_loss(group, "eval/none").n == 0
    assert held_out_kinds([group]) == ["eval", "eval/code", "test"]


def test_validation_is_the_main_kind():
    assert main_held_out_kind(["test", "eval"]) == "eval"
    assert main_held_out_kind(["test"]) == "test" and main_held_out_kind([]) == ""


def test_medians_and_quantiles_are_of_all_rows(read):
    runs = [read(rows_of_run(seed)) for seed in (1, 2)]
    times = [
        [r["step_time_ms"] for r in rows_of_run(seed) if r["kind"] == "train"]
        for seed in (1, 2)
    ]
    assert metric_median(runs[0], "step_time_ms") == pytest.approx(np.median(times[0]))
    found = metric_quantiles(RunGroup("g", tuple(runs)), "step_time_ms", (0.1, 0.9))
    np.testing.assert_allclose(found, np.quantile(np.concatenate(times), (0.1, 0.9)))
    assert math.isnan(metric_median(runs[0], "none"))
    assert metric_quantiles(RunGroup("g", tuple(runs)), "none", (0.5,)) is None


def test_constant_metrics_are_found(read):
    groups = group_runs([read(rows_of_run(1)), read(rows_of_run(2))])
    assert constant_value(groups, "dropped_assignment_fraction") == 0
    assert constant_value(groups, "grad_norm") is None
    assert constant_value(groups, "none") is None


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (819_200, "819k"), (1.5e9, "1.5G"), (3.21e18, "3.21E"), (float("nan"), "–")],
)
def test_numbers_have_prefixes(value, text):
    assert words.si_text(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(42, "42 s"), (600, "10 min"), (7200, "2 h"), (864_000, "10 days"), (float("nan"), "–")],
)
def test_durations_have_units(seconds, text):
    assert words.duration_text(seconds) == text


def test_summary_of_groups_names_best_and_last(read):
    runs = [
        read(rows_of_run(seed, gate, shift=shift))
        for gate, shift in (("topk", 0.0), ("remoe", 0.5), ("hash", 2.0))
        for seed in (1, 2)
    ]
    groups = group_runs(runs)
    losses = {group.label: final_loss(group, "eval") for group in groups}
    best, second, tokens, speed, load = words.summary_statements(groups, "eval")
    assert best.figure == f"{losses['topk'].mean:.4f}"
    assert "lowest final validation loss, of topk (mean of 2 runs; 95% confidence" in best.text
    assert second.figure == f"+{losses['remoe'].mean - losses['topk'].mean:.4f}"
    assert second.text.startswith("nats per token more for the second, remoe (the confidence")
    assert f"{losses['hash'].mean - losses['topk'].mean:.4f} more for the last, hash" in (
        second.text
    )
    assert tokens.figure == "819k" and "200 iterations" in tokens.text
    assert "in each of 6 runs" in tokens.text and "different length" not in tokens.text
    assert speed.text.startswith("tokens per second (median) on 2 ranks (the CPU) with ")
    assert float(load.figure) >= 1


def test_summary_of_one_run_has_first_loss(read):
    rows = rows_of_run(1)
    evaluations = [row["loss"] for row in rows if row["kind"] == "eval"]
    first, *_ = words.summary_statements(group_runs([read(rows)]), "eval")
    assert first.figure == f"{evaluations[-1]:.4f}"
    assert f"after {evaluations[0]:.4f} in the first row" in first.text


def test_summary_without_numbers_says_so(read):
    rows = [train_row(10, random.Random(1), loss=float("nan"))]
    assert words.summary_statements(group_runs([read(rows)]), "")[0].figure == "–"


def test_summary_of_a_run_without_losses_is_that_of_the_other_seed(read):
    """No evaluations, and the training rows of one seed lack a loss."""
    trained = [row for row in rows_of_run(1) if row["kind"] in ("run", "train")]
    without = [start_row(2), *(train_row(i, random.Random(1)) for i in (10, 20))]
    for row in without:
        row.pop("loss", None)
    first, *_ = words.summary_statements(group_runs([read(trained), read(without)]), "")
    assert first.figure == f"{trained[-1]['loss']:.4f}"
    assert f"after {trained[1]['loss']:.4f} in the first row" in first.text


def test_summary_warns_of_different_lengths(read):
    runs = [read(rows_of_run(1, "topk", 100)), read(rows_of_run(1, "remoe", 200))]
    text = " ".join(line.text for line in words.summary_statements(group_runs(runs), "eval"))
    assert "final losses compare runs of different length" in text


def test_finished_run_has_no_problems(read):
    assert run_problems(read([start_row(1, train_iters=200), *rows_of_run(1)[1:]])) == []


def test_problems_of_runs_are_named(read):
    rng = random.Random(1)
    rows = [
        start_row(1, train_iters=100),
        train_row(10, rng),
        train_row(20, rng, loss=float("nan"), bad_steps=3),
        train_row(30, rng, loss=float("nan"), bad_steps=2, loss_spikes=1),
        eval_row(30, rng, loss=float("nan")),
    ]
    found = run_problems(read(rows, state="failed", error="exit code 2"))
    assert found == [
        "The study lists it as failed.",
        "It failed: exit code 2",
        "The training loss is not a number in 2 of 3 rows, first at iteration 20.",
        "The eval loss is not a number in 1 of 1 rows, first at iteration 30.",
        "It ended at iteration 30 of 100.",
        "5 optimizer steps were skipped, because loss or gradient was not a number.",
        "1 loss spikes were detected.",
    ]


@pytest.mark.parametrize(
    "length, end",
    [
        ({"train_iters": 30}, ""),
        ({"train_iters": 31}, "30 of 31"),
        ({"train_tokens": 30 * SEQUENCE}, ""),
        ({"train_tokens": 30 * SEQUENCE + 1}, "30, after 122,880 of 122,881 tokens"),
        ({"train_samples": 240 + 7}, ""),  # 8 samples per step
        ({"train_samples": 240 + 8}, "30, after 240 of 248 samples"),
        ({}, ""),
    ],
)
@pytest.mark.parametrize("batch", [{"global_batch_size": 8}, {"micro_batch_size": 4}])
def test_early_ends_are_found_in_each_unit(read, length, end, batch):
    start = start_row(1, **length, **batch)
    start["config"]["model"]["seq_length"] = SEQUENCE // 8
    rows = [start, train_row(10, random.Random(1)), train_row(30, random.Random(1))]
    assert run_problems(read(rows)) == ([f"It ended at iteration {end}."] if end else [])


def test_early_end_in_samples_needs_the_sequence_length(read):
    rows = [start_row(1, train_samples=10**9), train_row(30, random.Random(1))]
    assert run_problems(read(rows)) == []


def test_unreadable_runs_are_problems(read, tmp_path):
    missing = read_run(RunSource(tmp_path / "none/metrics.jsonl", "none"), 9)
    assert missing.is_empty and run_problems(missing) == [
        f"There is no {tmp_path}/none/metrics.jsonl."
    ]
    folder = read_run(RunSource(Path(tmp_path), "folder"), 9)
    assert folder.is_empty and "cannot be read" in run_problems(folder)[0]
    foreign = read([{"loss": 1.0, "step": 3}])
    assert foreign.is_empty and "has rows without a kind" in run_problems(foreign)[0]
    assert run_problems(read([])) == ["Its metrics file has no training row and no evaluation."]


def test_rows_without_iteration_are_left_out(read):
    rng = random.Random(1)
    rows = [eval_row(10, rng), {"kind": "eval", "loss": 3.0}, eval_row(20, rng)]
    held_out = read(rows).held_out["eval"]
    assert held_out.iteration_R.tolist() == [10, 20]
    assert held_out.values["loss"].tolist() == [rows[0]["loss"], rows[2]["loss"]]
