"""Metric writer of TensorBoard event files."""

from __future__ import annotations

import json
from pathlib import Path

from megatron.optional_packages import import_optional
from megatron.training.metric_rows import RUN_KIND, MetricsRow, scalars
from megatron.training.writer_settings import WriterSettings


class TensorboardWriter:
    """Writes scalars `kind/name`; a list becomes `kind/name/0`, `kind/name/1`, ...

    Raises:
        ValueError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, first_iteration: int | None = None):
        """Open the event file of this run.

        Args:
            first_iteration: TensorBoard forgets what earlier runs in the folder logged from this
                iteration on: steps after the last checkpoint are repeated. None: nothing.
        """
        import_optional("tensorboard", "tensorboard", f"--tensorboard-dir {folder}")
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(folder), purge_step=first_iteration)

    @staticmethod
    def create(settings: WriterSettings) -> TensorboardWriter | None:
        folder = settings.logging.tensorboard_dir
        if not folder:
            return None
        first_iteration = settings.completed
        if first_iteration:
            # The row of the last completed iteration was written before, and is not repeated.
            first_iteration += 1
        return TensorboardWriter(folder, first_iteration)

    def write(self, row: MetricsRow) -> None:
        if row["kind"] == RUN_KIND:
            self.writer.add_text("run", _as_markdown(row), row["iteration"])
            self.writer.flush()
            return
        for tag, value in scalars(row):
            self.writer.add_scalar(tag, value, row["iteration"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _as_markdown(row: MetricsRow) -> str:
    """Format a row as a block of JSON, which TensorBoard shows as it is."""
    return "```json\n" + json.dumps(row, indent=1) + "\n```"
