"""State of one cell of a study: state.json in the cell's folder, always written atomically."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.io.atomic_write import write_text

CELL_STATE_FILE = "state.json"

PLANNED = "planned"
RUNNING = "running"
INTERRUPTED = "interrupted"
FAILED = "failed"
FINISHED = "finished"


@dataclass(frozen=True)
class CellState:
    """What a cell is, and how far it is. A killed runner leaves the state `running`."""

    cell_id: str
    axes: dict[str, str]
    """label of the cell's value on each axis of the study, in the order of the file"""
    seed: int
    flags: dict[str, Any]
    """values of the cell's flags by name without dashes, as in the study file; without those
    that the runner adds, such as --save"""
    ranks: int = 1
    state: str = PLANNED
    """planned, running, interrupted, failed or finished"""
    error: str = ""
    """why the cell failed, in one line"""
    exit_code: int | None = None
    """exit code of the last attempt; negative: the number of the signal that ended it"""
    attempts: int = 0
    """how often a process was started for the cell"""
    wall_seconds: float = 0.0
    """running time of all attempts, including start-up and evaluations"""
    device: str = ""
    """device of the last attempt, as in --devices"""
    started: str = ""
    """start of the last attempt, ISO 8601 in UTC"""
    matched: list[str] = field(default_factory=lambda: ["total", "active"])
    """which of its numbers of parameters are compared with the reference's"""
    parameters_total: int | None = None
    active_parameters_planned: float | None = None
    """parameters that a token uses, before the run: exact for gates with a fixed number of
    experts per token, else from the declared `experts-per-token`; None: not declared"""
    active_parameters: float | None = None
    """parameters that a token used, measured in the last part of the training"""
    experts_per_token: float | None = None
    """experts that compute something per token and MoE layer, measured likewise"""
    flops_per_token: float | None = None
    """model FLOPs of a training step per token, from the last training row; None: not logged"""
    held_out_loss: float | None = None
    """loss of the last evaluation on the held-out set of the study, in nats"""
    held_out: str = ""
    """kind of the rows of metrics.jsonl that `held_out_loss` is from; empty: not known"""
    tuning: dict[str, Any] | None = None
    """how the value of a tuned flag was chosen: flag, value, seed, and losses, the held-out loss
    of each value of the grid (None: failed); None: nothing was tuned"""
    same_as: str = ""
    """path, relative to the cell's folder, of the folder of the tuning run that has all flags in
    common with this cell, and whose results are therefore the cell's; empty: it ran itself"""

    @property
    def has_started(self) -> bool:
        """Whether the cell has a run: one of its own, or one that it shares with a grid."""
        return bool(self.attempts or self.same_as)

    def run_folder(self, folder: Path) -> Path:
        """Return the folder of the run whose results are the cell's.

        Args:
            folder: of the cell.
        """
        return (folder / self.same_as).resolve() if self.same_as else folder

    def write(self, folder: Path) -> None:
        """Write the state to the folder of the cell.

        Raises:
            OSError: the file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        content = {"format": 1, **dataclasses.asdict(self)}
        write_text(folder / CELL_STATE_FILE, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> CellState | None:
        """Read the state of the cell in a folder; None if the folder holds none.

        Raises:
            ValueError: the file is not a state of this program.
        """
        path = folder / CELL_STATE_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); {_ADVICE}") from None
        names = {f.name for f in dataclasses.fields(CellState)}
        if not isinstance(content, dict) or _REQUIRED - content.keys():
            raise ValueError(f"{path} does not hold the state of a cell; {_ADVICE}")
        # Fields of later versions are ignored.
        return CellState(**{name: value for name, value in content.items() if name in names})


def read_states(parent: Path) -> list[tuple[Path, CellState]]:
    """Read the states of the cells below a folder, in the order of the names of their folders.

    Files there, and folders without a state, are passed over; without `parent` there are none.

    Raises:
        ValueError: a file is not a state of this program.
    """
    if not parent.is_dir():
        return []
    folders = [path for path in sorted(parent.iterdir()) if path.is_dir()]
    states = [(folder, CellState.read(folder)) for folder in folders]
    return [(folder, state) for folder, state in states if state is not None]


_ADVICE = "remove the folder of the cell, so that it runs again"
_REQUIRED = {"cell_id", "axes", "seed", "flags", "state"}
