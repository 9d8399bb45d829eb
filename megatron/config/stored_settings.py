"""Settings that a run takes from files: a run.json, and the config.json of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.config.run_json import load_config_json, parse_sections

ReadHFConfig = Callable[[str], dict[str, dict[str, Any]]]
"""Returns the settings of a Hugging Face model in the layout of run.json, by its directory"""

_REPLACED_SECTIONS = ("moe", "gate_options", "expert_options")


def load_stored_settings(
    config_path: str, hf_folder: str, read_hf_config: ReadHFConfig | None
) -> dict[str, dict[str, Any]]:
    """Return the fields of each config section that files set.

    The weights of a Hugging Face model fix its shape, so its settings take precedence over those
    of a run.json, whose gate and experts are then not used at all.

    Args:
        config_path: value of --config, or "".
        hf_folder: value of --init-from-hf, or "".
        read_hf_config: None: the program cannot start from such a model.
    Raises:
        ValueError: a file cannot be read, a key is unknown, or a value has the wrong type.
    """
    content: dict[str, Any] = {}
    if config_path:
        content = load_config_json(config_path)
    if not hf_folder:
        return parse_sections(content, config_path)
    if read_hf_config is None:
        raise ValueError(
            f"--init-from-hf is {hf_folder!r}; allowed: only in a training run. Leave it out here"
        )
    stored = parse_sections(content, config_path)
    model = parse_sections(read_hf_config(hf_folder), hf_folder)
    for section in _REPLACED_SECTIONS:
        stored[section] = model.pop(section, {})
    for section, values in model.items():
        stored[section] = stored.get(section, {}) | values
    return stored
