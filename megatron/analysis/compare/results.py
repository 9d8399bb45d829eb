"""Results of a study, read from the folder that tools/compare_gates.py writes.

OUT/study.json              name, baseline, axes and matching of the study; the held-out set
OUT/cells/CELL/             state.json, command.txt, log.txt, metrics.jsonl, checkpoints/
OUT/tuning/CELL/            the same of the runs that chose the values of tuned flags
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.analysis.compare.cell_state import FINISHED, CellState, read_states
from megatron.io.atomic_write import write_text

STUDY_RECORD = "study.json"
CELLS_FOLDER = "cells"
TUNING_FOLDER = "tuning"


@dataclass(frozen=True)
class MatchRule:
    """Which cell the parameters of each cell are compared with, and how far they may differ."""

    reference: dict[str, str]
    """labels by axis. The reference of a cell has these labels, and the cell's own labels on the
    other axes."""
    total_tolerance: float | None = None
    """allowed relative difference of all parameters; None: not compared"""
    active_tolerance: float | None = None
    """allowed relative difference of the parameters that a token uses; None: not compared"""

    def reference_axes(self, axes: dict[str, str]) -> dict[str, str]:
        """Return the labels of the reference of a cell with these labels."""
        return {**axes, **self.reference}

    def deviations(
        self,
        total: float | None,
        active: float | None,
        reference_total: float | None,
        reference_active: float | None,
        matched: Sequence[str] = ("total", "active"),
    ) -> list[str]:
        """Describe in which of the two numbers of parameters a cell is not matched.

        Numbers that are not known, and those that `matched` does not name, are not compared.
        """
        found = []
        for name, ours, theirs, tolerance in (
            ("total", total, reference_total, self.total_tolerance),
            ("active", active, reference_active, self.active_tolerance),
        ):
            if name not in matched or tolerance is None or ours is None or theirs is None:
                continue
            share = abs(ours - theirs) / theirs
            if not share <= tolerance:
                found.append(
                    f"{name} parameters {ours:,.0f} against {theirs:,.0f} ({share:.1%} apart; "
                    f"tolerance {tolerance:.1%})"
                )
        return found


@dataclass(frozen=True)
class CellResult:
    """One cell of a study: a configuration with one seed."""

    cell_id: str
    axes: dict[str, str]
    """label of the cell's value on each axis, without the seed"""
    seed: int
    state: str
    """planned, running, interrupted, failed or finished"""
    error: str
    """why it failed, in one line; empty if it did not"""
    folder: Path
    """folder of the run, with metrics.jsonl, log.txt and command.txt"""
    metrics_path: Path
    flags: dict[str, Any]
    """values by flag, as in the study file, with the tuned value"""
    parameters_total: int | None
    active_parameters: float | None
    """parameters that a token used, measured in the last part of the training; None: the cell
    has not finished"""
    tuning: dict[str, Any] | None
    """flag, value, seed and losses (held-out loss by value of the grid) of the tuning"""
    mismatch: str = ""
    """how the measured parameters differ from the reference's by more than the tolerance, in one
    line; empty: they match, or nothing is to be matched"""
    active_parameters_planned: float | None = None
    experts_per_token: float | None = None
    """computing experts per token and MoE layer, measured in the last part of the training"""
    held_out_loss: float | None = None
    wall_seconds: float = 0.0
    attempts: int = 0
    matched: list[str] = field(default_factory=lambda: ["total", "active"])
    """which of its numbers of parameters are compared with the reference's"""

    @property
    def is_finished(self) -> bool:
        """Whether the cell ran to the end of its schedule."""
        return self.state == FINISHED


@dataclass(frozen=True)
class StudyResults:
    """All cells of a study's folder, in the order of the study file. Iterates over them."""

    name: str
    cells: list[CellResult]
    axes: list[str] = field(default_factory=list)
    """names of the axes, in the order of the file"""
    baseline: dict[str, str] = field(default_factory=dict)
    """labels of the configuration that the others are compared with, on some axes; a cell is
    compared with the cell that has its own labels on the others. Empty: none is declared"""
    held_out: str = "eval"
    """kind of the rows of metrics.jsonl that have the held-out loss: eval, test or eval/NAME"""
    match: MatchRule | None = None
    folder: Path = Path()

    def __iter__(self) -> Iterator[CellResult]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    @staticmethod
    def read(folder: str | Path) -> StudyResults:
        """Read the results in the output folder of a study, whatever state its cells are in.

        Cells of an earlier version of the study file that had other axes are left out.

        Raises:
            ValueError: the folder has no study.json, or a file in it is not of a study.
        """
        folder = Path(folder)
        record = StudyRecord.read(folder)
        if record is None:
            raise ValueError(
                f"{folder} has no {STUDY_RECORD}; allowed: the output folder of a study that "
                "tools/compare_gates.py started"
            )
        cells = [
            cell
            for cell in _read_cells(folder / CELLS_FOLDER, record.order)
            if list(cell.axes) == record.axes
        ]
        return StudyResults(
            name=record.name,
            cells=_with_mismatches(cells, record.match),
            axes=record.axes,
            baseline=record.baseline,
            held_out=record.held_out,
            match=record.match,
            folder=folder,
        )


@dataclass(frozen=True)
class StudyRecord:
    """study.json: what the results of a study need to know of its file."""

    name: str
    axes: list[str]
    baseline: dict[str, str] = field(default_factory=dict)
    held_out: str = "eval"
    match: MatchRule | None = None
    order: list[str] = field(default_factory=list)
    """ids of the cells in the order of the plan"""

    def write(self, folder: Path) -> None:
        """Write the record to the output folder of the study."""
        content = {"format": 1, **dataclasses.asdict(self)}
        write_text(folder / STUDY_RECORD, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> StudyRecord | None:
        """Read the record of an output folder; None: there is none.

        Raises:
            ValueError: the file is not a record of this program.
        """
        path = folder / STUDY_RECORD
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = {f.name for f in dataclasses.fields(StudyRecord)}
            values = {name: value for name, value in content.items() if name in names}
            if values.get("match") is not None:
                values["match"] = MatchRule(**values["match"])
            return StudyRecord(**values)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not the record of a study ({error}); remove it and start the study "
                "again: finished cells are not repeated"
            ) from None


def _read_cells(parent: Path, order: list[str]) -> list[CellResult]:
    """Read the cells below a folder: first those of the plan in its order, then others."""
    results = [_result(state, folder) for folder, state in read_states(parent)]
    places = {cell_id: place for place, cell_id in enumerate(order)}
    return sorted(results, key=lambda cell: places.get(cell.cell_id, len(places)))


def _result(state: CellState, folder: Path) -> CellResult:
    run_folder = state.run_folder(folder)
    return CellResult(
        cell_id=state.cell_id,
        axes=state.axes,
        seed=state.seed,
        state=state.state,
        error=state.error,
        folder=run_folder,
        metrics_path=run_folder / "metrics.jsonl",
        flags=state.flags,
        parameters_total=state.parameters_total,
        active_parameters=state.active_parameters,
        tuning=state.tuning,
        active_parameters_planned=state.active_parameters_planned,
        experts_per_token=state.experts_per_token,
        held_out_loss=state.held_out_loss,
        wall_seconds=state.wall_seconds,
        attempts=state.attempts,
        matched=state.matched,
    )


def _with_mismatches(cells: list[CellResult], match: MatchRule | None) -> list[CellResult]:
    """Flag finished cells whose measured parameters differ from those of their reference.

    The active parameters of a reference are the mean of those measured with its seeds, or the
    planned ones as long as none has finished.
    """
    if match is None:
        return cells
    flagged = []
    for cell in cells:
        labels = match.reference_axes(cell.axes)
        references = [other for other in cells if other.axes == labels]
        if not cell.is_finished or not references:
            flagged.append(cell)
            continue
        measured = [r.active_parameters for r in references if r.active_parameters is not None]
        active = references[0].active_parameters_planned
        if measured:
            active = math.fsum(measured) / len(measured)
        deviations = match.deviations(
            cell.parameters_total,
            cell.active_parameters,
            references[0].parameters_total,
            active,
            cell.matched,
        )
        flagged.append(dataclasses.replace(cell, mismatch="; ".join(deviations)))
    return flagged
