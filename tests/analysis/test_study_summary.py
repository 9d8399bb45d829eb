"""The summary of a study: against numpy and scipy by hand, with gaps of all kinds."""

from __future__ import annotations

import csv
import json
import math
import random

import numpy as np
import pytest
from scipy import stats

from helpers.study_results import StudyFolder, curve_rows, eval_row, train_row
from megatron.analysis.compare.cell_measures import CellMeasures, Quartiles
from megatron.analysis.compare.measured import experts_by_layer
from megatron.analysis.compare.results import MatchRule
from megatron.analysis.compare.seed_statistics import detectable_difference
from megatron.analysis.compare.study_summary import summarize_study
from megatron.analysis.compare.summary import summary_text, write_summary
from megatron.analysis.compare.summary_tables import verdict

LOSSES = {
    "topk": [3.10, 3.14, 3.06],
    "threshold": [3.00, 3.05, 2.95],
    "remoe": [3.11, 3.12, 3.09],
}
STEP_MS = {"topk": 20.0, "threshold": 30.0, "remoe": 10.0}


@pytest.fixture
def study(tmp_path):
    """Three gates and three seeds; each cell evaluates at 0, 10 and 20 iterations."""
    study = StudyFolder(tmp_path / "study", ["gate"], {"gate": "topk"})
    for gate, losses in LOSSES.items():
        for seed, loss in enumerate(losses, 1):
            rows = curve_rows([9.0, 4.0, loss], step_time_ms=STEP_MS[gate], load_cv=0.1 * seed)
            study.add(
                {"gate": gate},
                seed,
                rows,
                active_parameters=500.0 + seed,
                experts_per_token=1.5,
            )
    return study


def by_label(results):
    return {found.label: found for found in summarize_study(results).configurations}


def test_losses_over_seeds_equal_numpy(study):
    for gate, found in by_label(study.read()).items():
        losses = LOSSES[gate]
        interval = stats.t.interval(0.95, 2, np.mean(losses), stats.sem(losses))
        assert found.final_loss.mean == pytest.approx(np.mean(losses), rel=1e-12)
        assert found.final_loss.std == pytest.approx(np.std(losses, ddof=1), rel=1e-9)
        assert (found.final_loss.low, found.final_loss.high) == pytest.approx(interval)
        assert found.loss_by_seed == dict(enumerate(losses, 1))
        assert found.active_parameters == 502.0 and found.parameters_total == 1000
        assert found.computing_experts == 1.5


def test_comparisons_equal_scipy(study):
    """Holm's correction of two p-values: twice the smaller, and the larger if that is more."""
    found = by_label(study.read())
    assert found["topk"].is_baseline and found["topk"].comparison is None
    p_values = {}
    differences = []
    for gate in ("threshold", "remoe"):
        reference = stats.ttest_rel(LOSSES[gate], LOSSES["topk"])
        comparison = found[gate].comparison
        p_values[gate] = reference.pvalue
        differences.append(np.subtract(LOSSES[gate], LOSSES["topk"]))
        assert comparison.p_value == pytest.approx(reference.pvalue, rel=1e-9)
        assert comparison.difference == pytest.approx(differences[-1].mean(), rel=1e-9)
    assert p_values["threshold"] < p_values["remoe"]
    assert found["threshold"].corrected_p == pytest.approx(2 * p_values["threshold"])
    assert found["remoe"].corrected_p == pytest.approx(
        max(p_values["remoe"], 2 * p_values["threshold"])
    )
    assert verdict(found["threshold"]) == "lower" and verdict(found["remoe"]) == "no"
    assert verdict(found["topk"]) == "-"
    headline = summary_text(summarize_study(study.read())).splitlines()[0]
    assert headline.endswith(
        "Lower loss than the baseline: threshold. No difference shown: remoe."
    )
    spread = math.sqrt(np.mean([np.var(difference, ddof=1) for difference in differences]))
    assert summarize_study(study.read()).pooled_std == pytest.approx(spread, rel=1e-9)
    assert found["remoe"].detectable == pytest.approx(detectable_difference(spread, 3))


def test_equal_budgets_are_those_that_all_reach(tmp_path):
    """A run of half the length and one of a third of the speed; losses fall linearly."""
    study = StudyFolder(tmp_path, ["gate"], {"gate": "topk"})
    for seed in (1, 2):
        study.add({"gate": "topk"}, seed, curve_rows([8.0, 6.0, 4.0 - seed]))
        slow = curve_rows([8.0, 7.0, 6.0], step_time_ms=60.0, flops_per_token=5.0)
        study.add({"gate": "slow"}, seed, slow)
        study.add({"gate": "short"}, seed, curve_rows([8.0, 5.0]))
    summary = summarize_study(study.read())
    (group,) = summary.groups
    # 10 steps of 100 tokens; their 10 FLOPs are 20 steps' of `slow`; 10 steps of 20 ms.
    assert group.equal_positions == pytest.approx(
        {"tokens": 1000.0, "flops": 10_000.0, "seconds": 0.2}
    )
    found = {c.label: c.equal_losses for c in group.configurations}
    means = {
        label: [losses[axis].mean for axis in ("tokens", "flops", "seconds")]
        for label, losses in found.items()
    }
    assert means["topk"] == pytest.approx([6.0, 6.0, 6.0])
    assert means["short"] == pytest.approx([5.0, 5.0, 5.0])
    # 0.2 s are 10/3 of the slow run's steps.
    assert means["slow"] == pytest.approx([7.0, 6.0, 8.0 - 1 / 3])


def test_cells_without_a_loss_are_listed(study):
    """A failed, a diverged, a running and a planned cell, and one without evaluations."""
    study.add({"gate": "remoe"}, 1, curve_rows([9.0]), state="failed", error="out of memory")
    study.add({"gate": "remoe"}, 2, curve_rows([9.0, 4.0, math.nan]))
    study.add({"gate": "threshold"}, 3, None, state="planned")
    study.add({"gate": "hash"}, 1, curve_rows([9.0, 2.0]), state="running")
    study.add({"gate": "hash"}, 2, [train_row(10)])
    study.add({"gate": "hash"}, 3, None)
    summary = summarize_study(study.read())
    problems = {measure.cell.cell_id: measure.problem for measure in summary.left_out}
    metrics = study.folder / "cells/hash_seed-2/metrics.jsonl"
    missing = study.folder / "cells/hash_seed-3/metrics.jsonl"
    assert problems == {
        "remoe_seed-1": "failed: out of memory",
        "remoe_seed-2": "diverged: the held-out loss at the end is nan",
        "threshold_seed-3": "planned",
        "hash_seed-1": "running",
        "hash_seed-2": f"there is no row of kind eval with a loss in {metrics}",
        "hash_seed-3": f"there is no row of kind eval with a loss in {missing}",
    }
    found = {configuration.label: configuration for configuration in summary.configurations}
    assert found["remoe"].final_loss.n == 1 and found["remoe"].final_loss.mean == 3.09
    assert found["remoe"].comparison.seeds == (3,)
    assert math.isnan(found["remoe"].corrected_p) and verdict(found["remoe"]) == "-"
    assert found["threshold"].comparison.seeds == (1, 2)
    # The only comparison with a p-value needs no correction.
    assert found["threshold"].corrected_p == found["threshold"].comparison.p_value
    assert found["hash"].final_loss.n == 0 and found["hash"].comparison.n == 0
    text = summary_text(summary)
    assert "Too few common seeds for a test, which needs 2: hash; remoe." in text
    assert "remoe_seed-1" in text and "failed: out of memory" in text


def test_worse_configuration_is_higher(tmp_path):
    study = StudyFolder(tmp_path, ["gate"], {"gate": "topk"})
    for seed in (1, 2, 3):
        study.add({"gate": "topk"}, seed, curve_rows([9.0, 3.0 + 0.01 * seed]))
        study.add({"gate": "remoe"}, seed, curve_rows([9.0, 4.0 + 0.011 * seed]))
    assert verdict(by_label(study.read())["remoe"]) == "higher"


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [(900, "900"), (9_000, "9,000"), (20_000, "20 k"), (12_345_678, "12 M"), (5e10, "50 G")],
)
def test_budgets_are_shown_in_short(tmp_path, tokens, shown):
    study = StudyFolder(tmp_path, ["gate"], {"gate": "topk"})
    rows = [train_row(1, consumed_tokens=tokens, flops_per_token=1e9)]
    rows.append(eval_row(1, 3.0) | {"consumed_tokens": tokens})
    study.add({"gate": "topk"}, 1, rows)
    text = summary_text(summarize_study(study.read()))
    assert f"at {shown} tokens  " in text


def test_runs_without_flops_have_no_such_column(tmp_path):
    """Files of versions that did not log them; the times are there."""
    study = StudyFolder(tmp_path, ["gate"], {})
    rows = [row | {} for row in curve_rows([9.0, 3.0])]
    for row in rows:
        row.pop("flops_per_token", None)
    study.add({"gate": "topk"}, 1, rows)
    text = summary_text(summarize_study(study.read()))
    assert "at 1,000 tokens" in text and " s of training" in text and " FLOP " not in text


def test_one_seed_has_a_loss_and_no_test(tmp_path):
    study = StudyFolder(tmp_path, ["gate"], {"gate": "topk"})
    study.add({"gate": "topk"}, 1, curve_rows([9.0, 3.0]))
    study.add({"gate": "remoe"}, 1, curve_rows([9.0, 2.5]))
    found = by_label(study.read())
    assert found["remoe"].comparison.difference == -0.5
    assert math.isnan(found["remoe"].comparison.p_value)
    assert math.isnan(found["remoe"].detectable)
    text = summary_text(summarize_study(study.read()))
    assert "Too few common seeds" in text and "finds a difference" not in text


def test_each_group_has_its_baseline(tmp_path):
    """Gates at two numbers of experts: each is compared with topk at its own number."""
    study = StudyFolder(tmp_path, ["gate", "experts"], {"gate": "topk"})
    draw = random.Random(3)
    losses = {}
    for gate in ("topk", "remoe"):
        for experts in ("16", "64"):
            for seed in (1, 2, 3):
                loss = draw.uniform(2, 3)
                losses[gate, experts, seed] = loss
                rows = curve_rows([9.0] * (2 if experts == "16" else 3) + [loss])
                study.add({"gate": gate, "experts": experts}, seed, rows)
    summary = summarize_study(study.read())
    assert [group.label for group in summary.groups] == ["16", "64"]
    # The cells of the file are in another order than the groups: 3,000 and 2,000 tokens.
    assert [group.equal_positions["tokens"] for group in summary.groups] == [2000.0, 3000.0]
    for group in summary.groups:
        for found in group.configurations:
            assert found.label == f"{found.axes['gate']}, {group.label}"
            if found.axes["gate"] == "remoe":
                expected = np.mean(
                    [
                        losses["remoe", group.label, seed] - losses["topk", group.label, seed]
                        for seed in (1, 2, 3)
                    ]
                )
                assert found.comparison.difference == pytest.approx(expected)
    assert "Held-out loss at the end of training: 64" in summary_text(summary)


@pytest.mark.parametrize(
    ("baseline", "note"),
    [
        ({}, "declares no baseline"),
        ({"gate": "hash"}, "No cell of the baseline belongs"),
        ({"gate": "topk"}, "Only the baseline belongs to this group"),
    ],
)
def test_study_without_baseline_compares_nothing(tmp_path, baseline, note):
    study = StudyFolder(tmp_path, ["gate"], baseline)
    study.add({"gate": "topk"}, 1, curve_rows([9.0, 3.0]))
    study.add({"gate": "topk"}, 2, curve_rows([9.0, 3.0]))
    summary = summarize_study(study.read())
    assert summary.configurations[0].comparison is None
    assert math.isnan(summary.pooled_std)
    assert note in summary_text(summary)


def test_study_without_cells_is_empty(tmp_path):
    study = StudyFolder(tmp_path, ["gate"], {})
    text = write_summary(study.read(), tmp_path)
    assert text == (
        "Study study: 0 configurations; 0 of 0 cells have a held-out loss (rows of kind eval).\n"
    )
    assert (tmp_path / "summary.csv").read_text() == ""


def test_routing_is_averaged_at_the_end(tmp_path):
    """Steps 41 to 50 of 50 are the last fifth: the rows at 45 and 50, and not that at 40."""
    study = StudyFolder(tmp_path, ["gate"], {})
    violations = [9, 8, 7, 6, 5, 4, 3, 2, 1, 4]
    rows = [
        train_row(5 * i, max_violation=violation, step_time_ms=100.0 * i)
        for i, violation in enumerate(violations, 1)
    ]
    study.add({"gate": "topk"}, 1, [*rows, eval_row(50, 2.0, kind="test")])
    measures = CellMeasures.of(study.read().cells[0], "test")
    assert measures.routing["max_violation"] == 2.5
    assert math.isnan(measures.routing["load_cv"])
    assert measures.final_loss == 2.0
    assert measures.step_times_ms == tuple(100.0 * i for i in range(2, 11))


def test_routing_counts_the_steps_of_each_row(tmp_path):
    """As the experts per token do: a row stands for the steps since the one before it.

    After the last row come 10 steps without one: the last fifth of 100 begins after step 80.
    """
    study = StudyFolder(tmp_path, ["gate"], {})
    rows = [
        train_row(i, max_violation=v, experts_per_token=v)
        for i, v in ((72, 9.0), (84, 1.0), (90, 4.0))
    ]
    study.add({"gate": "topk"}, 1, [*rows, eval_row(100, 2.0)])
    measures = CellMeasures.of(study.read().cells[0], "eval")
    expected = (12 * 1.0 + 6 * 4.0) / 18
    assert measures.routing["max_violation"] == pytest.approx(expected)
    assert experts_by_layer(rows, 1, 80) == pytest.approx([expected])


def test_axes_named_like_columns_keep_their_labels(tmp_path):
    """In both CSV files; the columns of measures stay what they are."""
    axes = {"tokens": "few", "loss": "mse", "gate": "topk"}
    study = StudyFolder(tmp_path, list(axes), {})
    study.add(axes, 1, curve_rows([9.0, 3.0]))
    write_summary(study.read(), tmp_path)
    with (tmp_path / "cells.csv").open() as file:
        (cell,) = csv.DictReader(file)
    assert (cell["axis_tokens"], cell["axis_loss"], cell["gate"]) == ("few", "mse", "topk")
    assert (float(cell["tokens"]), float(cell["loss"])) == (1000.0, 3.0)
    with (tmp_path / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["tokens"], row["axis_loss"], float(row["loss"])) == ("few", "mse", 3.0)


def test_step_times_are_quartiles_of_all_seeds(tmp_path):
    study = StudyFolder(tmp_path, ["gate"], {})
    times = {1: [999.0, 20.0, 30.0], 2: [888.0, 40.0, 70.0]}
    for seed, times_ms in times.items():
        rows = [train_row(i, step_time_ms=ms) for i, ms in enumerate(times_ms, 1)]
        study.add({"gate": "topk"}, seed, [*rows, eval_row(3, 1.0)])
    (found,) = summarize_study(study.read()).configurations
    low, median, high = np.quantile([20, 30, 40, 70], [0.25, 0.5, 0.75])
    assert found.step_time_ms == Quartiles(median, low, high)
    assert math.isnan(Quartiles.of([]).median)


def test_resumed_cell_counts_repeated_steps_once(tmp_path):
    """The evaluation of the killed attempt does not count."""
    study = StudyFolder(tmp_path, ["gate"], {})
    rows = curve_rows([9.0, 5.0, 7.0])
    resumed = [{"kind": "run", "iteration": 10}, train_row(20), eval_row(20, 3.0)]
    study.add({"gate": "topk"}, 1, rows + resumed)
    measures = CellMeasures.of(study.read().cells[0], "eval")
    assert measures.held_out.value_R.tolist() == [9.0, 5.0, 3.0]
    assert measures.held_out.tokens_R.tolist() == [0.0, 1000.0, 2000.0]


def test_mismatches_and_tuning_are_declared(tmp_path):
    match = MatchRule({"gate": "topk"}, active_tolerance=0.05)
    study = StudyFolder(tmp_path, ["gate"], {"gate": "topk"}, match=match)
    tuning = {"flag": "moe-loss-coeff", "value": 0.01, "seed": 1}
    tuning["losses"] = {"0.001": 3.25, "0.01": 3.0, "0.1": None}
    for seed in (1, 2):
        rows = curve_rows([9.0, 3.0 + 0.1 * seed])
        study.add({"gate": "topk"}, seed, rows, active_parameters=500.0, tuning=tuning)
        study.add({"gate": "threshold"}, seed, rows, active_parameters=600.0)
    text = summary_text(summarize_study(study.read()))
    assert "Not matched: threshold: active parameters 600 against 500 (20.0% apart" in text
    assert text.count("Not matched") == 1
    assert "would be matched" not in text  # The flags of these cells name no experts.
    lines = [line for line in text.splitlines() if "--moe-loss-coeff" in line]
    (line,) = lines
    assert line.split(maxsplit=4)[:4] == ["topk", "--moe-loss-coeff", "0.01", "1"]
    assert "0.001: 3.2500, 0.01: 3.0000, 0.1: failed" in line


@pytest.mark.parametrize(
    ("means", "advice"),
    [
        (
            (4.0, 5.0),
            "At its measured 5.00 experts per token, threshold would be matched with 20 ",
        ),
        ((None, 5.0), ""),  # The reference has not finished.
        ((4.0, 1e6), ""),  # No experts are that narrow.
    ],
)
def test_mismatch_says_what_would_match(tmp_path, means, advice):
    """4 of 16 experts of width 128 have the hidden units of 5 of 20 of width 102."""
    match = MatchRule({"gate": "topk"}, active_tolerance=0.05)
    study = StudyFolder(tmp_path, ["gate"], {"gate": "topk"}, match=match)
    flags = {"num-experts": 16, "moe-ffn-hidden-size": 128}
    for gate, mean, active in zip(("topk", "threshold"), means, (500.0, 600.0), strict=True):
        values = {"experts_per_token": mean, "active_parameters": active, "flags": flags}
        study.add({"gate": gate}, 1, curve_rows([9.0, 3.0]), **values)
    text = summary_text(summarize_study(study.read()))
    assert "Not matched: threshold" in text
    if advice:
        assert f"{advice}experts of width 102." in text
    else:
        assert "would be matched" not in text


def test_written_files_agree(study, tmp_path):
    """The same numbers in text, Markdown, JSON and CSV; JSON without NaN."""
    study.add({"gate": "hash"}, 1, curve_rows([9.0]), state="failed", error="a | b")
    text = write_summary(study.read(), tmp_path)
    assert text == (tmp_path / "summary.txt").read_text()
    found = by_label(study.read())
    content = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    stored = {c["label"]: c for c in content["groups"][0]["configurations"]}
    assert stored["remoe"]["final_loss"]["mean"] == found["remoe"].final_loss.mean
    assert stored["remoe"]["loss_by_seed"] == {"1": 3.11, "2": 3.12, "3": 3.09}
    assert stored["hash"]["final_loss"]["mean"] is None
    assert content["left_out"] == {"hash_seed-1": "failed: a | b"}
    with (tmp_path / "summary.csv").open() as file:
        rows = {row["gate"]: row for row in csv.DictReader(file)}
    assert float(rows["threshold"]["p_holm"]) == found["threshold"].corrected_p
    assert float(rows["threshold"]["loss_std"]) == found["threshold"].final_loss.std
    assert rows["topk"]["difference"] == "" and rows["topk"]["is_baseline"] == "True"
    assert float(rows["topk"]["load_cv"]) == pytest.approx(0.2)
    with (tmp_path / "cells.csv").open() as file:
        cells = {row["cell"]: row for row in csv.DictReader(file)}
    assert len(cells) == 10
    assert float(cells["remoe_seed-2"]["loss"]) == 3.12
    assert float(cells["remoe_seed-2"]["flops"]) == 20_000.0
    assert cells["hash_seed-1"]["loss"] == "" and cells["hash_seed-1"]["left_out"]
    markdown = (tmp_path / "summary.md").read_text()
    assert "| threshold | 3 | 3.0000 ± 0.0500 |" in markdown
    assert "failed: a \\| b" in markdown
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_summary_cannot_be_written(study):
    with pytest.raises(OSError, match="summary.txt"):
        write_summary(study.read(), study.folder / "study.json")
