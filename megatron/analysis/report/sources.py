"""Find the runs that a report is about: run folders, metrics files and folders of studies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron.analysis.compare.cell_state import PLANNED
from megatron.analysis.compare.results import CELLS_FOLDER, StudyResults

_METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class RunSource:
    """One run of a report: where its metrics are, and what is known of it without them."""

    path: Path
    """its metrics.jsonl, which a failed run may not have written"""
    name: str
    """name in tables"""
    label: str = ""
    """name of its group, if the user or a study gave one; runs with the same label are one group"""
    seed: int | None = None
    """seed of a study's cell; None: the run's own configuration has it"""
    state: str = ""
    """state of a study's cell: planned, running, interrupted, failed or finished"""
    error: str = ""
    """why a study's cell failed, in one line"""


def find_runs(arguments: Iterable[str]) -> list[RunSource]:
    """Find the runs of a command line.

    Args:
        arguments: run folders, metrics files or output folders of tools/compare_gates.py, each
            as PATH or LABEL=PATH.

    Raises:
        ValueError: a path does not exist, holds no run, or is given twice; or a file of a study
            cannot be read.
    """
    sources: list[RunSource] = []
    places: set[Path] = set()
    for argument in arguments:
        label, path = label_and_path(argument)
        found = _runs_below(path, label)
        for source in found:
            if source.path.resolve() in places:
                raise ValueError(
                    f"RUN is {argument!r}, but {source.path} is given twice; name each run once"
                )
        # Only now: cells of one study may share the run that both adopted from its tuning.
        places |= {source.path.resolve() for source in found}
        sources += found
    return _with_unique_names(sources)


def label_and_path(argument: str) -> tuple[str, Path]:
    """Divide LABEL=PATH where a path begins that exists; both may have equals signs."""
    parts = argument.split("=")
    if Path(argument).exists() or len(parts) == 1:
        return "", Path(argument)
    for place in range(1, len(parts)):
        path = Path("=".join(parts[place:]))
        if path.exists():
            return "=".join(parts[:place]), path
    return parts[0], Path("=".join(parts[1:]))


def _runs_below(path: Path, label: str) -> list[RunSource]:
    if not path.exists():
        raise ValueError(
            f"RUN is {str(path)!r}, which does not exist; allowed: a run folder (OUTPUT_DIR of "
            f"run.sh), a {_METRICS_FILE}, or the output folder of a comparison of gates; "
            "LABEL=PATH names it"
        )
    if path.is_file():
        folder = path.resolve().parent
        name = folder.name if path.name == _METRICS_FILE else path.stem
        return [RunSource(path, name, label)]
    if (path / _METRICS_FILE).is_file():
        return [RunSource(path / _METRICS_FILE, path.resolve().name, label)]
    if (path / CELLS_FOLDER).is_dir():
        return _study_cells(path, label)
    below = sorted(found.parent.name for found in path.glob(f"*/{_METRICS_FILE}"))
    advice = (
        f"name the folders below it: {', '.join(below[:8])}"
        if below
        else ("was the run started with --metrics-file? run.sh does that")
    )
    raise ValueError(f"{path} has no {_METRICS_FILE} and no {CELLS_FOLDER}/; {advice}")


def _study_cells(study: Path, label: str) -> list[RunSource]:
    """List the cells of a study that have started, in the study's order; none is an error."""
    cells = [
        cell
        for cell in StudyResults.read(study)
        if cell.state != PLANNED or cell.metrics_path.is_file()
    ]
    if not cells:
        raise ValueError(
            f"{study}/{CELLS_FOLDER} has no cell that has started; allowed: the output folder of "
            "a comparison of gates in which a cell has started"
        )
    return [
        RunSource(
            path=cell.metrics_path,
            name=cell.cell_id,
            label=", ".join(filter(None, [label, *cell.axes.values()])),
            seed=cell.seed,
            state=cell.state,
            error=cell.error,
        )
        for cell in cells
    ]


def _with_unique_names(sources: list[RunSource]) -> list[RunSource]:
    """Replace names that several runs have by their paths."""
    names = [source.name for source in sources]
    return [
        source
        if names.count(source.name) == 1
        else dataclasses.replace(source, name=str(source.path.parent))
        for source in sources
    ]
