"""Which values of a row are scalars, histograms and tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.training.metric_rows import (
    histograms,
    is_evaluation,
    multiples_of_mean,
    scalars,
    tables,
)

ROW = {
    "kind": "eval/wiki",
    "iteration": 3,
    "loss": 1.5,
    "skipped_steps": 2,
    "acc": np.float32(0.5),
    "nothing": None,
    "note": "text",
    "load_cv_by_layer": [0.25, None, 0.5],
    "experts_per_token_histogram": [0.0, 1.0],
    "load_by_expert": [[0.5, 0.5], None],
    "other_table": [[0.5, 0.5]],
    "coactivation_by_expert": [[[1.0]]],
}


def test_numbers_and_lists_of_them_are_scalars():
    assert dict(scalars(ROW)) == {
        "eval/wiki/loss": 1.5,
        "eval/wiki/skipped_steps": 2,
        "eval/wiki/acc": 0.5,
        "eval/wiki/load_cv_by_layer/0": 0.25,
        "eval/wiki/load_cv_by_layer/2": 0.5,
    }


def test_histograms_and_tables_are_known_by_name_and_depth():
    assert dict(histograms(ROW)) == {"eval/wiki/experts_per_token_histogram": [0.0, 1.0]}
    assert dict(tables(ROW)) == {"eval/wiki/load_by_expert": [[0.5, 0.5], None]}
    assert not list(histograms({"kind": "train", "experts_per_token_histogram": []}))


def test_rows_of_training_and_of_runs_are_no_evaluations():
    kinds = ["train", "run", "eval", "eval/wiki", "test", "eval_tasks"]
    assert [is_evaluation({"kind": kind}) for kind in kinds] == [False, False] + [True] * 4


def test_multiples_are_of_the_mean_of_routed_experts():
    """The shares of a layer with zero-computation experts add up to less than 1."""
    shares = [None, [0.1, 0.2, 0.3], [], [0.0, 0.0], [0.5, math.nan], [1.0, math.inf], [2.0]]
    found = {layer: multiples.tolist() for layer, multiples in multiples_of_mean(shares)}
    assert found == {1: pytest.approx([0.5, 1.0, 1.5]), 6: [1.0]}
