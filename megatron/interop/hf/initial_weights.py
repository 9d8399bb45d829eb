"""Start a run from the weights of a Hugging Face folder, each rank reading its ranges of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from megatron.checkpoint.consolidate import is_gate_parameter
from megatron.config.fields import shortened
from megatron.config.run_json import run_json_text
from megatron.config.schema import TokenizerConfig
from megatron.engine.zero_shards import GlobalLayout, fill_weights
from megatron.interop.hf.convert import folder_config, open_hf_model
from megatron.interop.hf.families.moe_megatron import MODEL_SECTIONS
from megatron.interop.hf.registry import family_of
from megatron.interop.hf.source import read_config_json
from megatron.io.sha256 import FileDigest
from megatron.log import get_logger
from megatron.parallel.groups import Groups

Shapes = Mapping[str, tuple[int, ...]]
_TRAINING_FIELDS = ("seq_length", "attention_dropout", "hidden_dropout")
"""Fields of the section model that are the run's own"""


def read_hf_settings(folder: str) -> dict[str, dict[str, Any]]:
    """Return the settings that the config.json of a folder makes, in the layout of run.json.

    The tokenizer is that of the folder's files, if it has any.

    Raises:
        ValueError: config.json is missing or malformed, or the family or a key is not known.
    """
    path = Path(folder)
    content = read_config_json(path)
    config = folder_config(path, family_of(content), content)
    stored = json.loads(run_json_text(config))
    stored["tokenizer"] = {
        name: value
        for name, value in vars(config.tokenizer).items()
        if value != getattr(TokenizerConfig, name)
    }
    for name in _TRAINING_FIELDS:
        del stored["model"][name]
    return {section: stored[section] for section in MODEL_SECTIONS}


def load_hf_weights(model: nn.Module, groups: Groups, folder: str) -> None:
    """Fill a finished fp32 model with the weights and buffers of a folder.

    Call it before the engine is built. A gate other than that of the folder takes the tensors
    that both have, and keeps its initial values in the others.

    Raises:
        ValueError: The folder is not valid, or the model has other tensors outside the gates.
        OSError: A file cannot be read.
    """
    source = open_hf_model(folder)
    layout = GlobalLayout.of(model, groups)
    state = model.state_dict()
    shapes = dict(layout.shapes)
    shapes |= {name: tuple(state[name].shape) for name in layout.buffers}
    missing = _tensors_without_source(shapes, source.specs.all_shapes, folder)
    parameters = dict(model.named_parameters())

    def read(name: str, start: int, length: int) -> Any:
        if name in missing:
            return parameters[name].detach().reshape(-1)
        return source.weights.read(name, start, length)

    def buffer(name: str) -> Any:
        if name in missing:
            return state[name]
        return source.weights.buffer(name)

    fill_weights(model, layout, read, buffer)
    get_logger().info(
        "loaded the weights of %s, a model of the family %s; each rank reads its part",
        folder,
        source.source.family.name,
    )


def _tensors_without_source(ours: Shapes, theirs: Shapes, folder: str) -> set[str]:
    """Return the tensors of the model that the folder does not have: those of another gate.

    Raises:
        ValueError: Another tensor is missing on either side, or has another shape.
    """
    different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    for name in different:
        if is_gate_parameter(name):
            continue
        found = f"has the shape {list(theirs[name])}" if name in theirs else "does not exist"
        needed = f"has the shape {list(ours[name])}" if name in ours else "does not exist"
        raise ValueError(
            f"--init-from-hf is {folder!r}, in which {shortened(name)} {found}; in the model of "
            f"this run it {needed}. Leave out flags that change the model of its config.json"
        )
    missing = {name for name in different if name in ours}
    if missing:
        get_logger().info(
            "%d tensors of the gate are not in %s, such as %s: they start from their initial "
            "values",
            len(missing),
            folder,
            min(missing),
        )
    unused = [name for name in different if name not in ours]
    if unused:
        get_logger().info(
            "%d tensors of the gate in %s are not used, such as %s: the gate of this run does "
            "not have them",
            len(unused),
            folder,
            min(unused),
        )
    return missing


def write_origin(folder: str, checkpoint: Path) -> dict[str, FileDigest]:
    """Write the folder `hf/` of a checkpoint, see `HFModel.write_origin`.

    Args:
        folder: Hugging Face folder from which the run started.
        checkpoint: Unfinished directory of the checkpoint.

    Raises:
        OSError: A file cannot be read or written, or the folder is no longer valid: the
            checkpoint cannot be saved, for which --on-save-error has a rule.
    """
    try:
        source = open_hf_model(folder)
    except ValueError as error:
        raise OSError(f"--init-from-hf {folder} was changed during the run: {error}") from None
    return source.write_origin(checkpoint)
