"""Starting a study again with other flags, another grid or held-out set, or to repeat cells."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from helpers.studies import BASE, THRESHOLD, TOPK, run_study, tiny_plan
from megatron.analysis.compare.cell_folders import CellFolders
from megatron.analysis.compare.cell_process import CellProcess
from megatron.analysis.compare.cell_state import CellState
from megatron.analysis.compare.devices import Device
from megatron.analysis.compare.output import prepare_output
from megatron.analysis.compare.results import StudyResults

IDS = ["gate-topk_seed-1", "gate-topk_seed-2", "gate-xmoe_seed-1", "gate-xmoe_seed-2"]
GRID = {
    "where": {"gate": "topk"},
    "flag": "moe-loss-coeff",
    "values": [0.1, 0.2],
    "seed": 1,
    "tokens": 640,
}
"""The stand-in has the lowest loss with 0.01: the grid chooses 0.1"""
WIDER = {**GRID, "values": [0.1, 0.2, 0.01]}


def state_text(folder: Path, cell_id: str) -> str:
    return (folder / "out" / "cells" / cell_id / "state.json").read_text()


# Other flags


def test_changed_cells_are_refused_or_repeated(tmp_path):
    run_study(tmp_path)
    out = tmp_path / "out"
    base = {**BASE, "lr": "1e-3"}
    message = r"gate-topk_seed-1 in .* ran with --lr=5e-3, now --lr=1e-3, and 3 more cell"
    with pytest.raises(ValueError, match=message):
        run_study(tmp_path, base=base)
    with pytest.raises(ValueError, match="and 1 more cell"):
        run_study(tmp_path, base=base, rerun=["*_seed-1"])
    with pytest.raises(ValueError, match="--rerun is 'x'; allowed: ids of cells"):
        run_study(tmp_path, base=base, rerun=["x"])
    with pytest.raises(ValueError, match=r"1 rank\(s\), now 2"):
        run_study(tmp_path, ranks=2)
    axes = {"gate": {"topk": {**TOPK, "moe-loss-coeff": 0.1}, "xmoe": THRESHOLD}}
    summary, results = run_study(tmp_path, axes=axes, rerun=[])
    assert sorted(summary.finished) == IDS
    assert [result.attempts for result in results] == [1, 1, 1, 1]
    assert results.cells[0].held_out_loss == pytest.approx(5 - 0.2 + 1 + 0.001)
    assert results.cells[0].flags["moe-loss-coeff"] == 0.1
    marks = [(out / "cells" / cell_id / "mark") for cell_id in IDS]
    for mark in marks:
        mark.touch()
    run_study(tmp_path, axes=axes, rerun=["*topk_seed-2"])
    assert [mark.exists() for mark in marks] == [True, False, True, True]


def test_cells_that_never_ran_leave_the_results(tmp_path, monkeypatch):
    """Those of a selection that was not run; cells that have started stay."""
    plan = tiny_plan(tmp_path, seeds=[3, 4])
    prepare_output(plan, CellFolders(tmp_path / "out"))
    run_study(tmp_path, seeds=[1])
    _, results = run_study(tmp_path, seeds=[2])
    assert sorted(result.cell_id for result in results) == IDS


def test_other_seeds_add_to_the_results(tmp_path):
    run_study(tmp_path, seeds=[1])
    (tmp_path / "out" / "cells" / "stray.txt").touch()
    summary, results = run_study(tmp_path, seeds=[2])
    assert summary.finished == [IDS[1], IDS[3]]
    assert sorted(result.cell_id for result in results) == IDS
    assert all(result.is_finished for result in results)


def test_other_flags_of_other_seeds_are_refused(tmp_path):
    """The summary would average the seeds of both."""
    run_study(tmp_path, seeds=[1, 2])
    base = {**BASE, "lr": "1e-3"}
    message = (
        "cell gate-topk_seed-1 in .* ran with --lr=5e-3, now --lr=1e-3, and 3 more cell.*"
        "average it with the seeds that are selected now. Select seed 1, too, and start with --re"
    )
    for rerun in (None, []):
        with pytest.raises(ValueError, match=message):
            run_study(tmp_path, base=base, seeds=[3], rerun=rerun)
    with pytest.raises(ValueError, match=r"1 rank\(s\), now 2.*Select seed 1, too"):
        run_study(tmp_path, ranks=2, seeds=[3])
    assert not (tmp_path / "out" / "cells" / "gate-topk_seed-3").exists()
    summary, results = run_study(tmp_path, base=base, seeds=[1, 2, 3], rerun=[])
    assert len(summary.finished) == 6
    assert {result.flags["lr"] for result in results} == {"1e-3"}


def test_declarations_are_those_of_the_last_start(tmp_path):
    """What is matched and expected is not a flag, and holds for the seeds that ran before, too."""
    match = {"reference": {"gate": "topk"}, "tolerance": {"active": 0.5}}
    _, before = run_study(tmp_path, match=match)
    declared = {**THRESHOLD, "experts-per-token": 3, "match": "active"}
    axes = {"gate": {"topk": TOPK, "xmoe": declared}}
    _, after = run_study(tmp_path, match=match, axes=axes, seeds=[2])
    # An expert of the one MoE layer has 2 x 32 x 32 parameters.
    for result in before.cells[2:]:
        assert (result.matched, result.active_parameters_planned) == (
            ["total", "active"],
            24896,
        )
    xmoe = [result for result in after if result.axes["gate"] == "xmoe"]
    assert [result.is_finished for result in xmoe] == [True, True]
    for result in xmoe:
        assert (result.matched, result.active_parameters_planned) == (["active"], 24896 + 2048)


# Repeating


def test_cells_that_still_run_are_not_deleted(tmp_path, monkeypatch):
    """--rerun waits for the processes of a killed runner, and deletes nothing before."""
    run_study(tmp_path, seeds=[1])
    folders = [tmp_path / "out" / "cells" / cell_id for cell_id in (IDS[0], IDS[2])]
    for folder in folders:
        (folder / "mark").touch()
    process = CellProcess.start(folders[1], ["sleep", "1000"], Device("cpu"), 1, 1)
    try:
        monkeypatch.setattr("megatron.analysis.compare.cell_process.LOCK_SECONDS", 0.2)
        with pytest.raises(ValueError, match=f"still run the cell .*{IDS[2]}; end them"):
            run_study(tmp_path, seeds=[1], rerun=["*"])
        assert all((folder / "mark").exists() for folder in folders)
        monkeypatch.setattr("megatron.analysis.compare.cell_process.LOCK_SECONDS", 100.0)
        threading.Timer(0.3, process.kill).start()
        summary, _ = run_study(tmp_path, seeds=[1], rerun=["*"])
    finally:
        process.kill()
    assert summary.finished == [IDS[0], IDS[2]]
    assert not any((folder / "mark").exists() for folder in folders)


def test_grid_run_of_a_cell_is_repeated_with_the_cell(tmp_path):
    """A cell without its run would have lost its results, should the run fail."""
    grid = {**GRID, "tokens": None}
    run_study(tmp_path, tune=[grid], seeds=[1])
    run_id = "gate-topk_moe-loss-coeff-0.1_seed-1"
    message = f"--rerun is '{run_id}'; allowed: this run together with the cell {IDS[0]}, which"
    for seeds in ([1], [2]):
        with pytest.raises(ValueError, match=message):
            run_study(tmp_path, tune=[grid], seeds=seeds, rerun=[run_id])
    assert (tmp_path / "out" / "tuning" / run_id / "metrics.jsonl").exists()
    run_study(tmp_path, tune=[grid], seeds=[1], rerun=["*coeff-0.2_*"])
    summary, results = run_study(tmp_path, tune=[grid], seeds=[1], rerun=[run_id, IDS[0]])
    assert len(summary.finished) == 4 and results.cells[0].is_finished


# Another choice of a grid


def test_another_tuned_value_is_no_silent_change(tmp_path):
    """A grid with a better value does not mix with cells that ran with the one before."""
    run_study(tmp_path, tune=[GRID])
    before = [state_text(tmp_path, cell_id) for cell_id in IDS]
    summary, results = run_study(tmp_path, tune=[WIDER])
    error = (
        "it ran with --moe-loss-coeff=0.1, now --moe-loss-coeff=0.01; select their seeds, and "
        f"start with --rerun {IDS[0]} {IDS[1]} to repeat what ran with another value, or choose "
        "another --output"
    )
    assert summary.failed == dict.fromkeys(IDS[:2], error)
    assert [state_text(tmp_path, cell_id) for cell_id in IDS] == before
    assert all(result.is_finished for result in results)
    summary, results = run_study(tmp_path, tune=[WIDER], rerun=["gate-topk_seed-*"])
    assert not summary.failed and results.cells[0].flags["moe-loss-coeff"] == 0.01
    with pytest.raises(ValueError, match="ran with --moe-loss-coeff=0.01, now"):
        run_study(tmp_path, tune=[GRID])


def test_other_seeds_do_not_run_with_another_tuned_value(tmp_path):
    run_study(tmp_path, tune=[GRID], seeds=[1])
    summary, results = run_study(tmp_path, tune=[WIDER], seeds=[2])
    assert list(summary.failed) == [IDS[1]]
    assert f"{IDS[0]} ran with --moe-loss-coeff=0.1, now" in summary.failed[IDS[1]]
    states = {result.cell_id: result.state for result in results}
    assert (states[IDS[0]], states[IDS[1]]) == ("finished", "planned")
    # Without a grid, the seeds would run with the default.
    with pytest.raises(ValueError, match="ran with --moe-loss-coeff=0.1, now no --moe-loss-c"):
        run_study(tmp_path, seeds=[2])


def test_finished_cells_outlive_runs_of_the_grid(tmp_path, monkeypatch):
    """A failed run that succeeds at last, and runs that all fail, leave them as they are."""
    monkeypatch.setenv("FAKE_FAIL", "coeff-0.01_")
    run_study(tmp_path, tune=[WIDER])
    before = [state_text(tmp_path, cell_id) for cell_id in IDS]
    monkeypatch.delenv("FAKE_FAIL")
    summary, _ = run_study(tmp_path, tune=[WIDER])
    assert list(summary.failed) == IDS[:2]
    assert [state_text(tmp_path, cell_id) for cell_id in IDS] == before
    monkeypatch.setenv("FAKE_FAIL", "moe-loss-coeff")
    summary, results = run_study(tmp_path, tune=[WIDER], rerun=["*moe-loss-coeff*"])
    assert len(summary.failed) == 3 and sorted(summary.finished) == IDS
    assert [state_text(tmp_path, cell_id) for cell_id in IDS] == before


# Another held-out set


def append_test_losses(out: Path) -> None:
    """Evaluate all runs on the test set: 7 nats, plus the coefficient of the auxiliary loss."""
    for metrics in out.glob("*/*/metrics.jsonl"):
        flags = json.loads((metrics.parent / "state.json").read_text())["flags"]
        loss = 7 - flags.get("moe-loss-coeff", 0)
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        row = {"kind": "test", "iteration": rows[-1]["iteration"], "loss": loss}
        with metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")


def test_another_held_out_set_is_measured(tmp_path):
    """From the metrics of finished cells, also of other seeds; the grid may choose otherwise."""
    run_study(tmp_path, tune=[GRID])
    append_test_losses(tmp_path / "out")
    summary, results = run_study(tmp_path, tune=[GRID], seeds=[2], eval={"set": "test"})
    losses = {result.cell_id: result.held_out_loss for result in results}
    assert losses == pytest.approx(dict(zip(IDS, [6.9, 6.9, 7.0, 7.0], strict=True)))
    # 0.2 has the lowest loss on this set.
    assert "ran with --moe-loss-coeff=0.1, now --moe-loss-coeff=0.2" in summary.failed[IDS[1]]
    summary, results = run_study(tmp_path, tune=[GRID])
    assert not summary.failed
    assert results.cells[0].held_out_loss == pytest.approx(5 - 0.2 + 1 + 0.001)


def test_tuning_is_recorded_with_the_losses_of_the_set(tmp_path):
    """The value stays the same: 0.1 is the better one on both sets."""
    grid = {**GRID, "values": [0.1, 0.0001]}
    run_study(tmp_path, tune=[grid])
    append_test_losses(tmp_path / "out")
    summary, results = run_study(tmp_path, tune=[grid], eval={"set": "test"})
    assert not summary.failed
    losses = results.cells[1].tuning["losses"]
    assert losses == pytest.approx({"0.1": 6.9, "0.0001": 6.9999})


def test_runs_that_lack_the_held_out_set_are_refused(tmp_path):
    run_study(tmp_path, seeds=[1])
    message = (
        f"cell {IDS[0]} has finished, and .*metrics.jsonl has no loss of kind test at iteration "
        f"20: .*; with --rerun {IDS[0]} it runs again"
    )
    with pytest.raises(ValueError, match=message):
        run_study(tmp_path, seeds=[1], eval={"set": "test"})
    assert StudyResults.read(tmp_path / "out").held_out == "eval"  # nothing was written
    # Cells that are not in the plan have no loss instead of one of another set.
    run_study(tmp_path, seeds=[2], eval={"set": "test"})
    cells = {cell.cell_id: cell for cell in StudyResults.read(tmp_path / "out")}
    assert cells[IDS[0]].held_out_loss is None


def test_states_of_earlier_versions_are_measured(tmp_path):
    """They do not name the held-out set."""
    run_study(tmp_path, seeds=[1])
    path = tmp_path / "out" / "cells" / IDS[0] / "state.json"
    content = json.loads(path.read_text())
    expected = content.pop("held_out_loss")
    del content["held_out"]
    path.write_text(json.dumps({**content, "held_out_loss": 1.0}))
    run_study(tmp_path, seeds=[1])
    state = CellState.read(path.parent)
    assert (state.held_out, state.held_out_loss) == ("eval", expected)
