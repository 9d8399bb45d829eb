"""Held-out losses of finished runs, when a study measures them on another set than before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron.analysis.compare.cell_folders import CellFolders
from megatron.analysis.compare.cell_state import FINISHED, CellState, read_states
from megatron.analysis.compare.changed_cells import is_rerun
from megatron.analysis.compare.measured import held_out_loss
from megatron.analysis.compare.plan import StudyPlan
from megatron.analysis.compare.results import CELLS_FOLDER, TUNING_FOLDER


def measured_again(
    plan: StudyPlan, folders: CellFolders, rerun: Sequence[str] | None = None
) -> dict[Path, CellState]:
    """Measure the held-out losses of finished runs that were measured on another set.

    States of earlier versions do not name the set, and are measured, too.

    Args:
        rerun: as in `prepare_output`.

    Returns:
        The new states by folder. Runs that the plan does not have lose their loss if they did not
        evaluate on the set.

    Raises:
        ValueError: a run of the plan that is not to run again did not evaluate on the set.
    """
    held_out = plan.study.held_out
    planned = {folders.of(run.cell): run.cell for run in plan.runs}
    found = {}
    for parent in (CELLS_FOLDER, TUNING_FOLDER):
        for folder, state in read_states(folders.root / parent):
            if state.state != FINISHED or state.held_out == held_out:
                continue
            cell = planned.get(folder)
            if cell is not None and is_rerun(cell, folders, rerun):
                continue
            loss = None
            try:
                metrics = state.run_folder(folder) / "metrics.jsonl"
                loss = held_out_loss(metrics, held_out)
            except ValueError as error:
                if cell is not None:
                    raise ValueError(
                        f"cell {state.cell_id} has finished, and {error}; with --rerun "
                        f"{state.cell_id} it runs again"
                    ) from None
            found[folder] = replace(state, held_out=held_out, held_out_loss=loss)
    return found
