"""What an evaluation was measured on, for its JSON file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron.checkpoint.directory import iteration_of
from megatron.inference.chat import template_folders
from megatron.initialize import Run


def folders_of_tokenizer(run: Run, load: str) -> list[Path]:
    """Return folders that may have a chat template and a generation_config.json.

    Args:
        load: as in `describe_source`.
    """
    checkpoint = run.checkpoint and run.checkpoint.path
    return template_folders(load, checkpoint, run.config.tokenizer.tokenizer_model)


def describe_source(run: Run, load: str) -> dict[str, Any]:
    """Return the weights and the tokenizer of a run as JSON values.

    Args:
        load: what the user named, a directory of checkpoints or a Hugging Face folder.
    """
    path = os.path.abspath(load)
    iteration = None
    if run.checkpoint is not None:
        path = os.path.abspath(run.checkpoint.path)
        iteration = iteration_of(run.checkpoint.path)
    return {"load": path, "iteration": iteration, "tokenizer": run.tokenizer.name}
