"""Metric writers: the console, metrics.jsonl, TensorBoard and Weights & Biases.

A row of metrics is a flat dict: `kind` (train, eval, eval/NAME for a named validation set,
test), `iteration`, and metrics with their units in their names, as scalars or, per layer, as
lists. The row of kind `run` describes the run instead, see `megatron.training.run_row`:

    loss perplexity aux_loss lr grad_norm tokens_per_s global_batch_size
    consumed_samples consumed_tokens
    experts_per_token_before_capacity experts_per_token load_imbalance_max_over_mean
    dropped_assignment_fraction tokens_with_drops_fraction top1_probability
    skipped_steps bad_steps loss_spikes elapsed_s step_time_ms, and <name>_by_layer

To add a writer, write a class like those below and add it to `_WRITERS`. Its flags are fields
of `LoggingConfig` (megatron/config/monitoring.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.config.schema import CheckpointConfig, LoggingConfig
from megatron.io.atomic_write import errors_with_path
from megatron.log import get_logger
from megatron.optional_packages import import_optional, require_package

MetricsRow = dict[str, Any]

RUN_KIND = "run"
"""`kind` of the row that describes a run instead of its metrics"""


@dataclass(frozen=True)
class WriterSettings:
    """What metrics writers are created from."""

    logging: LoggingConfig
    save: str
    """directory of the checkpoints, the default place of metrics.jsonl; empty: none"""
    iterations: int
    """optimizer steps of the full run"""
    tokens: int
    """tokens of the full run"""
    completed: int | None = None
    """iterations after which this run repeats what it logged before it was interrupted; None: it
    is not the one that logged before, or only evaluates, and repeats none"""


class MetricsWriter(Protocol):
    """What every writer of metrics does."""

    @staticmethod
    def create(settings: WriterSettings) -> MetricsWriter | None:
        """Create the writer, or return None if no flag enables it."""

    def write(self, row: MetricsRow) -> None: ...

    def close(self) -> None: ...


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

    def close(self) -> None:
        """Close all writers, also when one of them fails."""
        with contextlib.ExitStack() as stack:
            for writer in self.writers:
                stack.callback(writer.close)


class ConsoleWriter:
    """Logs one line per row, with the columns whose metrics the row has."""

    def __init__(self, iterations: int, tokens: int):
        self.iterations = iterations
        self.tokens = tokens

    @staticmethod
    def create(settings: WriterSettings) -> ConsoleWriter:
        return ConsoleWriter(settings.iterations, settings.tokens)

    def write(self, row: MetricsRow) -> None:
        if row["kind"] == RUN_KIND:  # the log describes the run in its own words
            return
        fields = [self._position(row)]
        fields += [column.text(row) for column in _COLUMNS if column.metric in row]
        is_train = row["kind"] == "train"
        if not is_train and "experts_per_token_by_layer" in row:
            by_layer = [
                _format(number, "{:.2f}") for number in row["experts_per_token_by_layer"]
            ]
            fields.append(f"by layer {' '.join(by_layer)}")
        if "elapsed_s" in row:
            fields.append(f"elapsed {_format_duration(row['elapsed_s'])}")
        if is_train and "consumed_tokens" in row:
            # Not by iterations, which take longer when the batch has grown.
            left_s = (self.tokens - row["consumed_tokens"]) / row["tokens_per_s"]
            fields.append(f"left {_format_duration(left_s)}")
        get_logger().info(" | ".join(fields))

    def _position(self, row: MetricsRow) -> str:
        """Format the row's kind and iteration, e.g. `iteration   10/1000`."""
        label = "iteration" if row["kind"] == "train" else f"{row['kind']} at"
        width = len(str(self.iterations))
        return f"{label} {row['iteration']:{width}d}/{self.iterations}"

    def close(self) -> None:
        """Do nothing: no file is open."""


class JsonlWriter:
    """Appends one JSON object per line to a file and flushes it.

    NaN and infinities are written as NaN, Infinity and -Infinity, which Python's json
    reads. Floats have 9 significant digits, enough to distinguish all fp32 values.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not buffered: a buffer would keep a part of a row that the disk had no space for.
        self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (closed by close)
        self._is_inside_line = False
        if self.file.tell() > 0:
            self.file.seek(-1, os.SEEK_END)
            # The previous run was killed inside a line, or its disk was full.
            self._is_inside_line = self.file.read(1) != b"\n"

    @staticmethod
    def create(settings: WriterSettings) -> JsonlWriter | None:
        if settings.logging.metrics_file:
            return JsonlWriter(settings.logging.metrics_file)
        if settings.save:
            return JsonlWriter(Path(settings.save) / "metrics.jsonl")
        return None

    def write(self, row: MetricsRow) -> None:
        rounded = {name: _round(value) for name, value in row.items()}
        line = json.dumps(rounded).encode() + b"\n"
        if self._is_inside_line:
            line = b"\n" + line
        with errors_with_path(self.path):
            while line:
                written = self.file.write(line)
                line = line[written:]
                self._is_inside_line = bool(line)

    def close(self) -> None:
        with errors_with_path(self.path):
            self.file.close()


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
        for tag, value in _scalars(row):
            self.writer.add_scalar(tag, value, row["iteration"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbWriter:
    """Writes the same scalars as `TensorboardWriter` to a Weights & Biases run.

    Raises:
        ValueError: the package wandb is not installed.
    """

    def __init__(self, project: str, name: str = ""):
        wandb = import_optional("wandb", "wandb", f"--wandb-project {project}")
        self.run = wandb.init(project=project, name=name or None)

    @staticmethod
    def create(settings: WriterSettings) -> WandbWriter | None:
        logging = settings.logging
        if not logging.wandb_project:
            return None
        return WandbWriter(logging.wandb_project, logging.wandb_exp_name)

    def write(self, row: MetricsRow) -> None:
        if row["kind"] == RUN_KIND:
            return
        self.run.log(dict(_scalars(row)), step=row["iteration"])

    def close(self) -> None:
        self.run.finish()


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


class ProgressBar:
    """A bar over the run's length on rank 0's stderr, if that is a terminal.

    While it is shown, the lines of our logger and of DeepSpeed's are written above it.
    Their handlers must exist already, so create it after `log.setup`.

    Args:
        total: length of the run.
        initial: progress at the start.
        unit: what both are counted in, such as "samples".
    """

    def __init__(self, total: int, initial: int = 0, unit: str = "iterations"):
        self._stack = contextlib.ExitStack()
        self._bar = None
        if not sys.stderr.isatty() or int(os.environ.get("RANK", 0)) != 0:
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._bar = self._stack.enter_context(
            tqdm(total=total, initial=initial, unit=f" {unit}", file=sys.stderr)
        )
        loggers = (get_logger(), logging.getLogger("DeepSpeed"))
        with_handlers = [logger for logger in loggers if logger.handlers]
        self._stack.enter_context(logging_redirect_tqdm(with_handlers))

    def move_to(self, progress: int) -> None:
        """Show this progress, of the total."""
        if self._bar is not None:
            self._bar.update(progress - self._bar.n)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Column:
    """A metric on the console."""

    metric: str
    template: str
    """Text with one {} field, whose width aligns the columns of consecutive lines."""
    detail: _Column | None = None
    """Another metric that follows in parentheses if the row has it."""

    def text(self, row: MetricsRow) -> str:
        text = _format(row[self.metric], self.template)
        if self.detail is not None and self.detail.metric in row:
            text += f" ({self.detail.text(row)})"
        return text


_COLUMNS = (
    _Column("loss", "loss {:8.5f}"),
    _Column("perplexity", "perplexity {:10.3f}"),
    _Column("aux_loss", "aux {:9.3e}"),
    _Column("lr", "lr {:9.3e}"),
    _Column("grad_norm", "grad norm {:7.3f}"),
    _Column("tokens_per_s", "{:9,.0f} tokens/s"),
    _Column(
        "experts_per_token",
        "experts/token {:5.2f}",
        _Column("experts_per_token_before_capacity", "before capacity {:5.2f}"),
    ),
    _Column("load_imbalance_max_over_mean", "load max/mean {:6.2f}"),
    _Column("dropped_assignment_fraction", "dropped {:6.2%}"),
    _Column("skipped_steps", "skipped {:3.0f}"),
    _Column("seconds", "{:6.1f} s"),
    _Column("failures", "failed {:2.0f}"),
    _Column("acc", "acc {:7.4f}"),
    _Column("acc_norm", "acc_norm {:7.4f}"),
    _Column("exact_match", "exact_match {:7.4f}"),
    _Column("word_perplexity", "perplexity per word {:10.3f}"),
    _Column("bits_per_byte", "bits per byte {:7.4f}"),
)


def _scalars(row: MetricsRow) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of every metric, one per element of a list."""
    for name, value in row.items():
        tag = f"{row['kind']}/{name}"
        if isinstance(value, (list, tuple)):
            for i, element in enumerate(value):
                if element is not None:  # a layer without this metric
                    yield f"{tag}/{i}", element
        elif name not in ("kind", "iteration"):
            yield tag, value


def _as_markdown(row: MetricsRow) -> str:
    """Format a row as a block of JSON, which TensorBoard shows as it is."""
    return "```json\n" + json.dumps(row, indent=1) + "\n```"


def _round(value: Any) -> Any:
    """Round floats, also inside a list, to 9 significant digits."""
    if isinstance(value, (list, tuple)):
        return [_round(element) for element in value]
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return value


def _format(value: float | None, template: str) -> str:
    """Format a number, or NaN and infinities by name, padded to a number's width.

    None, the value of a layer without the metric, is written as a dash.
    """
    if value is not None and math.isfinite(value):
        return template.format(value)
    prefix, _, rest = template.partition("{")
    suffix = rest.partition("}")[2]
    width = len(template.format(0)) - len(prefix) - len(suffix)
    if value is None:
        name = "-"
    elif math.isnan(value):
        name = "NaN"
    elif value > 0:
        name = "Infinity"
    else:
        name = "-Infinity"
    return prefix + name.rjust(width) + suffix


def _format_duration(seconds: float) -> str:
    """Format seconds as hours:minutes:seconds."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
