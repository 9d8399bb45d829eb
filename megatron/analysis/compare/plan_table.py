"""The plan of a study as a table: one line for each configuration."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.analysis.compare.aligned_rows import aligned_rows
from megatron.analysis.compare.cell_folders import CellFolders
from megatron.analysis.compare.cell_state import FINISHED, CellState
from megatron.analysis.compare.plan import PlannedCell, StudyPlan, configurations


def plan_text(plan: StudyPlan, folders: CellFolders, slots: int = 1) -> str:
    """Return the plan: sizes, tokens and states of the configurations, and the time that it takes.

    Time and FLOPs are those of the cells that have finished; there are none before the first.

    Args:
        slots: cells that run at the same time.
    """
    study = plan.study
    rows = [
        [
            "configuration",
            "seeds",
            "total",
            "active/token",
            "tokens",
            "FLOPs",
            "tuned",
            "finished",
        ]
    ]
    for tuning in plan.tunings:
        grid = tuning.group.tuning
        rows.append(_row(tuning.cells, folders, f"grid of {len(tuning.cells)} --{grid.flag}"))
    for cells in configurations(plan.cells).values():
        tuned = ""
        if cells[0].cell.tuning is not None:
            tuned = f"--{cells[0].cell.tuning.flag}"
        rows.append(_row(cells, folders, tuned))
    lines = [f"study {study.name}: {len(plan.cells)} cells, {len(plan.runs)} runs", ""]
    lines += aligned_rows(rows)
    lines.append("")
    lines += [f"not matched: {c.cell.cell_id}: {c.mismatch}" for c in plan.cells if c.mismatch]
    lines.append(_time_line(plan, folders, slots))
    return "\n".join(lines)


def _row(cells: Sequence[PlannedCell], folders: CellFolders, tuned: str) -> list[str]:
    first = cells[0]
    size = first.size
    if first.active is not None:
        active = _count(first.active)
        if not size.is_fixed:
            active = f"~{active}"
    else:
        active = f"{_count(size.active_min)} to {_count(size.active_max)}"
    seeds = list(dict.fromkeys(str(run.cell.seed) for run in cells))
    finished = sum(1 for run in cells if _is_finished(run, folders))
    return [
        " ".join(f"{name}={label}" for name, label in first.cell.axes.items()),
        " ".join(seeds),
        _count(size.total),
        active,
        f"{first.tokens:,}",
        _training_flops(cells, folders),
        tuned,
        f"{finished} of {len(cells)}",
    ]


def _training_flops(cells: Sequence[PlannedCell], folders: CellFolders) -> str:
    """Return the FLOPs of one complete training, as a finished cell measured; empty: unknown."""
    for run in cells:
        state = CellState.read(folders.of(run.cell))
        if state is not None and state.flops_per_token is not None:
            return f"{state.flops_per_token * run.tokens:.3g}"
    return ""


def _is_finished(run: PlannedCell, folders: CellFolders) -> bool:
    state = CellState.read(folders.of(run.cell))
    return state is not None and state.state == FINISHED


def _time_line(plan: StudyPlan, folders: CellFolders, slots: int) -> str:
    """Estimate the remaining time from the seconds per token of finished cells.

    A configuration without a finished cell counts as the mean of the others.
    """
    seconds_per_token: dict[tuple[str, ...], list[float]] = {}
    remaining = []
    for run in plan.runs:
        key = tuple(run.cell.axes.values())
        state = CellState.read(folders.of(run.cell))
        if state is None or state.state != FINISHED:
            remaining.append((key, run.tokens))
        elif not state.same_as:
            seconds_per_token.setdefault(key, []).append(state.wall_seconds / run.tokens)
    tokens = sum(number for _, number in remaining)
    text = f"remaining: {len(remaining)} runs, {tokens:,} tokens"
    if not seconds_per_token or not remaining:
        return text
    means = {key: sum(values) / len(values) for key, values in seconds_per_token.items()}
    overall = sum(means.values()) / len(means)
    seconds = sum(number * means.get(key, overall) for key, number in remaining)
    return f"{text}, about {_duration(seconds / min(slots, len(remaining)))}"


def _count(number: float) -> str:
    """Format a number of parameters."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.2f} {letter}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    if seconds >= 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds:.0f} seconds"
