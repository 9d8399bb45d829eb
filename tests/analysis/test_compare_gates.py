"""tools/compare_gates.py: plan, exit codes, killed and resumed studies, and real training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.studies import BASE, FAKE_PROGRAM, REPO, THRESHOLD, TOPK, write_study
from helpers.waiting import wait_until
from megatron.analysis.compare.cell_state import CellState
from megatron.analysis.compare.results import StudyResults
from megatron.training.metrics_file import read_metrics, without_repeated_steps

if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from tools import compare_gates  # noqa: E402

IDS = ["gate-topk_seed-1", "gate-xmoe_seed-1", "gate-topk_seed-2", "gate-xmoe_seed-2"]
"""In the order in which they run"""
WITH_FAKE = (
    "import pathlib, sys; from tools import compare_gates; "
    f"compare_gates.PROGRAM = pathlib.Path({str(FAKE_PROGRAM)!r}); "
    "sys.exit(compare_gates.main())"
)


@pytest.fixture
def fake(monkeypatch) -> None:
    monkeypatch.setattr(compare_gates, "PROGRAM", FAKE_PROGRAM)


def start(study: Path, out: Path, *more: str, code: str = WITH_FAKE) -> subprocess.Popen:
    """Start the tool as a program."""
    words = [sys.executable, "-c", code, str(study), "--output", str(out), *more]
    return subprocess.Popen(
        words, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def curves(out: Path) -> dict[str, list[dict]]:
    """Metrics of all cells that do not depend on the time."""
    found = {}
    for result in StudyResults.read(out):
        rows = without_repeated_steps(read_metrics(result.metrics_path))
        found[result.cell_id] = [
            {name: row.get(name) for name in ("kind", "iteration", "loss", "grad_norm")}
            for row in rows
            if row["kind"] != "run"
        ]
    return found


def kill_children(pid: int) -> None:
    """Kill the processes that a process has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children
    for child in children:
        os.kill(int(child), signal.SIGKILL)


# In this process, with the stand-in


def test_plan_is_printed_and_nothing_starts(tmp_path, capsys, fake):
    study = write_study(tmp_path)
    out = tmp_path / "out"
    assert compare_gates.main([str(study), "--output", str(out), "--plan"]) == 0
    printed = capsys.readouterr().out
    assert "study tiny: 4 cells, 4 runs" in printed
    assert "gate=xmoe" in printed and "~24.90 K" in printed
    assert not out.exists()


def test_plan_refuses_what_a_start_refuses(tmp_path, capsys, fake):
    """Flags that have changed since cells ran, and it changes nothing."""
    words = [str(write_study(tmp_path, seeds=[1])), "--output", str(tmp_path / "out")]
    assert compare_gates.main(words) == 0
    assert compare_gates.main([*words, "--plan"]) == 0
    capsys.readouterr()
    for seed in ("1", "2"):
        assert compare_gates.main([*words, "--plan", "--set", "lr=1", "--seeds", seed]) == 2
        captured = capsys.readouterr()
        assert "study tiny: 2 cells" in captured.out
        assert f"cell {IDS[0]} in {tmp_path}/out ran with --lr=5e-3, now --lr=1" in captured.err


def test_unmatched_plan_starts_nothing(tmp_path, capsys, fake):
    axes = {"gate": {"topk": TOPK, "one": {**TOPK, "topk": 1}}}
    match = {"reference": {"gate": "topk"}, "tolerance": 0.05}
    study = write_study(tmp_path, axes=axes, match=match)
    assert compare_gates.main([str(study), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "cell gate-one_seed-1: active parameters 22,848 against 24,896" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_flags_of_axes_select_values(tmp_path, capsys, fake):
    study = write_study(tmp_path)
    out = tmp_path / "out"
    words = [str(study), "--output", str(out), "--gate", "xmoe", "--seeds", "5", "6"]
    assert compare_gates.main([*words, "--set", "train-iters=4", "--devices", "cpu,cpu"]) == 0
    results = StudyResults.read(out)
    assert [cell.cell_id for cell in results] == ["gate-xmoe_seed-5", "gate-xmoe_seed-6"]
    assert results.cells[0].flags["train-iters"] == 4
    printed = capsys.readouterr().out
    assert "gate-xmoe_seed-5  finished" in printed
    assert compare_gates.main([str(study), "--output", str(out), "--summarize"]) == 0
    assert "gate-xmoe_seed-5  finished" in capsys.readouterr().out
    assert compare_gates.main([str(study), "--output", str(out), "--gate", "hash"]) == 2
    assert "--gate is 'hash'; allowed: labels of the axis: topk xmoe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--summarize", "--seeds", "1"], "--seeds is [1]; allowed: not with --summarize"),
        (["--summarize", "--gate", "topk"], "--gate is ['topk']; allowed: not with --summ"),
        (["--summarize", "--set", "lr=1"], "--set is ['lr=1']; allowed: not with --summarize"),
        (["--summarize", "--rerun"], "--rerun is []; allowed: not with --summarize"),
        (["--summarize", "--plan"], "--plan is True; allowed: not with --summarize"),
        (["--plan", "--rerun", "x"], "--rerun is ['x']; allowed: not with --plan"),
        (["--plan", "--remove-checkpoints"], "--remove-checkpoints is True; allowed: not with"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(tmp_path, capsys, words, message):
    out = ["--output", str(tmp_path / "out")]
    assert compare_gates.main([str(write_study(tmp_path)), *out, *words]) == 2
    assert message in capsys.readouterr().err


def test_failed_cells_decide_the_exit_code(tmp_path, capsys, fake, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", IDS[1])
    words = [str(write_study(tmp_path)), "--output", str(tmp_path / "out")]
    assert compare_gates.main(words) == 1
    captured = capsys.readouterr()
    assert captured.err == f"failed: {IDS[1]}: the fake run fails\n"
    assert f"cell {IDS[3]}: finished" in captured.out
    monkeypatch.delenv("FAKE_FAIL")
    assert compare_gates.main(words) == 0


def test_default_output_has_the_study_name(tmp_path, fake, monkeypatch):
    study = write_study(tmp_path, seeds=[1])
    monkeypatch.chdir(tmp_path)
    assert compare_gates.main([str(study), "--gate", "topk", "--remove-checkpoints"]) == 0
    cell = tmp_path / "runs" / "tiny" / "cells" / IDS[0]
    assert (cell / "metrics.jsonl").exists() and not (cell / "checkpoints").exists()


def test_help_lists_the_axes(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        compare_gates.main(["--help"])
    assert ended.value.code == 0 and "--remove-checkpoints" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        compare_gates.main([str(write_study(tmp_path)), "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "axes of the study" in printed and "topk xmoe" in printed
    study = str(write_study(tmp_path))
    for words in ([], ["--plan", study], [study, "--plann"], [study, "--axes", "1"]):
        with pytest.raises(SystemExit) as ended:
            compare_gates.main(words)
        assert ended.value.code == 2


def test_mistakes_are_one_line(tmp_path, capsys):
    axes = {"plan": {"a": TOPK}}
    assert compare_gates.main([str(write_study(tmp_path, axes=axes))]) == 2
    error = capsys.readouterr().err
    assert "is 'plan'; allowed: a name that is no flag of this program. Rename it." in error
    assert compare_gates.main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    out = tmp_path / "none"
    assert (
        compare_gates.main([str(write_study(tmp_path)), "--summarize", "--output", str(out)])
        == 2
    )
    assert "has no study.json" in capsys.readouterr().err


# As a program that is killed


def test_killed_study_equals_an_uninterrupted_one(tmp_path, fake, monkeypatch):
    """The runner and the running cell are killed in the middle of the second cell.

    The finished cell does not run again, and the killed one continues from its checkpoint.
    """
    study = write_study(tmp_path, base={**BASE, "save-interval": 8})
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_HOLD", IDS[1])
    runner = start(study, out)
    wait_until((out / "cells" / IDS[1] / "holds").exists, "the middle of the second cell")
    other = start(study, out)
    refused, _ = other.communicate(timeout=120)
    assert other.returncode == 2
    assert f"{out}/cells is being written by process {runner.pid}" in refused
    runner.send_signal(signal.SIGSTOP)
    kill_children(runner.pid)
    runner.kill()
    runner.communicate()
    states = [CellState.read(out / "cells" / cell_id).state for cell_id in IDS]
    assert states == ["finished", "running", "planned", "planned"]
    monkeypatch.delenv("FAKE_HOLD")
    assert compare_gates.main([str(study), "--output", str(out)]) == 0
    logs = [(out / "cells" / cell_id / "log.txt").read_text() for cell_id in IDS[:2]]
    assert logs[0] == "starting at iteration 0\n"
    assert logs[1] == "starting at iteration 0\nstarting at iteration 8\n"
    assert compare_gates.main([str(study), "--output", str(tmp_path / "other")]) == 0
    assert curves(out) == curves(tmp_path / "other")
    losses = [
        [cell.held_out_loss for cell in StudyResults.read(o)] for o in (out, tmp_path / "other")
    ]
    assert losses[0] == losses[1]


def test_cells_end_with_their_runner(tmp_path, fake, monkeypatch):
    """When only the runner is killed, the kernel asks the cell to save and end."""
    study = write_study(tmp_path)
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_HOLD", IDS[0])
    runner = start(study, out)
    cell = out / "cells" / IDS[0]
    wait_until((cell / "holds").exists, "the middle of the first cell")
    runner.kill()
    runner.communicate()
    wait_until((cell / "checkpoints" / "iteration").exists, "a checkpoint after SIGTERM")
    monkeypatch.delenv("FAKE_HOLD")
    assert compare_gates.main([str(study), "--output", str(out)]) == 0
    assert (cell / "log.txt").read_text().splitlines()[-1] == "starting at iteration 10"


def test_interrupted_study_has_the_code_of_the_signal(tmp_path, monkeypatch):
    study = write_study(tmp_path)
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_HOLD", IDS[0])
    runner = start(study, out)
    wait_until((out / "cells" / IDS[0] / "holds").exists, "the middle of the first cell")
    runner.send_signal(signal.SIGINT)
    printed, _ = runner.communicate(timeout=120)
    assert runner.returncode == 130
    assert f"interrupted: {IDS[0]}; the same command continues it" in printed
    assert CellState.read(out / "cells" / IDS[0]).state == "interrupted"


# Real training


def test_cells_train(tmp_path, data):
    """One cell of two ranks: what the runner expects is what pretrain_gpt.py writes."""
    real = {"mock-data": None, "data-path": data, "split": "80,15,5", "train-iters": 3}
    study = write_study(tmp_path, base={**BASE, **real}, seeds=[1], ranks=2)
    out = tmp_path / "out"
    assert compare_gates.main([str(study), "--output", str(out), "--gate", "xmoe"]) == 0
    (cell,) = StudyResults.read(out)
    rows = read_metrics(cell.metrics_path)
    assert cell.held_out_loss == [r["loss"] for r in rows if r["kind"] == "eval"][-1]
    experts = [r["experts_per_token"] for r in rows if r["kind"] == "train"][-1]
    assert cell.experts_per_token == pytest.approx(experts)
    assert cell.active_parameters == pytest.approx(20800 + 2048 * experts)
    assert (cell.folder / "checkpoints" / "latest").exists()


@pytest.mark.slow
def test_killed_training_equals_an_uninterrupted_one(tmp_path, data, monkeypatch):
    """Real training: kill -9 after a checkpoint, then the same command."""
    real = {"mock-data": None, "data-path": data, "split": "80,15,5", "save-interval": 5}
    base = {**BASE, **real, "train-iters": 60}
    axes = {"gate": {"topk": TOPK, "xmoe": THRESHOLD}}
    study = write_study(tmp_path, base=base, axes=axes, seeds=[1])
    out = tmp_path / "out"
    real_program = "import sys; from tools import compare_gates; sys.exit(compare_gates.main())"
    runner = start(study, out, code=real_program)
    checkpoints = out / "cells" / IDS[1] / "checkpoints"
    wait_until(lambda: list(checkpoints.glob("iter_*/run.json")), "a checkpoint of the second")
    runner.send_signal(signal.SIGSTOP)
    kill_children(runner.pid)
    runner.kill()
    runner.communicate()
    assert CellState.read(out / "cells" / IDS[1]).state == "running"
    before = json.loads((out / "cells" / IDS[0] / "state.json").read_text())
    assert before["state"] == "finished"
    assert compare_gates.main([str(study), "--output", str(out)]) == 0
    assert json.loads((out / "cells" / IDS[0] / "state.json").read_text()) == before
    assert CellState.read(out / "cells" / IDS[1]).attempts == 2
    assert compare_gates.main([str(study), "--output", str(tmp_path / "other")]) == 0
    assert curves(out) == curves(tmp_path / "other")
