"""The benchmarks' own arithmetic: interleaving, ratios, bars, JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

REPO = Path(__file__).resolve().parent.parent


def test_interleave_calls_in_turn_and_returns_one_time_per_round():
    calls = []
    seconds = report.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4 and {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3}
    assert all(s >= 0 for v in seconds.values() for s in v)


def test_ratios_are_taken_round_by_round():
    rows = report.compare({"base": [1.0, 10.0, 1.0, 1.0], "x": [2.0, 20.0, 3.0, 2.0]}, "base", {"x": 2.5})
    assert len(rows) == 1 and rows[0].ratio == 2.0 and rows[0].low == 2.0 and rows[0].high >= 2.0
    assert rows[0].holds and not report.Row("x", "b", 3, 3, 3, 2.5).holds
    assert report.Row("x", "b", 1, 1, 1).holds is None


@pytest.mark.parametrize("ratio, check, code", [(1.0, True, 0), (3.0, True, 1), (3.0, False, 0)])
def test_finish(ratio, check, code, tmp_path, capsys):
    argv = ["--json", str(tmp_path / "rows.json"), *(["--check"] if check else [])]
    args = report.parser("x").parse_args(argv)
    assert report.finish([report.Row("n", "b", ratio, ratio, ratio, 2.0)], args) == code
    assert ("holds" if ratio < 2 else "MISSED") in capsys.readouterr().out
    row = json.loads((tmp_path / "rows.json").read_text())[0]
    assert row["name"] == "n" and row["baseline"] == "b" and row["bar"] == 2.0 and row["holds"] == (ratio < 2)


def run_quickly(name: str, folder: Path) -> tuple[str, list[dict], Path]:
    """(what a benchmark prints, its rows, the folder of its temporary files)"""
    temp, rows = folder / "temp", folder / "rows.json"
    temp.mkdir()
    done = subprocess.run([sys.executable, str(REPO / "benchmarks" / name), "--quick", "--json", str(rows)],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "TMPDIR": str(temp)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(rows.read_text()), temp


@pytest.mark.slow
def test_data_index_quickly(tmp_path):
    """Every row is there, and nothing stays behind. Whether bars hold is not for a test on a busy machine."""
    printed, table, temp = run_quickly("data_index.py", tmp_path)
    assert "200,000 documents, 200,000,000 tokens: 195,312 samples" in printed
    assert all(words in printed for words in ("peak memory", "the dataset and", "first visit: median", "tokens/s"))
    assert [row["name"] for row in table] == [
        "open what is built", "a random sample, first visit", "a random sample, again"] + [
        f"100 micro-batches, {kind}" for kind in ("0 workers", "2 workers", "0 workers, resets")]
    assert all(row["bar"] == 1.0 and 0 < row["low"] <= row["ratio"] <= row["high"] for row in table)
    assert not [p for p in temp.iterdir() if (p / "big.idx").exists()]


@pytest.mark.slow
def test_preprocess_quickly(tmp_path):
    """Every row is there, both programs write the same, and nothing stays behind."""
    printed, table, temp = run_quickly("preprocess.py", tmp_path)
    assert "tokens equal byte for byte" in printed and not list(temp.iterdir())
    assert [(row["name"], row["bar"]) for row in table] == [
        ("tools/preprocess_data.py", None), ("time per byte, 8 MB", None), ("peak memory, 8 MB", None),
        ("tools/merge_datasets.py", None)]


def test_compute_that_ignores_demand_is_not_called_proportional():
    """What published code does: the same rows whatever tokens want. Nor is time that grows faster than demand."""
    from benchmarks.gate_cost import against_line

    experts = [2.0, 4.0, 8.0, 12.0]
    for times, holds in (([10.0] * 4, [False, False, True, False]), ([2.0, 4.0, 8.0, 12.0], [True] * 4),
                         ([2.3, 4.2, 8.0, 11.9], [True] * 4), ([k * k for k in experts], [False, False, False, True])):
        rows = against_line(experts, {f"{k}": [t, 2 * t, t] for k, t in zip(experts, times, strict=True)})
        assert [row.holds for row in rows] == holds, times
        assert all(row.ratio >= 1 and row.low == row.high for row in rows)


@pytest.mark.slow
def test_gate_cost_quickly(tmp_path):
    from megatron.moe.gates import available

    _, table, _ = run_quickly("gate_cost.py", tmp_path)
    names = [row["name"] for row in table]
    assert names[:12] == [f"{gate}: gate" for gate in available()] and all(row["ratio"] < 1 for row in table[:12])
    assert [row["bar"] for row in table[12:]] == [1.25] * 8 + [None, 0.65]
