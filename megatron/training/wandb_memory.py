"""What a run remembers of its Weights & Biases run, so that a resumed run continues it.

Weights & Biases cannot replace what it has: a run that is resumed from a checkpoint leaves out
the rows that were sent before it was interrupted.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron.config.fields import require
from megatron.io.atomic_write import errors_with_path, temporary_path

FILE_NAME = "wandb.json"
"""in the directory of --save"""


@dataclass
class WandbMemory:
    """The run and the last rows that were sent to it."""

    id: str
    """name of the run in its web address"""
    next_step: int = 0
    """number of rows sent, which counts W&B's own steps"""
    last_iterations: dict[str, int] = field(default_factory=dict)
    """iteration of the last row of each kind"""

    def add(self, kind: str, iteration: int) -> None:
        """Note that a row was sent."""
        self.last_iterations[kind] = iteration
        self.next_step += 1


def read_memory(folder: str, expected_id: str = "") -> WandbMemory | None:
    """Read what a run in this directory remembers; None: nothing, or of another id.

    Args:
        expected_id: id that the run must have; empty: any.
    Raises:
        ValueError: the file has other content.
    """
    path = Path(folder) / FILE_NAME
    if not folder or not path.is_file():
        return None
    try:
        memory = WandbMemory(**json.loads(path.read_text(encoding="utf-8")))
        is_valid = (
            isinstance(memory.id, str)
            and bool(memory.id)
            and isinstance(memory.next_step, int)
            and all(isinstance(last, int) for last in memory.last_iterations.values())
        )
    except (ValueError, TypeError, AttributeError):
        is_valid = False
    require(
        is_valid,
        str(path),
        "not valid",
        "the file that the run wrote",
        "Delete it: the run then starts another run in Weights & Biases, or continues that of "
        "--wandb-id.",
    )
    if expected_id not in ("", memory.id):
        return None
    return memory


def write_memory(folder: str, memory: WandbMemory) -> None:
    """Write it for a run that is resumed later. Without a directory it is not remembered.

    The file is replaced as a unit, but not synced: it is written with every row, and belongs
    to rows that are not synced, either.

    Raises:
        OSError: it cannot be written.
    """
    if not folder:
        return
    path = Path(folder) / FILE_NAME
    temporary = temporary_path(path)
    with errors_with_path(path):
        try:
            temporary.write_text(json.dumps(asdict(memory)) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
