"""Lists over a run's training in few columns: loads of experts, histograms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.analysis.report import maps
from megatron.analysis.report.groups import RunGroup
from megatron.analysis.report.history import LayerHistory, ListHistory
from megatron.analysis.report.runs import KindRows, ReportRun
from megatron.analysis.report.sources import RunSource

NO_ROWS = KindRows("train", np.empty(0), np.empty(0), None, None, {})

ITERATIONS = (10, 20, 30, 35, 50)


def load_rows(num_layers=2, num_experts=4, count=5):
    rng = np.random.default_rng(1)
    load_RLE = rng.random((count, num_layers, num_experts))
    load_RLE /= load_RLE.sum(axis=2, keepdims=True)
    rows = [
        {"iteration": 10 * (i + 1), "load_by_expert": load_RLE[i].tolist()}
        for i in range(count)
    ]
    return rows, load_RLE


def test_layer_history_means_its_rows():
    rows, load_RLE = load_rows()
    history = LayerHistory.of_rows(rows, "load_by_expert", 2)
    for layer in range(2):
        first = load_RLE[:2, layer].mean(axis=0)
        second = load_RLE[2:, layer].mean(axis=0)
        np.testing.assert_allclose(history.layers[layer], [first, second])
    assert history.start_C.tolist() == [0, 20] and history.end_C.tolist() == [20, 50]


def test_layer_without_the_metric_is_left_out():
    rows = [{"iteration": 1, "load_by_expert": [None, [0.5, 0.5], None, [0.1, 0.2, 0.7]]}]
    history = LayerHistory.of_rows(rows, "load_by_expert", 9)
    assert {layer: value.shape for layer, value in history.layers.items()} == {
        1: (1, 2),
        3: (1, 3),
    }


def test_rows_of_another_shape_are_left_out():
    rows = [
        {"iteration": 1, "load_by_expert": [[1.0]]},
        {"iteration": 2, "load_by_expert": [[0.5, 0.5]]},
    ]
    history = LayerHistory.of_rows(rows, "load_by_expert", 9)
    assert history.layers[0].tolist() == [[0.5, 0.5]] and history.end_C.tolist() == [2]


@pytest.mark.parametrize("value", [None, [], [None, None], [[]], "text"])
def test_history_of_nothing_is_none(value):
    rows = [{"iteration": 1, "load_by_expert": value}, {"iteration": 2}]
    assert LayerHistory.of_rows(rows, "load_by_expert", 9) is None
    assert ListHistory.of_rows(rows, "load_by_expert", 9) is None


def test_list_history_pads_shorter_lists():
    rows = [{"iteration": 5, "h": [1.0]}, {"iteration": 6, "h": [0.25, 0.25, 0.5]}]
    history = ListHistory.of_rows(rows, "h", 1)
    assert history.value_CN.tolist() == [[0.625, 0.125, 0.25]]
    assert history.last_N.tolist() == [0.25, 0.25, 0.5]


def test_load_grids_are_relative_to_the_mean():
    rows, load_RLE = load_rows()
    history = LayerHistory.of_rows(rows, "load_by_expert", 200)
    grids = maps.expert_maps([history], 10_000).blocks
    assert [grid["constants"] for grid in grids] == [
        {"run": "0", "layer": "0"},
        {"run": "0", "layer": "1"},
    ]
    for layer, grid in enumerate(grids):
        found = np.reshape(grid["cells"]["relative"], (5, 4))
        np.testing.assert_allclose(found, 4 * load_RLE[:, layer], rtol=5e-3)
        assert grid["along"] == {"start": [0, 10, 20, 30, 40], "end": [10, 20, 30, 40, 50]}


def test_large_load_grids_leave_out_columns_then_layers():
    rows, _ = load_rows(num_layers=10, num_experts=64, count=100)
    history = LayerHistory.of_rows(rows, "load_by_expert", 100)
    merged = maps.expert_maps([history], 64 * 10 * 20)
    assert len(merged.blocks) == 10 and merged.reductions == []
    assert {len(grid["along"]["start"]) for grid in merged.blocks} == {20}
    fewer = maps.expert_maps([history], 64 * 3 * maps.FEWEST_COLUMNS)
    assert [grid["constants"]["layer"] for grid in fewer.blocks] == ["0", "4", "9"]
    assert all("last" not in grid["down"] for grid in fewer.blocks)
    assert fewer.reductions == ["Some of the MoE layers are left out."]


def test_too_many_experts_are_merged():
    """Into rows of a power of two, the last of which may have fewer."""
    rows, load_RLE = load_rows(num_layers=3, num_experts=70, count=8)
    history = LayerHistory.of_rows(rows, "load_by_expert", 100)
    found = maps.expert_maps([history, history], 20 * maps.FEWEST_COLUMNS)
    grid, other = found.blocks
    assert other == {**grid, "constants": {"run": "1", "layer": "0"}}
    firsts = list(range(0, 70, 4))
    assert grid["down"] == {"expert": firsts, "last": [*range(3, 70, 4), 69]}
    shares = 70 * load_RLE[:, 0]
    expected = [[column[e : e + 4].mean() for e in firsts] for column in shares]
    relative = np.reshape(grid["cells"]["relative"], (8, 18))
    np.testing.assert_allclose(relative, expected, rtol=5e-3)
    assert found.reductions == [
        "Some of the MoE layers are left out.",
        "A row is the mean of up to 4 neighbouring experts.",
    ]


def test_maps_of_too_many_runs_are_left_out():
    runs = [ReportRun(RunSource(Path(str(i)), str(i)), NO_ROWS, {}) for i in range(9)]
    least = maps.FEWEST_COLUMNS * maps.FEWEST_ROWS
    assert maps.fitting_runs(runs, 9 * least) == runs
    chosen = maps.fitting_runs(runs, 5 * least)
    assert [run.name for run in chosen] == ["0", "2", "4", "6", "8"]
    assert maps.fitting_runs(runs, 0) == runs[:1]


def test_histogram_maps_merge_numbers_of_experts():
    """Nearly empty ends are left out; a merged row has the share of tokens of its numbers."""
    rng = np.random.default_rng(0)
    rows = []
    for iteration in (1, 2):
        share_N = np.zeros(200)
        share_N[30:150] = rng.dirichlet(np.ones(120) * 50)
        rows.append({"iteration": iteration, "h": share_N.tolist()})
    history = ListHistory.of_rows(rows, "h", 9)
    (grid,) = maps.histogram_maps([history], 120 * maps.FEWEST_COLUMNS).blocks
    assert grid["down"] == {"experts": list(range(30, 150))}
    found = maps.histogram_maps([history], 40 * maps.FEWEST_COLUMNS)
    (grid,) = found.blocks
    assert grid["down"]["experts"] == list(range(28, 150, 4))
    assert grid["down"]["last"] == [*range(31, 149, 4), 149]
    expected = [sum(row["h"][n : n + 4]) for row in rows for n in range(28, 150, 4)]
    np.testing.assert_allclose(grid["cells"]["share"], expected, rtol=5e-3)
    assert found.reductions == ["A row of the map has up to 4 neighbouring numbers of experts."]


def test_last_histograms_of_all_groups_have_the_same_rows(monkeypatch):
    """Of numbers of experts; otherwise their heights could not be compared."""
    monkeypatch.setattr(maps, "HISTOGRAM_POINTS", 2 * 16)
    groups = []
    for label, end in (("few", 3), ("many", 40)):
        last_N = np.full(end, 1 / end)
        history = ListHistory(np.zeros(1), np.ones(1), last_N[None], last_N)
        run = ReportRun(RunSource(Path(label), label), NO_ROWS, {}, experts_per_token=history)
        groups.append(RunGroup(label, (run,)))
    found = maps.last_histograms(groups)
    few, many = (block["columns"] for block in found.blocks)
    assert few == {"experts": [0], "last": [2], "share": [1]}
    assert many["experts"] == list(range(0, 40, 4)) and many["last"][-1] == 39
    assert many["share"] == [0.1] * 10
    assert found.reductions == ["A point is the sum over 4 neighbouring numbers of experts."]


def test_loads_of_an_unused_layer_are_missing():
    rows = [{"iteration": 1, "load_by_expert": [[0.0, 0.0]]}]
    history = LayerHistory.of_rows(rows, "load_by_expert", 9)
    (grid,) = maps.expert_maps([None, history], 100).blocks
    assert grid["constants"]["run"] == "1"
    assert grid["cells"]["relative"] == [None, None]
