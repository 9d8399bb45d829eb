"""Metric writers: the console, metrics.jsonl, TensorBoard and Weights & Biases.

To add a writer, write a class with `create`, `write` and `close` in a module of its own and add
it to `_WRITERS`. Its flags are fields of `LoggingConfig` (megatron/config/monitoring.py).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron.config.schema import CheckpointConfig, LoggingConfig
from megatron.log import get_logger
from megatron.optional_packages import require_package
from megatron.training.console_writer import ConsoleWriter
from megatron.training.jsonl_writer import JsonlWriter
from megatron.training.metric_rows import MetricsRow
from megatron.training.tensorboard_writer import TensorboardWriter
from megatron.training.wandb_writer import WandbWriter
from megatron.training.writer_settings import CheckpointLogger, MetricsWriter, WriterSettings


class MetricsWriters:
    """Several writers that are used as one; there are none on ranks other than 0.

    Args:
        on_error: "continue": a row that cannot be written, for example because the disk is
            full, is logged and lost, and the next one is tried again; "stop": the error is
            raised.
    """

    def __init__(self, writers: list[MetricsWriter], on_error: str = "stop"):
        self.writers = writers
        self.on_error = on_error
        self._lost_rows = dict.fromkeys(range(len(writers)), 0)
        """Consecutive rows that each writer has failed to write"""

    def write(self, row: MetricsRow) -> None:
        """Pass a row to all writers.

        Raises:
            OSError: a file cannot be written, and --on-save-error is stop.
        """
        for i, writer in enumerate(self.writers):
            try:
                writer.write(row)
            except OSError as error:
                if self.on_error == "stop":
                    raise
                self._count_lost_row(i, error)
                continue
            if self._lost_rows[i]:
                get_logger().warning(
                    "metrics are written again; %d row(s) were lost", self._lost_rows[i]
                )
                self._lost_rows[i] = 0

    def _count_lost_row(self, writer: int, error: OSError) -> None:
        """Log the first of consecutive failures of a writer."""
        self._lost_rows[writer] += 1
        if self._lost_rows[writer] == 1:
            get_logger().error(
                "%s. The training continues without metrics there, as --on-save-error sets",
                error,
            )

    def log_checkpoint(self, path: Path) -> None:
        """Pass a checkpoint that is complete to the writers that send checkpoints.

        Raises:
            OSError: it cannot be sent, and --on-save-error is stop.
        """
        for writer in self.writers:
            if not isinstance(writer, CheckpointLogger):
                continue
            try:
                writer.log_checkpoint(path)
            except OSError as error:
                if self.on_error == "stop":
                    raise
                get_logger().error(
                    "%s is not logged: %s. The training continues, as --on-save-error sets",
                    path,
                    error,
                )

    def close(self) -> None:
        """Close all writers, also when one of them fails."""
        with contextlib.ExitStack() as stack:
            for writer in self.writers:
                stack.callback(writer.close)


_WRITERS: tuple[type[MetricsWriter], ...] = (
    ConsoleWriter,
    JsonlWriter,
    TensorboardWriter,
    WandbWriter,
)


def require_writer_packages(logging: LoggingConfig) -> None:
    """Check that the packages of the writers that flags enable are installed.

    Only rank 0 writes, but every rank checks before it joins the others: none waits for a rank
    that has ended.

    Raises:
        ValueError: a package is not installed.
    """
    if logging.tensorboard_dir:
        flag = f"--tensorboard-dir {logging.tensorboard_dir}"
        require_package("tensorboard", "tensorboard", flag)
    if logging.wandb_project:
        require_package("wandb", "wandb", f"--wandb-project {logging.wandb_project}")


def build_metric_writers(
    logging: LoggingConfig,
    checkpoint: CheckpointConfig,
    rank: int,
    iterations: int,
    tokens: int,
    completed: int | None = None,
) -> MetricsWriters:
    """Create the console writer and the writers that flags enable, on rank 0 only.

    Args:
        checkpoint: --save is the default place of metrics.jsonl, and --on-save-error decides
            whether the run continues when a row cannot be written.
        iterations: optimizer steps of the full run.
        tokens: tokens of the full run.
        completed: see `WriterSettings`.

    Raises:
        ValueError: --wandb-project is set, but the package is not installed.
    """
    if rank != 0:
        return MetricsWriters([])
    settings = WriterSettings(logging, checkpoint.save, iterations, tokens, completed)
    created = [writer.create(settings) for writer in _WRITERS]
    writers = [writer for writer in created if writer is not None]
    return MetricsWriters(writers, checkpoint.on_save_error)
