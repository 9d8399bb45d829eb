"""The results of a study as a table: one line for each cell."""

from __future__ import annotations

from typing import Any

from megatron.analysis.compare.aligned_rows import aligned_rows
from megatron.analysis.compare.results import CellResult, StudyResults


def results_text(results: StudyResults) -> str:
    """Return one line for each cell, then what was tuned and which cells are not matched."""
    rows = [["cell", "state", "held-out loss", "active/token", "experts/token", "seconds"]]
    rows += [_row(cell) for cell in results]
    lines = [f"study {results.name}: {len(results)} cells", "", *aligned_rows(rows)]
    tuned = {}
    for cell in results:
        if cell.tuning is not None:
            labels = " ".join(f"{name}={label}" for name, label in cell.axes.items())
            tuned[labels] = cell.tuning
    for labels, tuning in tuned.items():
        losses = ", ".join(
            f"{value}: {_loss(loss)}" for value, loss in tuning["losses"].items()
        )
        lines.append(
            f"tuned: {labels}: --{tuning['flag']} {tuning['value']} (seed {tuning['seed']}; "
            f"held-out losses {losses}){_edge(tuning)}"
        )
    for cell in results:
        if cell.mismatch:
            lines.append(f"not matched: {cell.cell_id}: measured {cell.mismatch}")
    return "\n".join(lines)


def _edge(tuning: dict[str, Any]) -> str:
    """Return a note if the chosen number is the smallest or the largest of its grid."""
    try:
        grid = [float(value) for value in tuning["losses"]]
        value = float(tuning["value"])
    except ValueError:
        return ""  # no numbers
    if value not in (min(grid), max(grid)):
        return ""
    return "; it is at the edge of its grid: a value beyond it may be better"


def _row(cell: CellResult) -> list[str]:
    active = ""
    if cell.active_parameters is not None:
        active = f"{cell.active_parameters:,.0f}"
    experts = ""
    if cell.experts_per_token is not None:
        experts = f"{cell.experts_per_token:.2f}"
    loss = "" if cell.held_out_loss is None else _loss(cell.held_out_loss)
    seconds = f"{cell.wall_seconds:.1f}"
    return [cell.cell_id, cell.state, loss, active, experts, seconds]


def _loss(loss: float | None) -> str:
    return "failed" if loss is None else f"{loss:.4f}"
