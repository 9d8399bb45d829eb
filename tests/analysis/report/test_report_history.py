"""Lists over a run's training in few columns: loads of experts, histograms."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.analysis.report import blocks
from megatron.analysis.report.history import LayerHistory, ListHistory

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
    grids = blocks.expert_grids(history, "0", 10_000)
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
    merged = blocks.expert_grids(history, "0", 64 * 10 * 20)
    assert len(merged) == 10 and {len(grid["along"]["start"]) for grid in merged} == {20}
    fewer = blocks.expert_grids(history, "0", 64 * 3 * blocks.FEWEST_COLUMNS)
    assert [grid["constants"]["layer"] for grid in fewer] == ["0", "4", "9"]


def test_loads_of_an_unused_layer_are_missing():
    rows = [{"iteration": 1, "load_by_expert": [[0.0, 0.0]]}]
    history = LayerHistory.of_rows(rows, "load_by_expert", 9)
    (grid,) = blocks.expert_grids(history, "0", 100)
    assert grid["cells"]["relative"] == [None, None]
