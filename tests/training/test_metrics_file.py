"""Reading metrics.jsonl: names of earlier versions, torn lines, values that are not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron.training.jsonl_writer import JsonlWriter
from megatron.training.metrics_file import current_name, read_metrics, without_repeated_steps

WRITTEN_BEFORE = Path(__file__).resolve().parents[1] / "checkpoint/versions/1"


def test_old_file_is_read_under_new_names():
    """The file was written by an earlier version; no value is lost, and no old name is left."""
    path = WRITTEN_BEFORE / "metrics.jsonl"
    rows = read_metrics(path)
    old_rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [4, 5, 6]
    for row, old in zip(rows, old_rows, strict=True):
        assert list(row.values()) == list(old.values())
        assert row["experts_per_token"] == old["experts_per_token_kept"] == 2.0
        assert row["experts_per_token_before_capacity"] == 2.0
        assert row["bias_changed_fraction_by_layer"] == old["moved_fraction_by_layer"]
        assert row["experts_per_token_histogram"] == [0.0, 0.0, 1.0]
        assert row["dropped_assignment_fraction"] == row["tokens_with_drops_fraction"] == 0.0
        assert not {name for name in row if "kept" in name or "wanted" in name}


def test_every_renamed_metric_has_its_new_name():
    renamed = {
        "experts_per_token_wanted": "experts_per_token_before_capacity",
        "experts_per_token_kept": "experts_per_token",
        "drop_fraction": "dropped_assignment_fraction",
        "lost_token_fraction": "tokens_with_drops_fraction",
        "kept_experts_histogram": "experts_per_token_histogram",
        "moved_fraction": "bias_changed_fraction",
        "local_fraction": "zero_computation_fraction",
    }
    for old, new in renamed.items():
        assert current_name(old) == current_name(new) == new
        assert current_name(f"{old}_by_layer") == f"{new}_by_layer"
    assert current_name("loss") == "loss"


def test_torn_lines_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    content = b'{"kind": "train", "iteration": 1}\n{"kind": "tra\n[1]\n\xff\n'
    path.write_bytes(content + b'{"kind": "eval", "iteration": 2}\n{"kin')
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2]
    path.write_bytes(b"")
    assert read_metrics(path) == []


def test_written_rows_are_read_back(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write({"kind": "train", "iteration": 1, "loss": math.nan, "grad_norm": math.inf})
    writer.close()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf


def curve(*points):
    return [{"kind": kind, "iteration": iteration} for kind, iteration in points]


def test_resumed_run_replaces_repeated_steps():
    """With the row of kind run, and without, as in files of earlier versions."""
    before = curve(
        ("run", 0), ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3)
    )
    after = curve(("run", 2), ("train", 3), ("train", 4), ("eval", 4))
    assert without_repeated_steps(before + after) == before[:-1] + after
    assert without_repeated_steps(before[1:] + after[1:]) == before[1:-1] + after[1:]


def test_restart_from_scratch_replaces_all():
    rows = curve(("eval", 0), ("train", 1), ("train", 2))
    again = curve(("run", 0), ("eval", 0), ("train", 1))
    assert without_repeated_steps(rows + again) == again
    assert len(without_repeated_steps(rows + rows)) == 4  # the evaluations at 0, once each
