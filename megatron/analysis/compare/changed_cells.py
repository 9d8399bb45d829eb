"""Cells that ran with other flags than those of the plan: they are not mixed with its cells."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from megatron.analysis.compare.cell_folders import CellFolders, difference, differs, with_seed
from megatron.analysis.compare.cell_state import CellState
from megatron.analysis.compare.cells import Cell
from megatron.analysis.compare.plan import StudyPlan
from megatron.analysis.compare.results import CELLS_FOLDER
from megatron.config.fields import require


def refuse_changed(
    plan: StudyPlan, folders: CellFolders, rerun: Sequence[str] | None = None
) -> None:
    """Raise ValueError if cells ran with other flags than now and are not to run again.

    Args:
        rerun: as in `prepare_output`.

    Raises:
        ValueError: there is such a cell, or one of another seed, with which the summary would
            average the cells of the plan; a pattern of `rerun` matches no cell; or a cell that is
            not to run again has the results of a run of a grid that is.
    """
    ids = [run.cell.cell_id for run in plan.runs]
    for pattern in rerun or ():
        advice = "Without a name, --rerun repeats the cells whose flags have changed."
        found = fnmatch.filter(ids, pattern)
        require(bool(found), "--rerun", pattern, "ids of cells, or patterns of them", advice)
    _refuse_changed_cells(plan, folders, rerun)
    _refuse_other_seeds(plan, folders)
    _refuse_adopted(plan, folders, rerun)


def is_rerun(cell: Cell, folders: CellFolders, rerun: Sequence[str] | None) -> bool:
    """Return whether a cell of the plan is to run again; see `prepare_output`."""
    if rerun is None:
        return False
    if not rerun:
        return _has_changed(cell, folders)
    return any(fnmatch.fnmatch(cell.cell_id, pattern) for pattern in rerun)


def conflict(cell: Cell, folders: CellFolders) -> str:
    """Say which cells of a configuration ran with another value of its tuned flag than now.

    Args:
        cell: with the value that its grid has chosen now.

    Returns:
        Why the cell cannot be compared with its other seeds, in one line; empty if it can.
    """
    states = {}
    for state in folders.started(cell.axes):
        if differs(state, with_seed(cell, state.seed)):
            states[state.cell_id] = state
    if not states:
        return ""
    first = states.get(cell.cell_id) or next(iter(states.values()))
    name = "it" if first.cell_id == cell.cell_id else first.cell_id
    changes = difference(first, with_seed(cell, first.seed))
    return (
        f"{name} ran with {changes}; select their seeds, and start with --rerun "
        f"{' '.join(states)} to repeat what ran with another value, or choose another --output"
    )


def _has_changed(cell: Cell, folders: CellFolders) -> bool:
    state = CellState.read(folders.of(cell))
    return state is not None and state.has_started and differs(state, cell)


def _refuse_changed_cells(
    plan: StudyPlan, folders: CellFolders, rerun: Sequence[str] | None
) -> None:
    changed = []
    for run in plan.runs:
        if not is_rerun(run.cell, folders, rerun) and _has_changed(run.cell, folders):
            changed.append(run.cell)
    if not changed:
        return
    cell = changed[0]
    changes = difference(CellState.read(folders.of(cell)), cell)
    raise ValueError(
        f"cell {cell.cell_id} in {folders.root} ran with {changes}{_others(changed)}; start with "
        "--rerun to repeat them, or choose another --output"
    )


def _refuse_other_seeds(plan: StudyPlan, folders: CellFolders) -> None:
    """Refuse cells of other seeds that would be averaged with other flags than their own."""
    cells = {tuple(run.cell.axes.items()): run.cell for run in plan.cells}
    ids = {run.cell.cell_id for run in plan.cells}
    changed = []
    for state in folders.started():
        cell = cells.get(tuple(state.axes.items()))
        if cell is None or state.cell_id in ids:
            continue
        if differs(state, with_seed(cell, state.seed)):
            changed.append((state, with_seed(cell, state.seed)))
    if not changed:
        return
    state, cell = changed[0]
    raise ValueError(
        f"cell {state.cell_id} in {folders.root} ran with {difference(state, cell)}"
        f"{_others(changed)}; the summary would average it with the seeds that are selected now. "
        f"Select seed {state.seed}, too, and start with --rerun to repeat them, or choose another "
        "--output"
    )


def _refuse_adopted(plan: StudyPlan, folders: CellFolders, rerun: Sequence[str] | None) -> None:
    """Refuse to repeat a run of a grid whose results a cell has that is not repeated."""
    repeated = {}
    kept: dict[Path, str] = {}
    for run in plan.runs:
        if is_rerun(run.cell, folders, rerun):
            repeated[folders.of(run.cell).resolve()] = run.cell.cell_id
    for state in folders.started():
        folder = folders.root / CELLS_FOLDER / state.cell_id
        if state.same_as and folder.resolve() not in repeated:
            kept[state.run_folder(folder).resolve()] = state.cell_id
    for folder, cell_id in repeated.items():
        allowed = f"this run together with the cell {kept.get(folder)}, which has its results"
        require(folder not in kept, "--rerun", cell_id, allowed)


def _others(changed: Sequence[object]) -> str:
    return f", and {len(changed) - 1} more cell(s)" if len(changed) > 1 else ""
