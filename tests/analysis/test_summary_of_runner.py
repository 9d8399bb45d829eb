"""The summary of what the runner of studies leaves behind, with a stand-in for the training."""

from __future__ import annotations

import json

import pytest

from helpers.studies import run_study
from megatron.analysis.compare.seed_statistics import SeedStatistics, compare_pairs
from megatron.analysis.compare.study_summary import summarize_study
from megatron.analysis.compare.summary import write_summary

TUNED = {"where": {"gate": "topk"}, "flag": "moe-loss-coeff", "values": [0.01, 0.3], "seed": 1}


def test_runner_and_summary_agree(tmp_path, monkeypatch):
    """Held-out losses, tuned values, failures and mismatches arrive in the summary."""
    monkeypatch.setenv("FAKE_FAIL", "gate-xmoe_seed-2")
    monkeypatch.setenv("FAKE_EXPERTS", "3.5")
    _, results = run_study(
        tmp_path,
        seeds=[1, 2, 3],
        baseline="topk",
        match={"reference": "topk", "tolerance": 0.05},
        tune=TUNED,
    )
    text = write_summary(results, tmp_path)
    summary = summarize_study(results)
    topk, xmoe = summary.configurations
    losses = {}
    for cell in results:
        losses.setdefault(cell.axes["gate"], {})[cell.seed] = cell.held_out_loss
    assert topk.loss_by_seed == losses["topk"]
    assert topk.final_loss == SeedStatistics.of(list(losses["topk"].values()))
    assert losses["xmoe"].pop(2) is None
    assert xmoe.comparison == compare_pairs(losses["xmoe"], losses["topk"])
    assert xmoe.comparison.seeds == (1, 3)
    (left_out,) = summary.left_out
    assert left_out.cell.cell_id == "gate-xmoe_seed-2"
    assert left_out.problem.startswith("failed: ")
    assert topk.tuning["flag"] == "moe-loss-coeff"
    assert f"--moe-loss-coeff  {topk.tuning['value']:>6}" in text
    assert xmoe.computing_experts == pytest.approx(3.5)
    assert "Not matched: xmoe: active parameters" in text
    # 2 of 4 experts of width 32 are 3.5 of 7 of width 18.
    assert "would be matched with 7 experts of width 18" in text
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored["left_out"] == {"gate-xmoe_seed-2": left_out.problem}
