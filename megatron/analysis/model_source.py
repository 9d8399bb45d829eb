"""Where a tool finds a model to describe: a run, a checkpoint, or a Hugging Face folder.

run folder       OUTPUT_DIR of run.sh: metrics.jsonl, checkpoints/
checkpoints      the folder of --save, or one iter_* folder in it
run.json         a configuration, as of a checkpoint
Hugging Face     a folder with config.json; its weights are not read and may be missing
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.content import read_state
from megatron.checkpoint.directory import is_hf_folder, list_checkpoints
from megatron.checkpoint.inspect import resolve_checkpoint
from megatron.config.cli import to_flags
from megatron.config.format_version import with_version
from megatron.config.run_json import config_from_dict
from megatron.moe.experts.expert_type import KNOWN_EXPERT_TYPES
from megatron.moe.gate import gate_config_class
from megatron.training.metrics_file import read_metrics, without_repeated_steps

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
_ALLOWED = (
    "a run folder with metrics.jsonl or checkpoints, a folder of checkpoints, one checkpoint, a "
    "run.json, or a Hugging Face folder with config.json"
)


@dataclass(frozen=True)
class ModelSource:
    """What a path tells about a model and its training."""

    path: str
    flags: tuple[str, ...]
    """flags of pretrain_gpt.py that describe the model"""
    vocab_size: int = 0
    """tokens of the tokenizer; 0: not recorded"""
    ranks: int = 0
    """ranks of the run; 0: not recorded"""
    device: str = ""
    """type of the run's devices, cuda or cpu; empty: not recorded"""
    metrics_file: str = ""
    """metrics.jsonl of the run; empty: there is none"""
    training_row: dict[str, Any] | None = None
    """its last row of kind train, up to the checkpoint if the path is one"""


def find_model_source(path: str) -> ModelSource:
    """Find out what a path is, and read what it records.

    Raises:
        ValueError: it is none of the above, or a file in it is damaged.
        FileNotFoundError: it has no valid checkpoint.
    """
    folder = Path(path)
    if folder.is_file() and folder.suffix == ".json":
        return ModelSource(path, ("--config", path))
    if is_hf_folder(folder):
        return ModelSource(path, ("--init-from-hf", path))
    checkpoint = _find_checkpoint(folder)
    if checkpoint is not None:
        return _checkpoint_source(path, folder, checkpoint)
    if (folder / METRICS_FILE).is_file():
        return _metrics_source(path, folder / METRICS_FILE)
    raise ValueError(f"the model is {path!r}; allowed: {_ALLOWED}")


def _find_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that a folder means, None if it has none.

    Raises:
        FileNotFoundError: none of its checkpoints is valid.
    """
    for place in (folder, folder / CHECKPOINTS_FOLDER):
        if (place / "run.json").is_file() or any(list_checkpoints(place)):
            return resolve_checkpoint(place)
    return None


def _checkpoint_source(path: str, folder: Path, checkpoint: Path) -> ModelSource:
    state = read_state(checkpoint)
    metrics_file = ""
    row = None
    device = ""
    for place in (folder, checkpoint.parent, checkpoint.parent.parent):
        if (place / METRICS_FILE).is_file():
            metrics_file = str(place / METRICS_FILE)
            rows = read_metrics(metrics_file)
            last = state["progress"]["iteration"]
            if folder.resolve() != checkpoint.resolve():
                last = None  # the run may have trained on after its newest checkpoint
            row = _last_training_row(rows, last)
            device = _device_type(rows)
            break
    return ModelSource(
        path,
        ("--config", str(checkpoint / "run.json")),
        vocab_size=state["identity"]["tokenizer_vocab_size"],
        ranks=state["topology"]["ranks"],
        device=device,
        metrics_file=metrics_file,
        training_row=row,
    )


def _metrics_source(path: str, metrics_file: Path) -> ModelSource:
    """Read the configuration that a run without checkpoints wrote to its metrics.

    Raises:
        ValueError: an earlier version wrote it, which recorded none.
    """
    rows = read_metrics(metrics_file)
    starts = [row for row in rows if row.get("kind") == "run"]
    if not starts or "config" not in starts[-1]:
        raise ValueError(
            f"{metrics_file} has no row of kind run with a configuration, and there is no "
            f"checkpoint; allowed: {_ALLOWED}. Or give the flags of the run"
        )
    config = config_from_dict(with_version(starts[-1]["config"]), str(metrics_file))
    # Files that a run recorded are not executed: the user names them.
    config = replace(config, moe=replace(config.moe, gate_path=()))
    return ModelSource(
        path,
        tuple(to_flags(config, gate_config_class, KNOWN_EXPERT_TYPES)),
        ranks=starts[-1].get("world_size", 0),
        device=_device_type(starts),
        metrics_file=str(metrics_file),
        training_row=_last_training_row(rows),
    )


def _device_type(rows: list[dict[str, Any]]) -> str:
    """Return the type of device of the last start, empty if no start is recorded."""
    for row in reversed(rows):
        if row.get("kind") == "run" and "device" in row:
            return "cpu" if row["device"] == "cpu" else "cuda"
    return ""


def _last_training_row(
    rows: list[dict[str, Any]], last_iteration: int | None = None
) -> dict[str, Any] | None:
    """Return the last row of kind train, up to an iteration; None without any."""
    for row in reversed(without_repeated_steps(rows)):
        is_later = last_iteration is not None and row["iteration"] > last_iteration
        if row.get("kind") == "train" and not is_later:
            return row
    return None
