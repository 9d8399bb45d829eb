"""The output folder of a study: where its cells are, what they ran with, what may be repeated."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.analysis.compare.cell_flags import changed_flags, identity
from megatron.analysis.compare.cell_state import FINISHED, CellState, read_states
from megatron.analysis.compare.cells import Cell
from megatron.analysis.compare.plan import PlannedCell, StudyPlan
from megatron.analysis.compare.results import CELLS_FOLDER, TUNING_FOLDER, StudyRecord
from megatron.config.fields import require
from megatron.io.disk_space import require_disk_space
from megatron.log import get_logger

_CHECKPOINT_BYTES = 16
"""Bytes of a checkpoint per parameter: fp32 weights and two moments, and weights in bf16 or fp32"""


@dataclass(frozen=True)
class CellFolders:
    """Folders of the runs of a study."""

    root: Path

    def of(self, cell: Cell) -> Path:
        """Return the folder of a run."""
        parent = TUNING_FOLDER if cell.is_tuning else CELLS_FOLDER
        return self.root / parent / cell.cell_id

    def differs(self, state: CellState, cell: Cell) -> bool:
        """Return whether a run was made with other flags than the plan's."""
        return identity(state.flags, state.ranks) != cell.identity

    def difference(self, state: CellState, cell: Cell) -> str:
        """Describe in which flags and ranks a run differs from the plan's, for a message."""
        changes = changed_flags(state.flags, cell.flags)
        if state.ranks != cell.ranks:
            changes = "; ".join(
                filter(None, [changes, f"{state.ranks} rank(s), now {cell.ranks}"])
            )
        return changes


def initial_state(planned: PlannedCell) -> CellState:
    """Return the state of a cell that has not started."""
    cell = planned.cell
    return CellState(
        cell_id=cell.cell_id,
        axes=cell.axes,
        seed=cell.seed,
        flags=cell.flags,
        ranks=cell.ranks,
        matched=list(cell.matched),
        parameters_total=planned.size.total,
        active_parameters_planned=planned.active,
    )


def prepare_output(
    plan: StudyPlan, folders: CellFolders, rerun: Sequence[str] | None = None
) -> None:
    """Write study.json and the state of cells that are new; remove those that are to run again.

    The caller has locked the folder.

    Args:
        rerun: patterns of the ids of cells to run again; empty: those whose flags have changed
            since they ran; None: no cell.

    Raises:
        ValueError: a cell ran with other flags and is not to run again, or a pattern matches none.
        OSError: a file cannot be written.
    """
    study = plan.study
    _refuse_changed(plan, folders, rerun)
    folders.root.mkdir(parents=True, exist_ok=True)
    for run in plan.runs:
        folder = folders.of(run.cell)
        if _is_rerun(run.cell, folders, rerun) and folder.exists():
            get_logger().info("cell %s: removed, to run again", run.cell.cell_id)
            shutil.rmtree(folder)
    StudyRecord(
        name=study.name,
        axes=[axis.name for axis in study.axes],
        baseline=study.baseline or {},
        held_out=study.held_out,
        match=study.match,
        order=[run.cell.cell_id for run in plan.runs],
    ).write(folders.root)
    for run in plan.runs:
        folder = folders.of(run.cell)
        state = CellState.read(folder)
        if state is None or not state.attempts and not state.same_as:
            initial_state(run).write(folder)
    _pass_other_cells(plan, folders)


def _refuse_changed(plan: StudyPlan, folders: CellFolders, rerun: Sequence[str] | None) -> None:
    ids = [run.cell.cell_id for run in plan.runs]
    for pattern in rerun or ():
        advice = "Without a name, --rerun repeats the cells whose flags have changed."
        found = fnmatch.filter(ids, pattern)
        require(bool(found), "--rerun", pattern, "ids of cells, or patterns of them", advice)
    changed = []
    for run in plan.runs:
        if not _is_rerun(run.cell, folders, rerun) and _has_changed(run.cell, folders):
            changed.append(run.cell)
    if not changed:
        return
    cell = changed[0]
    difference = folders.difference(CellState.read(folders.of(cell)), cell)
    others = f", and {len(changed) - 1} more cell(s)" if len(changed) > 1 else ""
    raise ValueError(
        f"cell {cell.cell_id} in {folders.root} ran with {difference}{others}; start with --rerun "
        "to repeat them, or choose another --output"
    )


def _has_changed(cell: Cell, folders: CellFolders) -> bool:
    """Return whether a cell has started with other flags than now.

    A tuned flag may have any value that its grid still has.
    """
    state = CellState.read(folders.of(cell))
    if state is None or not (state.attempts or state.same_as):
        return False
    if cell.tuning is None:
        return folders.differs(state, cell)
    candidates = [cell.with_tuned(value) for value in cell.tuning.values]
    return all(folders.differs(state, candidate) for candidate in candidates)


def _is_rerun(cell: Cell, folders: CellFolders, rerun: Sequence[str] | None) -> bool:
    if rerun is None:
        return False
    if not rerun:
        return _has_changed(cell, folders)
    return any(fnmatch.fnmatch(cell.cell_id, pattern) for pattern in rerun)


def _pass_other_cells(plan: StudyPlan, folders: CellFolders) -> None:
    """Log which cells of earlier starts are not in this plan; those that never ran are removed."""
    planned = {run.cell.cell_id for run in plan.cells}
    parent = folders.root / CELLS_FOLDER
    others = []
    for folder, state in read_states(parent):
        if folder.name in planned:
            continue
        if state.attempts or state.same_as:
            others.append(folder.name)
        else:
            shutil.rmtree(folder)
    if others:
        get_logger().info(
            "%s has %d cell(s) of earlier starts that this one does not run, such as %s; they stay "
            "among the results",
            parent,
            len(others),
            others[0],
        )


def require_space(
    plan: StudyPlan, folders: CellFolders, slots: int, *, remove_checkpoints: bool
) -> None:
    """Raise OSError unless the checkpoints of all cells that are still to run fit on the disk.

    Args:
        slots: cells that run at the same time.
        remove_checkpoints: the checkpoints of finished cells are deleted.
    """
    sizes = []
    for run in plan.runs:
        state = CellState.read(folders.of(run.cell))
        if state is None or state.state != FINISHED:
            sizes.append(_CHECKPOINT_BYTES * run.size.total)
    if not sizes:
        return
    # While a checkpoint is written, the one before it is still there.
    largest = sorted(sizes, reverse=True)[:slots]
    needed = sum(largest)
    needed += sum(largest) if remove_checkpoints else sum(sizes)
    require_disk_space(
        folders.root,
        needed,
        "Free some space there, choose another --output, or delete the checkpoints of finished "
        "cells with --remove-checkpoints",
    )
