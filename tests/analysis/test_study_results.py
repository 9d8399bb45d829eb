"""Results of a study read from its folder: order, states, flags about unmatched parameters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.analysis.compare.cell_state import CellState
from megatron.analysis.compare.results import MatchRule, StudyRecord, StudyResults

MATCH = MatchRule({"gate": "topk"}, total_tolerance=0.01, active_tolerance=0.05)


def state(gate: str, seed: int, **more) -> CellState:
    base = CellState(
        cell_id=f"gate-{gate}_seed-{seed}",
        axes={"gate": gate},
        seed=seed,
        flags={"gate": gate, "seed": seed},
        parameters_total=1000,
        active_parameters_planned=500.0,
    )
    return replace(base, **more)


def write_study(out: Path, *states: CellState, match: MatchRule | None = MATCH) -> None:
    order = [cell.cell_id for cell in states]
    StudyRecord("tiny", ["gate"], {"gate": "topk"}, "test", match, order).write(out)
    for cell in states:
        cell.write(out / "cells" / cell.cell_id)


def test_results_are_in_the_plan_order(tmp_path):
    cells = [state("topk", 2), state("topk", 1), state("threshold", 1, state="failed")]
    write_study(tmp_path, *cells)
    state("old", 1).write(tmp_path / "cells" / "gate-old_seed-1")
    results = StudyResults.read(tmp_path)
    assert [cell.cell_id for cell in results] == [
        *(c.cell_id for c in cells),
        "gate-old_seed-1",
    ]
    assert (len(results), results.name, results.held_out) == (4, "tiny", "test")
    assert results.baseline == {"gate": "topk"}
    assert results.cells[2].state == "failed"
    assert results.cells[0].metrics_path == (
        tmp_path / "cells" / "gate-topk_seed-2" / "metrics.jsonl"
    )


def test_cells_of_other_axes_are_left_out(tmp_path):
    write_study(tmp_path, state("topk", 1))
    state("x", 1, axes={"gate": "x", "experts": "8"}).write(tmp_path / "cells" / "x")
    assert [cell.cell_id for cell in StudyResults.read(tmp_path)] == ["gate-topk_seed-1"]


def test_measured_active_parameters_are_compared(tmp_path):
    """Against the mean over the seeds of the reference; unfinished cells are not flagged."""
    finished = {"state": "finished"}
    write_study(
        tmp_path,
        state("topk", 1, active_parameters=490.0, **finished),
        state("topk", 2, active_parameters=510.0, **finished),
        state("inside", 1, active_parameters=524.0, **finished),
        state("outside", 1, active_parameters=526.0, **finished),
        state("larger", 1, active_parameters=500.0, parameters_total=1011, **finished),
        state("running", 1, active_parameters=900.0, state="running"),
    )
    found = {cell.axes["gate"]: cell.mismatch for cell in StudyResults.read(tmp_path)}
    assert not any(found[gate] for gate in ("topk", "inside", "running"))
    assert found["outside"] == (
        "active parameters 526 against 500 (5.2% apart; tolerance 5.0%)"
    )
    assert (
        found["larger"] == "total parameters 1,011 against 1,000 (1.1% apart; tolerance 1.0%)"
    )


def test_nothing_is_flagged_without_a_match(tmp_path):
    cells = [state("topk", 1), state("b", 1, state="finished", parameters_total=1)]
    write_study(tmp_path, *cells, match=None)
    assert not any(cell.mismatch for cell in StudyResults.read(tmp_path))


def test_a_shared_run_is_found(tmp_path):
    """A cell that equals a tuning run has that run's folder."""
    write_study(tmp_path, state("topk", 1, same_as="../../tuning/a", state="finished"))
    state("topk", 1).write(tmp_path / "tuning" / "a")
    results = StudyResults.read(tmp_path)
    assert results.cells[0].folder == tmp_path / "tuning" / "a"


def test_stray_files_are_passed_over(tmp_path):
    """A file of a file manager or an editor, and a folder without a state."""
    write_study(tmp_path, state("topk", 1))
    (tmp_path / "cells" / ".DS_Store").touch()
    (tmp_path / "cells" / "notes").mkdir()
    assert [cell.cell_id for cell in StudyResults.read(tmp_path)] == ["gate-topk_seed-1"]


def test_state_survives_writing_and_later_fields(tmp_path):
    cell = state("topk", 1, tuning={"flag": "f", "value": 0.1, "losses": {"0.1": 2.0}})
    cell.write(tmp_path)
    assert CellState.read(tmp_path) == cell
    path = tmp_path / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    assert CellState.read(tmp_path) == cell
    assert CellState.read(tmp_path / "none") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"state": "planned"}'])
def test_foreign_state_files_are_refused(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state\.json .*remove the folder of the cell"):
        CellState.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"match": {"x": 1}}'])
def test_foreign_study_records_are_refused(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(ValueError, match=r"study\.json is not the record of a study"):
        StudyResults.read(tmp_path)


def test_folder_without_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no study\.json; allowed: the output folder"):
        StudyResults.read(tmp_path)
