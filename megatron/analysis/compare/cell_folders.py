"""Folders of the runs of a study, and whether a run was made with the flags of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron.analysis.compare.cell_flags import changed_flags, identity
from megatron.analysis.compare.cell_state import CellState, read_states
from megatron.analysis.compare.cells import Cell
from megatron.analysis.compare.results import CELLS_FOLDER, TUNING_FOLDER


@dataclass(frozen=True)
class CellFolders:
    """Folders of the runs of a study."""

    root: Path

    def of(self, cell: Cell) -> Path:
        """Return the folder of a run."""
        parent = TUNING_FOLDER if cell.is_tuning else CELLS_FOLDER
        return self.root / parent / cell.cell_id

    def started(self, axes: dict[str, str] | None = None) -> list[CellState]:
        """Return the states of the cells that have started, without the runs of grids.

        Args:
            axes: labels of one configuration; None: of all.
        """
        states = [state for _, state in read_states(self.root / CELLS_FOLDER)]
        return [state for state in states if state.has_started and axes in (None, state.axes)]


def differs(state: CellState, cell: Cell) -> bool:
    """Return whether a run was made with other flags than the plan's.

    A tuned flag that is still to be set may have any value of its grid.
    """
    candidates = [cell]
    if cell.tuning is not None:
        candidates = [cell.with_tuned(value) for value in cell.tuning.values]
    ran = identity(state.flags, state.ranks)
    return all(ran != candidate.identity for candidate in candidates)


def difference(state: CellState, cell: Cell) -> str:
    """Describe in which flags and ranks a run differs from the plan's, for a message."""
    changes = [changed_flags(state.flags, cell.flags)]
    if state.ranks != cell.ranks:
        changes.append(f"{state.ranks} rank(s), now {cell.ranks}")
    return "; ".join(filter(None, changes))


def with_seed(cell: Cell, seed: int) -> Cell:
    """Return the cell of the same configuration with another seed."""
    return replace(cell, seed=seed, flags={**cell.flags, "seed": seed})
