"""Metric writer of Weights & Biases."""

from __future__ import annotations

from megatron.optional_packages import import_optional
from megatron.training.metric_rows import RUN_KIND, MetricsRow, scalars
from megatron.training.writer_settings import WriterSettings


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
        self.run.log(dict(scalars(row)), step=row["iteration"])

    def close(self) -> None:
        self.run.finish()
