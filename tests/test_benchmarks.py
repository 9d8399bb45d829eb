"""The benchmarks' own arithmetic: interleaving, ratios, bars, JSON."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report


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
