"""What metric writers have in common: what they are created from, and what they do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from megatron.config.schema import LoggingConfig
from megatron.training.metric_rows import MetricsRow


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


@runtime_checkable
class CheckpointLogger(Protocol):
    """What a writer does that sends checkpoints, too."""

    def log_checkpoint(self, path: Path) -> None: ...
