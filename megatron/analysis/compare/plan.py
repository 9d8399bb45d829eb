"""Plan of a study: all cells, parsed, counted, matched and checked before anything starts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.analysis.compare.cell_size import CellSize, cell_size
from megatron.analysis.compare.cells import (
    Cell,
    TuningGroup,
    build_cells,
    build_tuning_groups,
    reference_cell,
)
from megatron.analysis.compare.run_data import check_data
from megatron.analysis.compare.study import Study
from megatron.checkpoint.metadata import TrainingProgress
from megatron.config.schema import RunConfig
from megatron.log import get_logger
from megatron.training.metric_writers import require_writer_packages
from megatron.training.plan import TrainingPlan

ParseFlags = Callable[[list[str]], RunConfig]
"""`megatron.pretrain.parse_flags`, which is in a higher layer"""


@dataclass(frozen=True)
class PlannedCell:
    """A cell with what its flags mean."""

    cell: Cell
    config: RunConfig
    size: CellSize
    iterations: int
    """optimizer steps of the complete training"""
    tokens: int
    """tokens of the complete training"""
    mismatch: str = ""
    """how its planned parameters differ from the reference's by more than the tolerance"""

    @property
    def extent(self) -> tuple[CellSize, int, int]:
        """Size and length, which a tuned flag may not change."""
        return (self.size, self.iterations, self.tokens)

    @property
    def extent_text(self) -> str:
        """Size and length for a message."""
        size = self.size
        return (
            f"{size.total:,} parameters, {size.active_min:,} to {size.active_max:,} per token, "
            f"{self.iterations:,} steps, {self.tokens:,} tokens"
        )

    @property
    def active(self) -> float | None:
        """Parameters that a token is expected to use; None: not declared."""
        return self.size.planned_active(self.cell.experts_per_token)


@dataclass(frozen=True)
class PlannedTuning:
    """The runs of one tuning, planned."""

    group: TuningGroup
    cells: tuple[PlannedCell, ...]


@dataclass(frozen=True)
class StudyPlan:
    """All runs of a study."""

    study: Study
    cells: tuple[PlannedCell, ...]
    tunings: tuple[PlannedTuning, ...]

    @property
    def runs(self) -> list[PlannedCell]:
        """All runs; those that tune flags come first."""
        return [cell for tuning in self.tunings for cell in tuning.cells] + list(self.cells)

    def require_matched(self) -> None:
        """Raise ValueError if the parameters of a cell do not match its reference's."""
        bad = [planned for planned in self.cells if planned.mismatch]
        if not bad:
            return
        others = ""
        if len(bad) > 1:
            others = f" ({len(bad)} cells are not matched)"
        raise ValueError(
            f"{self.study.path}: match: cell {bad[0].cell.cell_id}: {bad[0].mismatch}{others}. "
            "Change the size of its experts or what it declares, or raise match.tolerance"
        )


def plan_study(study: Study, parse_flags: ParseFlags) -> StudyPlan:
    """Plan a study: parse the flags of every run, count parameters, look for its data.

    Cells whose parameters do not match are in the plan; `StudyPlan.require_matched` refuses them.

    Raises:
        ValueError: no cell is left, two are the same, or a cell's flags are refused, its data
            are missing, or it has no held-out loss; the message names the cell.
        OSError: a file of a cell is missing.
    """
    planner = _Planner(study, parse_flags)
    cells = build_cells(study)
    with _no_repeated_warnings():
        groups = build_tuning_groups(cells)
        tunings = tuple(planner.plan_tuning(group) for group in groups)
        planned = tuple(planner.plan(cell) for cell in cells)
        planned = tuple(planner.with_mismatch(cell) for cell in planned)
    return StudyPlan(study, planned, tunings)


class _Planner:
    """Plans cells; models that differ only in the seed are counted once."""

    def __init__(self, study: Study, parse_flags: ParseFlags):
        self.study = study
        self.parse_flags = parse_flags
        self._sizes: dict[str, CellSize] = {}
        self._references: dict[tuple[str, ...], PlannedCell] = {}

    def plan(self, cell: Cell) -> PlannedCell:
        """Parse and check one cell; if a flag is still to be tuned, with each of its values."""
        if cell.tuning is None:
            return self._plan(cell)
        values = cell.tuning.values
        plans = [self._plan(cell.with_tuned(value)) for value in values]
        for value, planned in zip(values, plans, strict=True):
            if planned.extent != plans[0].extent:
                raise ValueError(
                    f"{self.study.path}: tune: --{cell.tuning.flag} changes what cell "
                    f"{cell.cell_id} is compared by: {value} gives {planned.extent_text}; "
                    f"{values[0]} gives {plans[0].extent_text}. Make it an axis of the study"
                )
        return replace(plans[0], cell=cell)

    def _plan(self, cell: Cell) -> PlannedCell:
        with _errors_of(cell):
            config = self.parse_flags(cell.run_words(Path("cell")))
            require_writer_packages(config.logging)
            self._require_held_out(config)
            length = TrainingPlan.of(
                config.train, config.model.seq_length, cell.ranks, TrainingProgress()
            )
            check_data(config)
            size = self._size(config)
        return PlannedCell(cell, config, size, length.end.iterations, length.end.tokens)

    def plan_tuning(self, group: TuningGroup) -> PlannedTuning:
        """Plan the runs of a grid."""
        return PlannedTuning(group, tuple(self.plan(cell) for cell in group.cells))

    def with_mismatch(self, planned: PlannedCell) -> PlannedCell:
        """Compare the parameters of a cell with those of its reference.

        Raises:
            ValueError: the gate of the cell or of its reference has no fixed number of experts
                per token and declares none.
        """
        match = self.study.match
        if match is None:
            return planned
        reference = self._reference(planned.cell)
        if match.active_tolerance is not None and "active" in planned.cell.matched:
            for compared in (planned, reference):
                self._require_declared(compared)
        deviations = match.deviations(
            planned.size.total,
            planned.active,
            reference.size.total,
            reference.active,
            planned.cell.matched,
        )
        mismatch = ""
        if deviations:
            mismatch = f"{'; '.join(deviations)} of the reference {reference.cell.cell_id}"
        return replace(planned, mismatch=mismatch)

    def _reference(self, cell: Cell) -> PlannedCell:
        axes = self.study.match.reference_axes(cell.axes)
        key = tuple(axes.values())
        if key not in self._references:
            self._references[key] = self.plan(reference_cell(self.study, axes))
        return self._references[key]

    def _require_declared(self, planned: PlannedCell) -> None:
        if planned.active is None:
            raise ValueError(
                f"{self.study.path}: match: the tokens of cell {planned.cell.cell_id} use from "
                f"{planned.size.active_min:,} to {planned.size.active_max:,} parameters; declare "
                "the mean number of experts that you expect as experts-per-token in the value of "
                "its axis, or set match.tolerance.active to null"
            )

    def _require_held_out(self, config: RunConfig) -> None:
        """Refuse a cell that would not measure the held-out loss."""
        kind = self.study.held_out
        if config.train.eval_iters == 0:
            raise ValueError("--eval-iters is 0; allowed: 1 or more, for the held-out loss")
        if kind.startswith("eval/"):
            name = kind.removeprefix("eval/")
            sets = config.data.named_valid_sets
            if name not in sets:
                known = " ".join(sets) or "none"
                raise ValueError(
                    f"eval.set of the study is {name!r}; allowed: valid, test, or a name of "
                    f"--valid-sets ({known})"
                )

    def _size(self, config: RunConfig) -> CellSize:
        sections = (
            config.model,
            config.moe,
            config.gate_options,
            config.expert_options,
            config.attention,
            config.rotary,
            config.tokenizer,
            config.data.mock_data,
        )
        key = repr(sections)
        if key not in self._sizes:
            self._sizes[key] = cell_size(config)
        return self._sizes[key]


@contextlib.contextmanager
def _errors_of(cell: Cell) -> Iterator[None]:
    """Make errors name the cell."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"cell {cell.cell_id}: {error}") from None
    except ValueError as error:
        raise ValueError(f"cell {cell.cell_id}: {error}") from None


@contextlib.contextmanager
def _no_repeated_warnings() -> Iterator[None]:
    """Log each warning of the cells' flags once: cells have most of their flags in common."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message in seen:
            return False
        seen.add(message)
        return True

    logger = get_logger()
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def configurations(cells: Iterable[PlannedCell]) -> dict[tuple[str, ...], list[PlannedCell]]:
    """Group cells that differ in their seed only; the keys are the labels on the axes."""
    groups: dict[tuple[str, ...], list[PlannedCell]] = {}
    for planned in cells:
        groups.setdefault(tuple(planned.cell.axes.values()), []).append(planned)
    return groups
