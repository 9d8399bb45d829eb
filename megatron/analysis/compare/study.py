"""A study: configurations of pretrain_gpt.py that are compared, as its YAML file describes them.

`study_file.py` reads the file; `docs/comparing-gates.md` describes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.analysis.compare.cell_flags import FlagValues
from megatron.analysis.compare.results import MatchRule

MATCHED = ("total", "active")
"""Numbers of parameters that `match` compares"""

Labels = dict[str, tuple[str, ...]]
"""Labels by axis: a cell is selected if its label on each of these axes is among them"""


def selects(where: Labels, axes: Mapping[str, str]) -> bool:
    """Return whether a cell with these labels is selected."""
    return all(axes[name] in labels for name, labels in where.items())


@dataclass(frozen=True)
class AxisValue:
    """One value of an axis."""

    label: str
    """name of the value in tables, folders and on the command line"""
    flags: FlagValues
    experts_per_token: float | None = None
    """declared estimate of the mean number of experts that compute something for a token, in
    every MoE layer; needed for gates that decide how many there are"""
    matched: tuple[str, ...] = MATCHED
    """which of its numbers of parameters are compared with the reference's; a dense model of equal
    active parameters, for example, has fewer in total"""


@dataclass(frozen=True)
class Axis:
    """One axis of a study."""

    name: str
    values: tuple[AxisValue, ...]
    flag: str
    """the flag that a value sets which is not a mapping"""

    def labels(self) -> list[str]:
        """Return the labels of the values, in the order of the file."""
        return [value.label for value in self.values]


@dataclass(frozen=True)
class Tuning:
    """A grid of one flag, of which the value with the lowest held-out loss is chosen.

    It is chosen for each configuration by itself, and used with all of its seeds.
    """

    where: Labels
    """the configurations whose flag is tuned; empty: all"""
    flag: str
    values: tuple[Any, ...]
    seed: int
    tokens: int | None = None
    """training tokens of each run of the grid; None: as many as the cells have"""


@dataclass(frozen=True)
class Study:
    """Content of a study file."""

    path: str
    name: str
    base: FlagValues
    """flags of all cells; those of an axis replace them"""
    axes: tuple[Axis, ...]
    """with the values that the command line selected"""
    seeds: tuple[int, ...]
    all_axes: tuple[Axis, ...] = ()
    """with all values of the file: the reference of `match` need not be selected"""
    exclude: tuple[Labels, ...] = ()
    """cells that any of these selects are left out"""
    only: tuple[Labels, ...] = ()
    """only cells that any of these selects are left; empty: all"""
    cells: tuple[dict[str, str], ...] = ()
    """labels of the configurations, instead of all combinations; empty: all combinations"""
    match: MatchRule | None = None
    tuning: tuple[Tuning, ...] = ()
    baseline: dict[str, str] | None = None
    held_out: str = "eval"
    """kind of the rows of metrics.jsonl with the held-out loss"""
    ranks: int = 1
    """processes of each cell"""


def selected_labels(study: Study) -> Iterator[dict[str, str]]:
    """Yield the labels, by axis, of each configuration that a study selects, in its order."""
    for labels in itertools.product(*(axis.labels() for axis in study.axes)):
        by_axis = {axis.name: label for axis, label in zip(study.axes, labels, strict=True)}
        if study.cells and by_axis not in study.cells:
            continue
        if study.only and not any(selects(where, by_axis) for where in study.only):
            continue
        if not any(selects(where, by_axis) for where in study.exclude):
            yield by_axis
