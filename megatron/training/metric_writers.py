"""Where metrics go: the console, metrics.jsonl, TensorBoard, Weights & Biases. Only rank 0 has sinks.

A record is a flat dict: `kind` (train, eval, test), `iteration`, and metrics with their units in their names, as
scalars or, per layer, as lists. The same names everywhere:

    loss perplexity aux_loss lr grad_norm tokens_per_s consumed_samples consumed_tokens experts_per_token_before_capacity
    experts_per_token load_imbalance_max_over_mean dropped_assignment_fraction tokens_with_drops_fraction top1_probability
    skipped_steps bad_steps loss_spikes elapsed_s step_time_ms, and <name>_by_layer
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron.config.schema import LoggingConfig
from megatron.log import get_logger

MetricsRow = dict[str, Any]


class MetricsWriter(Protocol):
    def write(self, record: MetricsRow) -> None: ...

    def close(self) -> None: ...


class MetricsWriters:
    """Several sinks as one; none on ranks other than 0."""

    def __init__(self, sinks: list[MetricsWriter]):
        self.sinks = sinks

    def write(self, record: MetricsRow) -> None:
        for sink in self.sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def build_metric_writers(
    logging: LoggingConfig, save: str, rank: int, iterations: int
) -> MetricsWriters:
    """Build the console writer, and as configured those for metrics.jsonl, TensorBoard and Weights & Biases.

    Args:
        save: directory of the checkpoints, the default place of metrics.jsonl; empty: none.
        iterations: optimizer steps of the complete run.
    Raises:
        ValueError: --wandb-project without the package.
    """
    if rank != 0:
        return MetricsWriters([])
    sinks: list[MetricsWriter] = [ConsoleWriter(iterations)]
    metrics_file = logging.metrics_file
    if save and not metrics_file:
        metrics_file = str(Path(save) / "metrics.jsonl")
    if metrics_file:
        sinks.append(JsonlWriter(metrics_file))
    if logging.tensorboard_dir:
        sinks.append(TensorboardWriter(logging.tensorboard_dir))
    if logging.wandb_project:
        sinks.append(WandbWriter(logging.wandb_project, logging.wandb_exp_name))
    return MetricsWriters(sinks)


class JsonlWriter:
    """One JSON object a line, appended and flushed; not-a-number as NaN, infinities as Infinity, as Python reads them.

    Floats keep 9 significant digits: enough to tell any two fp32 values apart, and still readable.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")  # noqa: SIM115  (closed by close)
        if self.file.tell() > 0:
            self.file.seek(-1, 2)
            if self.file.read(1) != b"\n":  # the last run died inside a line
                self.file.write(b"\n")

    def write(self, record: MetricsRow) -> None:
        self.file.write(
            json.dumps({name: _rounded(value) for name, value in record.items()}).encode()
            + b"\n"
        )
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorboardWriter:
    """Scalars `kind/name`; a list becomes `kind/name/0`, `kind/name/1`, ..."""

    def __init__(self, folder: str | Path):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(folder))

    def write(self, record: MetricsRow) -> None:
        for tag, value in _scalars(record):
            self.writer.add_scalar(tag, value, record["iteration"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbWriter:
    """The same scalars in a Weights & Biases run.

    Raises:
        ValueError: the package wandb is not installed.
    """

    def __init__(self, project: str, name: str = ""):
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"--wandb-project is {project!r}, but the package wandb is not installed; "
                "pip install wandb, or leave the flag out"
            ) from None
        self.run = wandb.init(project=project, name=name or None)

    def write(self, record: MetricsRow) -> None:
        self.run.log(dict(_scalars(record)), step=record["iteration"])

    def close(self) -> None:
        self.run.finish()


class ConsoleWriter:
    """One log line a record, with the fields it has."""

    # name, form; {} is the number with its width, so that lines stand in columns
    FIELDS = (
        ("loss", "loss {:8.5f}"),
        ("perplexity", "perplexity {:10.3f}"),
        ("aux_loss", "aux {:9.3e}"),
        ("lr", "lr {:9.3e}"),
        ("grad_norm", "grad norm {:7.3f}"),
        ("tokens_per_s", "{:9,.0f} tokens/s"),
        ("experts_per_token_before_capacity", "experts/token {:6.3f}"),
        ("experts_per_token", "kept {:6.3f}"),
        ("load_imbalance_max_over_mean", "load max/mean {:6.2f}"),
        ("dropped_assignment_fraction", "dropped {:6.2%}"),
        ("skipped_steps", "skipped {:3.0f}"),
    )

    def __init__(self, iterations: int):
        self.iterations = iterations

    def write(self, record: MetricsRow) -> None:
        width = len(str(self.iterations))
        kind, iteration = record["kind"], record["iteration"]
        words = [
            f"{'iteration' if kind == 'train' else kind + ' at'} {iteration:{width}d}/{self.iterations}"
        ]
        words += [_form(form, record[name]) for name, form in self.FIELDS if name in record]
        if kind != "train" and "experts_per_token_by_layer" in record:
            words.append(
                "by layer "
                + " ".join(_form("{:.2f}", k) for k in record["experts_per_token_by_layer"])
            )
        if "elapsed_s" in record:
            words.append(f"elapsed {_clock(record['elapsed_s'])}")
        if kind == "train" and "step_time_ms" in record:
            words.append(
                f"left {_clock((self.iterations - iteration) * record['step_time_ms'] / 1000)}"
            )
        get_logger().info(" | ".join(words))

    def close(self) -> None:
        """Nothing is open."""


class ProgressBar:
    """A bar over the run's iterations on rank 0's stderr, if that is a terminal, and nothing otherwise.

    While it is shown, our log lines and DeepSpeed's are written above it, so start it after `log.setup`.
    """

    def __init__(self, total: int, initial: int = 0):
        self._stack, self._bar = contextlib.ExitStack(), None
        if sys.stderr.isatty() and int(os.environ.get("RANK", 0)) == 0:
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._bar = self._stack.enter_context(
                tqdm(total=total, initial=initial, unit="step", file=sys.stderr)
            )
            loggers = [
                logger
                for logger in (get_logger(), logging.getLogger("DeepSpeed"))
                if logger.handlers
            ]
            self._stack.enter_context(logging_redirect_tqdm(loggers))

    def update(self, iterations: int = 1) -> None:
        """So many more iterations are done."""
        if self._bar is not None:
            self._bar.update(iterations)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _scalars(record: MetricsRow) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, (list, tuple)):
            yield from (
                (f"{record['kind']}/{name}/{i}", element) for i, element in enumerate(value)
            )
        elif name not in ("kind", "iteration"):
            yield f"{record['kind']}/{name}", value


def _rounded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_rounded(element) for element in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _form(form: str, value: float) -> str:
    """The number in its form; NaN and Infinity by these names, as wide as a number."""
    if math.isfinite(value):
        return form.format(value)
    head, _, rest = form.partition("{")
    tail = rest.partition("}")[2]
    name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return head + name.rjust(len(form.format(0)) - len(head) - len(tail)) + tail


def _clock(seconds: float) -> str:
    minutes, second = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
