"""Chooses the values of tuned flags from the runs of their grids."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.analysis.compare.cell_folders import CellFolders
from megatron.analysis.compare.cell_state import FINISHED, CellState
from megatron.analysis.compare.plan import PlannedCell, PlannedTuning


def choose(tuning: PlannedTuning, folders: CellFolders) -> dict[str, Any] | None:
    """Return the value with the lowest held-out loss, and how it was chosen.

    Runs that have failed, and losses that are not finite, are passed over.

    Returns:
        flag, value, seed, tokens (of each run) and losses (held-out loss by value; None: failed);
        None: no run has finished with a finite loss.
    """
    losses: dict[str, float | None] = {}
    best = math.inf
    chosen = None
    grid = tuning.group.tuning
    for value, planned in zip(grid.values, tuning.cells, strict=True):
        loss = None
        state = CellState.read(folders.of(planned.cell))
        if state is not None and state.state == FINISHED:
            loss = state.held_out_loss
        losses[str(value)] = loss
        if loss is not None and loss < best:
            best = loss
            chosen = value
    if chosen is None:
        return None
    return {
        "flag": grid.flag,
        "value": chosen,
        "seed": grid.seed,
        "tokens": tuning.cells[0].tokens,
        "losses": losses,
    }


@dataclass(frozen=True)
class SharedRun:
    """A finished tuning run that has all flags in common with a cell."""

    state: CellState
    relative_path: str
    """of its folder, from the cell's"""


def shared_run(
    planned: PlannedCell, tunings: Sequence[PlannedTuning], folders: CellFolders
) -> SharedRun | None:
    """Return the finished tuning run whose flags are those of a cell; None: there is none."""
    own = folders.of(planned.cell)
    for tuning in tunings:
        for run in tuning.cells:
            folder = folders.of(run.cell)
            if folder == own or run.cell.identity != planned.cell.identity:
                continue
            state = CellState.read(folder)
            if state is not None and state.state == FINISHED:
                return SharedRun(state, os.path.relpath(folder, own))
    return None
