"""Metric writer of TensorBoard event files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config.values import flatten_settings
from megatron.optional_packages import import_optional
from megatron.training.heat_map import heat_map
from megatron.training.metric_rows import (
    LOAD_BUCKETS,
    RUN_KIND,
    MetricsRow,
    histograms,
    is_evaluation,
    multiples_of_mean,
    scalars,
    tables,
)
from megatron.training.writer_settings import WriterSettings


class TensorboardWriter:
    """Writes scalars, histograms, heat maps and the description of the run.

    A scalar is named `kind/name`; a list by layer becomes `kind/name/0`, `kind/name/1`, ...
    Tables by layer and expert are drawn at evaluations only: at every log line they would be
    most of the files' size.

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
            self._describe_run(row)
        else:
            self._add_metrics(row)
        self.writer.flush()

    def _describe_run(self, row: MetricsRow) -> None:
        """Add the description as text, and the settings as hyperparameters."""
        # The first iteration that it describes: another resume from here replaces it.
        step = row["iteration"] + 1
        self.writer.add_text("run", _as_markdown(row), step)
        from torch.utils.tensorboard.summary import hparams

        metrics = dict.fromkeys(("train/loss", "eval/loss"))
        for summary in hparams(hyperparameters(row["config"]), metrics):
            self.writer.file_writer.add_summary(summary, step)

    def _add_metrics(self, row: MetricsRow) -> None:
        step = row["iteration"]
        for tag, value in scalars(row):
            self.writer.add_scalar(tag, value, step)
        for tag, fractions in histograms(row):
            self._add_histogram(tag, fractions, step)
        if not is_evaluation(row):
            return
        for tag, shares in tables(row):
            self.writer.add_image(tag, heat_map(shares), step, dataformats="HWC")
            for layer, multiples_E in multiples_of_mean(shares):
                self.writer.add_histogram(f"{tag}/{layer}", multiples_E, step, LOAD_BUCKETS)

    def _add_histogram(self, tag: str, fractions: Sequence[float], step: int) -> None:
        """Add the fractions of 0, 1, 2, ... as one bucket around each number."""
        fractions_C = np.asarray(fractions, dtype=float)
        numbers_C = np.arange(len(fractions))
        self.writer.add_histogram_raw(
            tag,
            min=-0.5,
            max=len(fractions) - 0.5,
            num=fractions_C.sum(),
            sum=fractions_C @ numbers_C,
            sum_squares=fractions_C @ numbers_C**2,
            bucket_limits=(numbers_C + 0.5).tolist(),
            bucket_counts=fractions_C.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        self.writer.close()


def hyperparameters(config: dict[str, Any]) -> dict[str, float | str | bool]:
    """Return the settings of a run.json as TensorBoard takes them, such as `optimizer.lr`.

    Lists are written as JSON. Settings without a value are left out.
    """
    return {
        setting: json.dumps(value) if isinstance(value, list) else value
        for setting, value in flatten_settings(config).items()
        if value is not None
    }


def _as_markdown(row: MetricsRow) -> str:
    """Format a row as a block of JSON, which TensorBoard shows as it is."""
    return "```json\n" + json.dumps(row, indent=1) + "\n```"
