"""Reports: the data of their charts equal the rows of the runs; missing metrics; size; the tool."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.programs import one_line_error, run
from helpers.report_runs import SEQUENCE, eval_row, rows_of_run, start_row, train_row, write_run
from megatron.analysis.report import maps
from megatron.analysis.report.history import LayerHistory, ListHistory
from megatron.analysis.report.report import ReportOptions, report_html, write_report
from megatron.analysis.report.runs import KindRows, ReportRun, read_run
from megatron.analysis.report.shown_metrics import BALANCE, OPTIMIZATION, PROBE_METRICS
from megatron.analysis.report.sources import RunSource, find_runs

REPO = Path(__file__).resolve().parents[3]
ROUNDED = 5e-5
"""Largest relative error of five significant digits"""


def data_of(page):
    """Parse the data that a page embeds."""
    (text,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', page)
    data = json.loads(text)
    for blocks in data["datasets"].values():
        for block in blocks:
            if "shared" in block:
                block["columns"] |= data["shared"][block["shared"]]
    return data


def report_of(tmp_path, *rows_of_runs):
    """Write runs, and return the HTML of their report."""
    folders = [write_run(tmp_path / f"run{i}", rows) for i, rows in enumerate(rows_of_runs)]
    runs = [read_run(source, 200) for source in find_runs(map(str, folders))]
    return report_html(runs, ReportOptions())


def test_curves_of_one_run_equal_its_rows(tmp_path):
    rows = rows_of_run(3)
    data = data_of(report_of(tmp_path, rows))
    train = [row for row in rows if row["kind"] == "train"]
    (block,) = data["datasets"]["curve-loss"]
    assert block["constants"] == {"group": "run0", "kind": "train"}
    columns = block["columns"]
    np.testing.assert_allclose(columns["mean"], [row["loss"] for row in train], rtol=ROUNDED)
    assert columns["iteration"] == [row["iteration"] for row in train]
    assert columns["tokens"] == [row["consumed_tokens"] for row in train]
    np.testing.assert_allclose(
        columns["flops"], [6e7 * row["consumed_tokens"] for row in train], rtol=ROUNDED
    )
    minutes = np.cumsum([row["step_time_ms"] * 10 for row in train]) / 60_000
    np.testing.assert_allclose(columns["time"], minutes, rtol=ROUNDED)
    assert data["settings"]["positions"]["time"] == "training time, minutes"
    for metric in ("load_cv", "max_violation", "router_entropy", "grad_norm", "tokens_per_s"):
        (block,) = data["datasets"][f"curve-{metric}"]
        expected = [row[metric] for row in train]
        np.testing.assert_allclose(block["columns"]["mean"], expected, rtol=ROUNDED)


def test_held_out_curves_have_every_set(tmp_path):
    rows = rows_of_run(3)
    data = data_of(report_of(tmp_path, rows))
    blocks = data["datasets"]["held-out-loss"]
    assert [block["constants"]["kind"] for block in blocks] == ["eval", "eval/code", "test"]
    for block in blocks:
        expected = [row for row in rows if row["kind"] == block["constants"]["kind"]]
        np.testing.assert_allclose(
            block["columns"]["mean"], [row["loss"] for row in expected], rtol=ROUNDED
        )
        assert block["columns"]["tokens"] == [row["iteration"] * SEQUENCE for row in expected]


def test_seeds_are_one_group_with_a_band(tmp_path):
    many = [rows_of_run(seed) for seed in (1, 2, 3)]
    data = data_of(report_of(tmp_path, *many))
    (block,) = data["datasets"]["curve-loss"]
    assert block["constants"]["group"] == "topk"
    losses = np.array([[r["loss"] for r in rows if r["kind"] == "train"] for rows in many])
    columns = block["columns"]
    np.testing.assert_allclose(columns["mean"], losses.mean(axis=0), rtol=ROUNDED)
    spread = losses.std(axis=0, ddof=1)
    np.testing.assert_allclose(columns["high"], losses.mean(axis=0) + spread, rtol=ROUNDED)
    np.testing.assert_allclose(columns["least"], losses.min(axis=0), rtol=10 * ROUNDED)
    assert columns["seeds"] == [3] * 20
    final = [b for b in data["datasets"]["final-loss"] if b["constants"]["kind"] == "test"]
    tests = [rows[-1]["loss"] for rows in many]
    assert final[0]["columns"]["mean"] == pytest.approx([np.mean(tests)], rel=ROUNDED)
    assert final[1]["columns"] == {
        "value": pytest.approx(tests, rel=ROUNDED),
        "seed": [1, 2, 3],
    }


def test_evaluations_have_the_maps_of_many_experts(tmp_path):
    """Training rows of models with many experts have no tables."""
    rows = rows_of_run(3)
    train = [row for row in rows if row["kind"] == "train"]
    tables = {
        name: [row.pop(name) for row in train]
        for name in ("load_by_expert", "gate_mass_by_expert")
    }
    evaluations = [row for row in rows if row["kind"] == "eval"]
    for number, row in enumerate(evaluations):
        row |= {name: values[number] for name, values in tables.items()}
    data = data_of(report_of(tmp_path, rows))
    for name, metric in (("load", "load_by_expert"), ("gate-mass", "gate_mass_by_expert")):
        for layer, grid in enumerate(data["datasets"][name]):
            expected = 4 * np.array([row[metric][layer] for row in evaluations])
            found = np.reshape(grid["cells"]["relative"], (len(evaluations), 4))
            np.testing.assert_allclose(found, expected, rtol=5e-3)
            assert grid["along"]["end"] == [row["iteration"] for row in evaluations]


def test_maps_and_histograms_equal_the_rows(tmp_path):
    rows = rows_of_run(3)
    data = data_of(report_of(tmp_path, rows))
    train = [row for row in rows if row["kind"] == "train"]
    for name, metric in (("load", "load_by_expert"), ("gate-mass", "gate_mass_by_expert")):
        assert len(data["datasets"][name]) == 2
        for layer, grid in enumerate(data["datasets"][name]):
            assert grid["constants"] == {"run": "0", "layer": str(layer)}
            expected = 4 * np.array([row[metric][layer] for row in train])
            found = np.reshape(grid["cells"]["relative"], (20, 4))
            np.testing.assert_allclose(found, expected, rtol=5e-3)
            assert grid["along"]["end"] == [row["iteration"] for row in train]
    (histogram,) = data["datasets"]["histogram"]
    assert histogram["columns"] == {"experts": [1, 2, 3, 4], "share": [0.3, 0.4, 0.2, 0.1]}
    (by_layer,) = data["datasets"]["experts-by-layer"]
    assert by_layer["columns"]["value"] == pytest.approx(
        train[-1]["experts_per_token_by_layer"], rel=1e-4
    )
    (over_time,) = data["datasets"]["histogram-map"]
    assert over_time["down"] == {"experts": [1, 2, 3, 4]}
    assert over_time["cells"]["share"][:4] == [0.3, 0.4, 0.2, 0.1]


def test_probe_curves_equal_the_rows(tmp_path):
    rows = rows_of_run(3)
    page = report_of(tmp_path, rows)
    data = data_of(page)
    probes = [row for row in rows if row["kind"] == "probe"]
    assert [row["iteration"] for row in probes] == [0, 50, 100, 150, 200]
    for metric in PROBE_METRICS:
        (block,) = data["datasets"][f"curve-{metric}"]
        assert block["constants"] == {"group": "run0", "kind": "probe"}
        columns = block["columns"]
        assert columns["iteration"] == [row["iteration"] for row in probes]
        expected = [row.get(metric, np.nan) for row in probes]
        found = np.array(columns["mean"], dtype=float)
        np.testing.assert_allclose(found, expected, rtol=ROUNDED)
    assert "Changes of the routing" in page
    without = report_of(tmp_path / "old", [row for row in rows if row["kind"] != "probe"])
    assert "Changes of the routing" not in without
    assert "routing_churn" in re.search("no run has recorded it: (.*?)</p>", without)[1]


def test_loads_without_gate_masses_have_one_wide_map(tmp_path):
    rows = [
        {name: value for name, value in row.items() if name != "gate_mass_by_expert"}
        for row in rows_of_run(3)
    ]
    page = report_of(tmp_path, rows)
    assert "gate-mass" not in data_of(page)["charts"]
    assert '<figure class="chart wide">\n<figcaption>Load by expert' in page


def test_every_chart_has_its_place_and_data(tmp_path):
    page = report_of(tmp_path, rows_of_run(1), rows_of_run(1, "remoe"))
    data = data_of(page)
    places = re.findall(r'class="plot" id="([^"]+)"', page)
    assert sorted(places) == sorted(data["charts"]) and len(set(places)) == len(places)
    for spec in data["charts"].values():
        assert spec["data"]["name"] in data["datasets"]
        assert spec["width"] == "container" and "config" not in spec


def test_old_metrics_leave_sections_out(tmp_path):
    """Runs of version 0.1.0 have other names, no loads, no FLOPs and no row of kind run."""
    path = REPO / "tests/checkpoint/versions/1/metrics.jsonl"
    (tmp_path / "old").mkdir()
    shutil.copy(path, tmp_path / "old")
    write_report(find_runs([str(tmp_path / "old")]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "curve-loss" in data_of(page)["charts"]
    assert "flops" not in data_of(page)["settings"]["positions"]
    assert '<option value="flops" disabled>training FLOPs (not recorded)</option>' in page
    assert "<h2>Load of the experts" not in page and "<h2>Commands" not in page
    left_out = re.search(r"Left out, because no run has recorded it: ([^<]*)\.<", page)[1]
    assert {"load_by_expert", "load_cv", "router_entropy"} <= set(left_out.split(", "))


def test_nan_losses_are_gaps_and_problems(tmp_path):
    rows = rows_of_run(1)
    rows[3]["loss"] = float("nan")
    page = report_of(tmp_path, rows)
    (block,) = data_of(page)["datasets"]["curve-loss"]
    places = [row["iteration"] for row in rows if row["kind"] == "train"]
    assert block["columns"]["mean"][places.index(rows[3]["iteration"])] is None
    assert block["columns"]["mean"].count(None) == 1
    assert "1 of 1 runs need attention" in page
    assert "The training loss is not a number in 1 of 20 rows" in page


def test_losses_that_are_never_a_number_are_not_missing(tmp_path):
    rows = rows_of_run(1)
    for row in rows:
        if "loss" in row:
            row["loss"] = float("nan")
    page = report_of(tmp_path, rows)
    assert "curve-loss" not in data_of(page)["charts"]
    assert "Left out, because it is not a number in any row: loss." in page
    missing = re.search(r"no run has recorded it: ([^<]*)\.<", page)[1]
    assert "loss" not in missing.split(", ")


def test_step_times_count_rows(tmp_path):
    """And not runs, as the interval of a final loss does."""
    data = data_of(report_of(tmp_path, rows_of_run(1), rows_of_run(1, "remoe")))
    (first, _) = data["datasets"]["step-time"]
    assert first["columns"]["count"] == [20]
    for chart, counted in (("step-time", "training rows"), ("final-loss", "runs")):
        tooltips = data["charts"][chart]["layer"][2]["encoding"]["tooltip"]
        assert [t["title"] for t in tooltips if t["field"] == "count"] == [counted]


def test_runs_without_rows_are_listed(tmp_path):
    page = report_of(tmp_path, rows_of_run(1), [])
    assert "1 of 2 runs need attention" in page
    assert "<b>run1</b>: Its metrics file has no training row and no evaluation." in page
    assert len(data_of(page)["datasets"]["curve-loss"]) == 1


def test_report_without_any_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run has a training row or an evaluation"):
        report_of(tmp_path, [start_row(1)], [])


def test_run_with_evaluations_only_has_a_report(tmp_path):
    data = data_of(report_of(tmp_path, [eval_row(0, random.Random(1), "test")]))
    assert "curve-loss" not in data["charts"] and "held-out-loss" in data["charts"]


def test_few_points_are_visible(tmp_path):
    """A line of one point would show nothing; a single run needs no chart of its final loss."""
    few = [start_row(1), *(row for row in rows_of_run(1, iterations=40))]
    charts = data_of(report_of(tmp_path, few))["charts"]
    assert "final-loss" not in charts
    for chart in ("curve-loss", "held-out-loss"):
        opacities = [layer["mark"].get("opacity") for layer in charts[chart]["layer"]]
        assert opacities.count(1) == 1
    charts = data_of(report_of(tmp_path, rows_of_run(1, iterations=400)))["charts"]
    assert not [x for x in charts["curve-loss"]["layer"] if x["mark"].get("opacity") == 1]


def test_constant_metrics_have_no_chart(tmp_path):
    page = report_of(tmp_path, rows_of_run(1))
    assert "dropped_assignment_fraction (0)" in page
    assert "curve-dropped_assignment_fraction" not in data_of(page)["charts"]


def test_table_and_commands_are_exact(tmp_path):
    page = report_of(tmp_path, rows_of_run(7))
    assert "<td>12.3M</td><td>4M to 6M</td><td>819k</td><td>200</td>" in page
    final = [row for row in rows_of_run(7) if row["kind"] == "test"][-1]["loss"]
    assert f"<td>{final:.4f}</td>" in page
    command = "pretrain_gpt.py --gate topk --seed 7 --data &#x27;a b&#x27;&quot;&#x27;&quot;"
    assert f'<pre id="command-0" tabindex="0">{command}' in page


def test_names_are_escaped(tmp_path):
    folder = write_run(tmp_path / "<img src=x onerror=alert(1)>", rows_of_run(1))
    write_report(find_runs([str(folder)]), tmp_path / "r.html")
    assert "<img src=x onerror" not in (tmp_path / "r.html").read_text()


ALL_METRICS = (*BALANCE, *OPTIMIZATION, *(f"grad_norm/part {i}" for i in range(6)))


def large_rows(kind, metrics, interval, count, pace):
    """Return rows of metrics without a pattern, as they are hard to write in few characters."""
    rng = np.random.default_rng(0)
    iteration_R = interval * np.arange(1.0, count + 1)
    values = {name: rng.random(count) for name in metrics}
    seconds_R = pace * iteration_R
    return KindRows(kind, iteration_R, 4096 * iteration_R, 1e9 * seconds_R, seconds_R, values)


def large_run(number, seeds, pace):
    """Return a run with all metrics, 12 held-out sets and 12 layers of 1024 experts.

    Args:
        seeds: runs of a group.
        pace: seconds of a step.
    """
    rng = np.random.default_rng(0)
    label = f"topk, lr 0.0003, hidden_size 512, k {number // seeds}"
    source = RunSource(Path(f"runs/run{number}/metrics.jsonl"), f"run{number}", label)
    train = large_rows(
        "train", ["loss", "tokens_per_s", "step_time_ms", *ALL_METRICS], 10, 900, pace
    )
    train.values["loss"][77] = 1e4
    held_out = large_rows("eval", ["loss"], 100, 90, pace)
    kinds = ["eval", *(f"eval/set{i}" for i in range(11))]
    starts = 45.0 * np.arange(200)
    load_CE = rng.dirichlet(np.ones(1024), 200)
    loads = LayerHistory(starts, starts + 45, dict.fromkeys(range(12), load_CE))
    share_CN = rng.dirichlet(np.ones(300), 200)
    config = {"moe": {"gate": "topk", "num_experts": 1024}, "train": {"seed": number}}
    command = ["pretrain_gpt.py", *(f"--a-flag-of-this-length={i}" for i in range(50))]
    return ReportRun(
        source,
        train,
        {kind: dataclasses.replace(held_out, kind=kind) for kind in kinds},
        large_rows("probe", PROBE_METRICS, 100, 90, pace),
        starts=({**start_row(number), "config": config, "command": command},),
        config=config,
        loads=loads,
        gate_masses=loads,
        experts_per_token=ListHistory(starts, starts + 45, share_CN, share_CN[-1]),
        experts_per_token_by_layer=tuple(rng.random(12)),
    )


@pytest.mark.parametrize("seeds", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_hundred_large_runs_fit_in_five_megabytes(seeds):
    runs = [large_run(i, seeds, 1 + i / 977) for i in range(100)]
    page = report_html(runs, ReportOptions())
    assert 4_000_000 < len(page.encode()) < 5_000_000
    data = data_of(page)
    blocks = data["datasets"]["curve-loss"]
    assert len(blocks) == 100 / seeds
    assert all(max(block["columns"]["most"]) == 1e4 for block in blocks)
    assert "stands for up to" in page
    # Curves of few points are not smoothed at first.
    assert '<option value="0" selected>off' in page
    for chart in ("load", "gate-mass"):
        grids = data["datasets"][chart]
        assert len({grid["constants"]["run"] for grid in grids}) == 100
        assert all(len(grid["down"]["expert"]) == 64 for grid in grids)
    assert "Some of the MoE layers are left out." in page
    assert "A row is the mean of up to 16 neighbouring experts." in page
    assert "A row of the map has up to 16 neighbouring numbers of experts." in page


def test_report_of_few_cells_names_the_runs_of_its_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "EXPERT_CELLS", 2 * 128)
    monkeypatch.setattr(maps, "HISTOGRAM_CELLS", 2 * 128)
    page = report_of(tmp_path, *(rows_of_run(seed) for seed in (1, 2, 3)))
    data = data_of(page)
    assert [grid["constants"]["run"] for grid in data["datasets"]["load"]] == ["0", "0"]
    assert page.count("Maps are of 1 of 3 runs.") == 1
    assert page.count("Maps are of 2 of 3 runs.") == 1
    runs = r'<select id="histogram-run"><option value="0">run0</option><option value="1">run2<'
    assert re.search(runs, page)


def test_tool_writes_into_the_run(tmp_path):
    folder = write_run(
        tmp_path / "demo", [*rows_of_run(1)[:4], train_row(60, random.Random(0))]
    )
    done = run("tools/report.py", "demo", cwd=tmp_path)
    assert re.fullmatch(r"1 run -> demo/report.html \([\d.]+ MB\)\n", done.stdout)
    assert (folder / "report.html").stat().st_size > 500_000
    done = run("tools/report.py", "A=demo", cwd=tmp_path)
    assert done.stdout.startswith("1 run -> demo/report.html (")
    done = run("tools/report.py", "A=demo", "none", cwd=tmp_path, code=2)
    assert "none', which does not exist" in done.stderr + done.stdout
    assert not (tmp_path / "report.html").exists()


def test_tool_refuses_a_folder_as_output(tmp_path):
    write_run(tmp_path / "demo", rows_of_run(1))
    done = run("tools/report.py", "demo", "--output", "demo", cwd=tmp_path, code=2)
    assert "--output is 'demo', a folder" in one_line_error(done)
