"""Metric writer of Weights & Biases."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron.checkpoint.manifest import MANIFEST, read_manifest
from megatron.config.schema import LoggingConfig
from megatron.log import get_logger
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
from megatron.training.wandb_memory import WandbMemory, read_memory, write_memory
from megatron.training.writer_settings import WriterSettings

_FLUSH_SECONDS = 0.1
"""W&B writes its file this often. Its default of 15 s would lose what a killed run sent since."""

_FINISH_SECONDS = 300.0
"""A run waits this long at its end for a server that cannot be reached."""

_ITERATION = "/iteration"
"""End of the metric by which a run that resumes learns the last row of each kind"""


class WandbWriter:
    """Writes scalars, histograms, heat maps, settings and, if asked, checkpoints to a W&B run.

    Names are those of TensorBoard. Every row is a step of its own, with `iteration` as the axis
    of all charts. The run is remembered in the directory of --save, see
    `megatron.training.wandb_memory`.

    Raises:
        ValueError: the package wandb is not installed, or W&B refuses the settings.
    """

    def __init__(self, options: LoggingConfig, folder: str = "", resumes: bool = False):
        """Start a run, or continue the remembered one.

        Args:
            folder: where the run is remembered, and the default place of W&B's files.
            resumes: whether this run repeats steps that it logged before it was interrupted.
        """
        flag = f"--wandb-project {options.wandb_project}"
        self.wandb = import_optional("wandb", "wandb", flag)
        self._folder = folder
        self._logs_checkpoints = options.wandb_log_checkpoints
        self._remembers = False
        """whether the run is continued later: not an evaluation, and not a disabled one"""
        self._defined: set[str] = set()
        remembered = None
        if resumes:
            remembered = read_memory(folder, options.wandb_id)
        run_id = options.wandb_id
        if remembered is not None:
            run_id = remembered.id
        self.run = self._start(options, run_id)
        self._memory = remembered or WandbMemory(self.run.id)
        if self.run.resumed:
            self._memory = _memory_of_server(self.run)
        if not resumes:
            self._memory.last_iterations.clear()
        self.run.define_metric("iteration", hidden=True)
        self.run.define_metric("*", step_metric="iteration")

    @staticmethod
    def create(settings: WriterSettings) -> WandbWriter | None:
        if not settings.logging.wandb_project:
            return None
        return WandbWriter(settings.logging, settings.save, settings.completed is not None)

    def _start(self, options: LoggingConfig, run_id: str) -> Any:
        """Start the W&B run, or its offline twin if the server cannot be reached.

        Raises:
            ValueError: W&B refuses the settings, for example because no key is set.
        """
        try:
            return self._init(options, run_id, options.wandb_mode or None)
        except self.wandb.errors.UsageError as error:
            raise _refusal(
                options, error, "Run `wandb login`, or set --wandb-mode offline"
            ) from None
        except self.wandb.errors.Error as error:
            problem = _one_line(error)
        try:
            run = self._init(options, run_id, "offline")
        except self.wandb.errors.Error as error:
            raise _refusal(options, error, "Leave --wandb-project out") from None
        get_logger().error(
            "Weights & Biases cannot be reached: %s. The run is logged offline; `wandb sync` "
            "uploads it later",
            problem,
        )
        return run

    def _init(self, options: LoggingConfig, run_id: str, mode: str | None) -> Any:
        settings = {"x_transaction_log_flush_interval": _FLUSH_SECONDS}
        # The last checkpoint may take longer to send.
        if "WANDB_FINISH_TIMEOUT" not in os.environ and not options.wandb_log_checkpoints:
            settings["finish_timeout"] = _FINISH_SECONDS
        known = self.wandb.Settings.model_fields
        return self.wandb.init(
            project=options.wandb_project,
            entity=options.wandb_entity or None,
            name=options.wandb_exp_name or None,
            dir=_files_folder(options, self._folder),
            id=run_id or None,
            resume="allow",
            mode=mode,
            settings={name: value for name, value in settings.items() if name in known},
        )

    def write(self, row: MetricsRow) -> None:
        """Send a row, unless the run sent it before it was interrupted.

        Raises:
            OSError: W&B's process has ended, or what it has cannot be remembered.
        """
        kind = row["kind"]
        iteration = row["iteration"]
        if kind == RUN_KIND:
            self._describe_run(row)
            return
        if iteration <= self._memory.last_iterations.get(kind, -1):
            return
        self._send(lambda: self._log(row))
        self._memory.add(kind, iteration)
        if self._remembers:
            write_memory(self._folder, self._memory)

    def _log(self, row: MetricsRow) -> None:
        """Log a row as the next step."""
        kind_iteration = row["kind"] + _ITERATION
        if kind_iteration not in self._defined:
            self.run.define_metric(kind_iteration, step_metric="iteration", hidden=True)
            self._defined.add(kind_iteration)
        values = dict(scalars(row))
        values["iteration"] = row["iteration"]
        values[kind_iteration] = row["iteration"]
        values |= self._pictures(row)
        # Without `commit` W&B holds a row back until the next step begins.
        self.run.log(values, step=self._memory.next_step, commit=True)

    def _describe_run(self, row: MetricsRow) -> None:
        """Send the settings and the description of the run, and remember the run."""
        about = {name: row[name] for name in row.keys() - {"kind", "iteration", "config"}}
        config = {**row["config"], "run": about}
        self._send(lambda: self.run.config.update(config, allow_val_change=True))
        last = max(self._memory.last_iterations.values(), default=0)
        if last > row["iteration"]:
            get_logger().info(
                "Weights & Biases has this run up to iteration %d; what is repeated from "
                "iteration %d on is not sent again",
                last,
                row["iteration"] + 1,
            )
        self._remembers = not self.run.disabled
        if self._remembers:
            write_memory(self._folder, self._memory)

    def _pictures(self, row: MetricsRow) -> dict[str, Any]:
        """Return histograms, and heat maps of an evaluation, by tag."""
        pictures = {}
        for tag, fractions in histograms(row):
            edges = np.arange(len(fractions) + 1) - 0.5
            pictures[tag] = self.wandb.Histogram(np_histogram=(np.asarray(fractions), edges))
        if is_evaluation(row):
            for tag, shares in tables(row):
                pictures[tag] = self.wandb.Image(heat_map(shares))
                for layer, multiples_E in multiples_of_mean(shares):
                    buckets = np.histogram(multiples_E, LOAD_BUCKETS)
                    pictures[f"{tag}/{layer}"] = self.wandb.Histogram(np_histogram=buckets)
        return pictures

    def log_checkpoint(self, path: Path) -> None:
        """Send a committed checkpoint as a version of an artifact, if --wandb-log-checkpoints.

        W&B copies the files first: the checkpoint may be deleted while they are sent.

        Raises:
            OSError: the files cannot be read or copied.
        """
        if not self._logs_checkpoints:
            return
        manifest = read_manifest(path)
        name = f"checkpoint-{self.run.id}"
        metadata = {"iteration": manifest["iteration"]}

        def send() -> None:
            artifact = self.wandb.Artifact(name, type="model", metadata=metadata)
            for file in (*manifest["files"], MANIFEST):
                artifact.add_file(str(path / file), file)
            self.run.log_artifact(artifact, aliases=[path.name])

        self._send(send)

    def _send(self, call: Callable[[], Any]) -> None:
        """Call W&B. Its errors become OSError, which --on-save-error is about.

        An outage of the server is none: W&B's process keeps what it cannot send. If that
        process has ended, the errors are of several classes without a common base.
        """
        try:
            call()
        except Exception as error:
            raise OSError(
                f"Weights & Biases accepts nothing: {_one_line(error)}. metrics.jsonl has all "
                "metrics"
            ) from error

    def close(self) -> None:
        """End the run, as failed if an exception ends the program."""
        exit_code = int(sys.exc_info()[0] is not None)
        try:
            self._send(lambda: self.run.finish(exit_code))
        except OSError as error:
            get_logger().error("%s", error)


def _memory_of_server(run: Any) -> WandbMemory:
    """Return what the server has of a run that is continued online.

    It can lack rows that a killed process did not send in time; they are sent when the run
    repeats them.
    """
    last_values = dict(run.summary)
    iterations = {}
    for name, value in last_values.items():
        if name.endswith(_ITERATION):
            iterations[name.removesuffix(_ITERATION)] = int(value)
    return WandbMemory(run.id, int(last_values.get("_step", -1)) + 1, iterations)


def _files_folder(options: LoggingConfig, save: str) -> str | None:
    """Return where W&B makes its folder `wandb`; None: where its variable WANDB_DIR says."""
    if options.wandb_save_dir:
        return options.wandb_save_dir
    if "WANDB_DIR" in os.environ or not save:
        return None
    return save


def _refusal(options: LoggingConfig, error: Exception, remedy: str) -> ValueError:
    return ValueError(
        f"--wandb-project is {options.wandb_project!r}, but Weights & Biases refuses the run: "
        f"{_one_line(error)}. {remedy}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
