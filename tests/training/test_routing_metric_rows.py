"""Rows of training runs with and without routing metrics."""

import math
from pathlib import Path

import pytest

from helpers import runs

PARTS = {"attention", "routed_experts", "router", "dense_ffn", "norms", "embedding"}
DETAILS = {
    "gate_mass_cv",
    "router_entropy",
    "choice_margin",
    "near_tie_fraction",
    "router_input_rms",
    "router_input_p99",
}
COUNTS = {
    "load_min_over_mean",
    "load_cv",
    "max_violation",
    "dead_expert_fraction",
    "load_entropy",
    "rank_rows_max_over_mean",
    "experts_per_token_p10",
    "experts_per_token_p50",
    "experts_per_token_p90",
    "experts_per_token_p99",
}


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory, ranks2):
    """A run of 5 steps that logs every 2, with routing metrics and without."""
    folders = {}
    for name, more in (("on", ()), ("off", ("--no-routing-metrics",))):
        folders[name] = tmp_path_factory.mktemp(name)
        argv = runs.flags(data, folders[name], 5, *runs.EP2, "--log-interval", "2", *more)
        argv += ["--lr-warmup-fraction", "0.5", "--eval-interval", "5"]
        ranks2.run(runs.train, argv, timeout=300)
    return folders


def test_rows_have_routing_metrics(measured):
    """In the training and in evaluations; the last interval is shorter."""
    rows = runs.metrics(measured["on"])
    assert [row["iteration"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert COUNTS | DETAILS | {"max_violation_batch"} <= row.keys()
        norms = [row[f"grad_norm/{part}"] for part in PARTS]
        assert math.hypot(*norms) == pytest.approx(row["grad_norm"], rel=1e-5)
        (loads,), (masses,) = row["load_by_expert"], row["gate_mass_by_expert"]
        rounding = 4 * 5e-5  # 4 experts, 4 significant digits
        assert sum(loads) == pytest.approx(1, abs=rounding)
        assert sum(masses) == pytest.approx(1, abs=rounding)
        assert max(loads) * 4 - 1 == pytest.approx(row["max_violation"], abs=rounding)
        assert 0 < row["router_entropy"] < math.log(4)
        assert row["max_violation_batch"] >= row["max_violation"] - 1e-6
    for row in runs.metrics(measured["on"], "eval"):
        assert row.keys() >= COUNTS | DETAILS and len(row["load_by_expert"][0]) == 4
        assert "max_violation_batch" not in row


def test_metrics_change_no_result(measured):
    """And without them the rows have the others, with the same values."""
    for kind in ("train", "eval", "test"):
        pairs = zip(
            runs.metrics(measured["on"], kind), runs.metrics(measured["off"], kind), strict=True
        )
        for on, off in pairs:
            added = on.keys() - off.keys()
            assert added >= COUNTS | DETAILS and off.keys() < on.keys()
            timed = {"tokens_per_s", "tflops_per_s", "step_time_ms", "elapsed_s"}
            assert all(on[name] == off[name] for name in off.keys() - timed)
            assert not any(name.startswith("grad_norm/") for name in off)


GATE = """
import torch

from megatron.moe import Gate, Routing


class FirstGate(Gate, name="first"):
    \"\"\"Assigns every token to expert 0.\"\"\"

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()

    @classmethod
    def experts_per_token(cls, config, num_experts):
        return 1, 1

    def forward(self, inp):
        num_tokens = len(inp.x_TD)
        weight_T = torch.nn.functional.linear(inp.x_TD.float(), self.router.weight)[:, 0]
        token_T = torch.arange(num_tokens)
        return Routing(token_T, torch.zeros_like(token_T), weight_T, weight_T.new_zeros(()))
"""


def test_persistent_loads_are_logged(data, tmp_path: Path, ranks1):
    """Once, after five lines, by name; the gate hands over no scores."""
    path = tmp_path / "first.py"
    path.write_text(GATE)
    argv = runs.with_gate(runs.flags(data, tmp_path, 7), "--gate", "first")
    argv += ["--gate-path", str(path), "--lr-warmup-fraction", "0.5"]
    (lines,) = ranks1.run(runs.logged_train, argv, timeout=300)
    named = [line for line in lines if line.startswith("layer 0:")]
    assert named == [
        "layer 0: experts 1 2 3 had no token for 5 log lines",
        "layer 0: expert 0 had more than 3 times the mean load for 5 log lines",
    ]
    row = runs.metrics(tmp_path)[-1]
    assert row["dead_expert_fraction"] == 0.75 and row["max_violation"] == 3
    assert "choice_margin" not in row and row["gate_mass_by_expert"] == [[1, 0, 0, 0]]
