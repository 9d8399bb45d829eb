"""What an evaluation was measured on, for its JSON file."""

from __future__ import annotations

import os
from typing import Any

from megatron.checkpoint.directory import iteration_of
from megatron.initialize import Run


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
