"""What the console shows of a row."""

from __future__ import annotations

import math
import re

from helpers.metric_rows import EVAL, TRAIN
from megatron.training.console_writer import ConsoleWriter


def test_console_formats_rows_in_columns(printed):
    writer = ConsoleWriter(1000, 1000 * 8192)
    writer.write(TRAIN)
    writer.write(EVAL)
    writer.write({"kind": "test", "iteration": 1000, "loss": 4.0})
    writer.close()
    assert printed().splitlines() == [
        "iteration   10/1000 | loss  5.12500 | aux 1.000e-02 | lr 3.000e-04 | "
        "grad norm   1.500 |    16,384 tokens/s | "
        "experts/token  3.00 (before capacity  3.25) | load max/mean   1.75 | dropped  1.25% | "
        "skipped   1 | elapsed 0:01:05 | left 0:08:15",
        "eval at   10/1000 | loss  4.00000 | perplexity     54.598 | elapsed 1:01:40",
        "test at 1000/1000 | loss  4.00000",
    ]


def test_console_names_nan_and_infinity(printed):
    """They are padded to the width of a number, so that columns stay aligned."""
    writer = ConsoleWriter(1000, 1000 * 8192)
    broken = {
        **TRAIN,
        "loss": math.nan,
        "grad_norm": math.inf,
        "aux_loss": -math.inf,
        "dropped_assignment_fraction": math.nan,
    }
    writer.write(TRAIN)
    writer.write(broken)
    good, bad = printed().splitlines()
    assert "| loss      NaN |" in bad
    assert "| grad norm Infinity |" in bad
    assert "| aux -Infinity |" in bad
    assert "| dropped    NaN |" in bad
    good_bars = [match.start() for match in re.finditer(r"\|", good)]
    bad_bars = [match.start() for match in re.finditer(r"\|", bad)]
    assert good_bars[:2] == bad_bars[:2]


def test_console_shows_experts_of_evaluated_layers(printed):
    """By layer in evaluations only."""
    row = {
        "kind": "eval",
        "iteration": 5,
        "loss": 1.0,
        "experts_per_token": 2.5,
        "experts_per_token_by_layer": [1.25, float("nan"), None],
    }
    ConsoleWriter(10, 80).write(row)
    ConsoleWriter(10, 80).write({**row, "kind": "train"})
    evaluation, training = printed().splitlines()
    assert evaluation.endswith("experts/token  2.50 | by layer 1.25  NaN    -")
    assert "by layer" not in training


def test_console_shows_changes_of_the_routing(printed):
    """The first probe has nothing to compare its choices with."""
    row = {"kind": "probe", "iteration": 5, "expert_similarity_mean": -0.01234}
    ConsoleWriter(10, 80).write(row)
    ConsoleWriter(10, 80).write({**row, "routing_churn": 0.0325, "router_saturation": 1.0})
    first, second = printed().splitlines()
    assert first.endswith("probe at  5/10 | expert similarity -0.0123")
    assert second.endswith("| churn  3.25% | saturation 100.00% | expert similarity -0.0123")


def test_console_leaves_the_description_of_the_run_out(printed):
    """The log has it in lines of its own."""
    ConsoleWriter(10, 80).write({"kind": "run", "iteration": 0, "config": {}})
    assert printed() == ""
