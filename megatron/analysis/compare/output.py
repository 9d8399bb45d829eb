"""The output folder of a study: checked against a plan, and prepared for its runs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron.analysis.compare.cell_folders import CellFolders
from megatron.analysis.compare.cell_process import cell_lock
from megatron.analysis.compare.cell_state import FINISHED, CellState, read_states
from megatron.analysis.compare.cells import Cell
from megatron.analysis.compare.changed_cells import is_rerun, refuse_changed
from megatron.analysis.compare.held_out import measured_again
from megatron.analysis.compare.plan import PlannedCell, StudyPlan
from megatron.analysis.compare.results import CELLS_FOLDER, TUNING_FOLDER, StudyRecord
from megatron.io.disk_space import require_disk_space
from megatron.log import get_logger

_CHECKPOINT_BYTES = 16
"""Bytes of a checkpoint per parameter: fp32 weights and two moments, and weights in bf16 or fp32"""


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


def check_study_folder(
    plan: StudyPlan, folders: CellFolders, rerun: Sequence[str] | None = None
) -> dict[Path, CellState]:
    """Refuse what does not fit the plan in an output folder, and write nothing.

    Args:
        rerun: as in `prepare_output`.

    Returns:
        States to be written by folder, of `held_out.measured_again`.

    Raises:
        ValueError: as `changed_cells.refuse_changed` and `held_out.measured_again`.
    """
    refuse_changed(plan, folders, rerun)
    return measured_again(plan, folders, rerun)


def prepare_output(
    plan: StudyPlan, folders: CellFolders, rerun: Sequence[str] | None = None
) -> None:
    """Write study.json and the state of cells that are new; remove those that are to run again.

    The caller has locked the folder.

    Args:
        rerun: patterns of the ids of cells to run again; empty: those whose flags have changed
            since they ran; None: no cell.

    Raises:
        ValueError: the folder does not fit the plan (`check_study_folder`), or processes of an
            earlier runner still run a cell that is to run again; then nothing is removed.
        OSError: a file cannot be written.
    """
    study = plan.study
    measured = check_study_folder(plan, folders, rerun)
    folders.root.mkdir(parents=True, exist_ok=True)
    _remove([run.cell for run in plan.runs if is_rerun(run.cell, folders, rerun)], folders)
    StudyRecord(
        name=study.name,
        axes=[axis.name for axis in study.axes],
        baseline=study.baseline or {},
        held_out=study.held_out,
        match=study.match,
        order=[run.cell.cell_id for run in plan.runs],
    ).write(folders.root)
    for folder, state in measured.items():
        state.write(folder)
    for run in plan.runs:
        state = CellState.read(folders.of(run.cell))
        if state is None or not state.has_started:
            initial_state(run).write(folders.of(run.cell))
    _refresh(plan, folders)
    _pass_other_cells(plan, folders)


def _remove(cells: Sequence[Cell], folders: CellFolders) -> None:
    """Delete the folders of cells, when no process of an earlier runner writes to one of them."""
    found = [cell for cell in cells if folders.of(cell).exists()]
    with contextlib.ExitStack() as locks:
        for cell in found:
            locks.enter_context(cell_lock(folders.of(cell)))
        for cell in found:
            get_logger().info("cell %s: removed, to run again", cell.cell_id)
            shutil.rmtree(folders.of(cell))


def _refresh(plan: StudyPlan, folders: CellFolders) -> None:
    """Update what the study declares about configurations, also for seeds that ran before."""
    planned = {tuple(run.cell.axes.items()): run for run in plan.cells}
    for parent in (CELLS_FOLDER, TUNING_FOLDER):
        for folder, state in read_states(folders.root / parent):
            run = planned.get(tuple(state.axes.items()))
            if run is None:
                continue
            current = replace(
                state,
                matched=list(run.cell.matched),
                active_parameters_planned=run.active,
            )
            if current != state:
                current.write(folder)


def _pass_other_cells(plan: StudyPlan, folders: CellFolders) -> None:
    """Log which cells of earlier starts are not in this plan; those that never ran are removed."""
    planned = {run.cell.cell_id for run in plan.cells}
    parent = folders.root / CELLS_FOLDER
    others = []
    for folder, state in read_states(parent):
        if folder.name in planned:
            continue
        if state.has_started:
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
