"""Cells of a study: every configuration with every seed, and the runs that tune a flag."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.analysis.compare.cell_flags import FlagValues, identity, to_words, without_length
from megatron.analysis.compare.study import (
    MATCHED,
    Axis,
    AxisValue,
    Study,
    Tuning,
    selected_labels,
    selects,
)

_LONGEST_ID = 120
"""Characters of a cell's id: folders may have 255 bytes, and checkpoints add to the path"""


@dataclass(frozen=True)
class Cell:
    """A configuration with one seed."""

    cell_id: str
    """name of the cell's folder"""
    axes: dict[str, str]
    """labels by axis, without the seed"""
    seed: int
    flags: FlagValues
    """with --seed; without a flag that is tuned, unless `with_tuned` has set it"""
    ranks: int = 1
    experts_per_token: float | None = None
    """declared estimate; None: not declared"""
    matched: tuple[str, ...] = MATCHED
    """which of its numbers of parameters are compared with the reference's"""
    is_tuning: bool = False
    """whether the run only chooses the value of a tuned flag"""
    tuning: Tuning | None = None
    """the grid of the flag that is still to be set"""

    @property
    def identity(self) -> str:
        """Hash of the flags and ranks."""
        return identity(self.flags, self.ranks)

    @property
    def words(self) -> list[str]:
        """The cell's flags on a command line."""
        return to_words(self.flags)

    def run_words(self, folder: Path) -> list[str]:
        """Return all flags of the cell's run: its own, and those that the runner adds.

        Args:
            folder: where the run writes its metrics and checkpoints, from which it continues.
        """
        checkpoints = str(folder / "checkpoints")
        words = [*self.words, "--save", checkpoints, "--load", checkpoints, "--load-or-init"]
        words += ["--metrics-file", str(folder / "metrics.jsonl")]
        if "keep-last" not in self.flags:
            words += ["--keep-last", "1"]
        return words

    def with_tuned(self, value: Any) -> Cell:
        """Return the cell with the chosen value of the tuned flag."""
        assert self.tuning is not None, f"{self.cell_id} has no tuned flag"
        return replace(self, flags={**self.flags, self.tuning.flag: value}, tuning=None)


@dataclass(frozen=True)
class TuningGroup:
    """The runs that choose the value of one flag of one configuration."""

    axes: dict[str, str]
    tuning: Tuning
    cells: tuple[Cell, ...]
    """one for each value of the grid, in its order"""


def build_cells(study: Study) -> list[Cell]:
    """Return all cells of a study: by configuration in the order of the axes, then by seed.

    Raises:
        ValueError: no cell is left, a flag is tuned by two grids, or two cells have the same
            name or the same flags.
    """
    cells = []
    for labels in selected_labels(study):
        values = tuple(
            (axis, axis.values[axis.labels().index(labels[axis.name])]) for axis in study.axes
        )
        for seed in study.seeds:
            cells.append(_cell(study, values, seed))
    if not cells:
        raise ValueError(
            f"{study.path} selects no cell: exclude, only and cells leave nothing of the axes; "
            "allowed: one cell or more"
        )
    _refuse_duplicates(cells)
    return cells


def reference_cell(study: Study, axes: dict[str, str]) -> Cell:
    """Return the cell with these labels and the first seed, whether it is selected or not."""
    values = []
    for axis, every in zip(study.axes, study.all_axes, strict=True):
        known = {value.label: value for value in (*every.values, *axis.values)}
        values.append((axis, known[axes[axis.name]]))
    return _cell(study, tuple(values), study.seeds[0])


def build_tuning_groups(cells: list[Cell]) -> list[TuningGroup]:
    """Return the runs that tune flags: one group for each configuration with a tuned flag."""
    groups = {}
    for cell in cells:
        key = tuple(cell.axes.items())
        if cell.tuning is None or key in groups:
            continue
        runs = tuple(_tuning_cell(cell, value) for value in cell.tuning.values)
        groups[key] = TuningGroup(cell.axes, cell.tuning, runs)
    return list(groups.values())


_Values = tuple[tuple[Axis, AxisValue], ...]


def _cell(study: Study, values: _Values, seed: int) -> Cell:
    labels = {axis.name: value.label for axis, value in values}
    flags = dict(study.base)
    experts_per_token = None
    matched = set(MATCHED)
    for axis, value in values:
        flags |= value.flags
        matched &= set(value.matched)
        if value.experts_per_token is not None and experts_per_token is not None:
            raise ValueError(
                f"{study.path}: axis {axis.name}: experts-per-token of {value.label} is "
                f"{value.experts_per_token:g}, and another axis sets it, too; allowed: a value "
                "on one of the axes of a cell"
            )
        experts_per_token = value.experts_per_token or experts_per_token
    flags["seed"] = seed
    found = [entry for entry in study.tuning if selects(entry.where, labels)]
    if len(found) > 1:
        raise ValueError(
            f"{study.path}: tune: --{found[0].flag} and --{found[1].flag} of {_shown(labels)} "
            "have a grid each; allowed: one grid for a configuration"
        )
    tuning = next(iter(found), None)
    if tuning is not None:
        flags.pop(tuning.flag, None)
    parts = [f"{name}-{label}" for name, label in labels.items()]
    return Cell(
        cell_id=_slug([*parts, f"seed-{seed}"]),
        axes=labels,
        seed=seed,
        flags={name: value for name, value in flags.items() if value is not None},
        ranks=study.ranks,
        experts_per_token=experts_per_token,
        matched=tuple(name for name in MATCHED if name in matched),
        tuning=tuning,
    )


def _tuning_cell(cell: Cell, value: Any) -> Cell:
    tuning = cell.tuning
    flags = dict(cell.flags)
    if tuning.tokens is not None:
        flags = without_length(flags) | {"train-tokens": tuning.tokens}
    flags["seed"] = tuning.seed
    parts = [f"{name}-{label}" for name, label in cell.axes.items()]
    return replace(
        cell,
        cell_id=_slug([*parts, f"{tuning.flag}-{value}", f"seed-{tuning.seed}"]),
        seed=tuning.seed,
        flags={**flags, tuning.flag: value},
        is_tuning=True,
        tuning=None,
    )


def _slug(parts: list[str]) -> str:
    """Join the parts of an id to the name of a folder; a long one ends in a hash."""
    text = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-") for part in parts)
    if len(text) <= _LONGEST_ID:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: _LONGEST_ID - 9]}-{digest}"


def _refuse_duplicates(cells: list[Cell]) -> None:
    """Raise ValueError for two cells with the same folder, or that would run the same."""
    by_id: dict[str, Cell] = {}
    by_flags: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        other = by_id.setdefault(cell.cell_id, cell)
        if other is not cell:
            raise ValueError(
                f"the cells {_shown(other.axes)} and {_shown(cell.axes)} would both have the "
                f"folder {cell.cell_id}; give their values labels that differ in letters or digits"
            )
        twin = by_flags.setdefault((cell.identity, repr(cell.tuning)), cell)
        if twin is not cell:
            raise ValueError(
                f"the cells {twin.cell_id} and {cell.cell_id} have the same flags; leave one out, "
                "or change what an axis sets"
            )


def _shown(labels: dict[str, str]) -> str:
    return " ".join(f"{name}={label}" for name, label in labels.items())
