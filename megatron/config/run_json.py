"""run.json: the configuration of a run as JSON, alone or inside a checkpoint."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.config.fields import flag_name, require, shortened
from megatron.config.flags import Flag, flags_of
from megatron.config.format_version import FORMAT_VERSION, migrate, with_version
from megatron.config.schema import RUN_JSON_LAYOUT, SECTIONS, RunConfig
from megatron.config.values import parse_value
from megatron.io.atomic_write import write_text
from megatron.io.untrusted import parse_json
from megatron.log import warn_on_rank0


def write_run_json(config: RunConfig, path: str | Path) -> None:
    """Write a configuration as JSON, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, run_json_text(config))


def run_json_text(config: RunConfig) -> str:
    """Return the content of a run.json."""
    return json.dumps(with_version(config.to_dict()), indent=2) + "\n"


def read_run_json(path: str | Path) -> RunConfig:
    """Read a configuration that `write_run_json` wrote, or that of a checkpoint's run.json.

    Raises:
        ValueError: the file cannot be read, or as `config_from_dict`.
    """
    return _config_from_current(load_config_json(path), str(path))


def config_from_dict(content: dict[str, Any], where: str = "run.json") -> RunConfig:
    """Build a configuration from the content of a run.json of any version.

    Missing keys take their defaults. Gate options are not checked: that is up to the gate's
    own Config.

    Args:
        where: source of `content` in error messages.
    Raises:
        ValueError: a newer version, an unknown key, or a value that its section refuses.
    """
    require(isinstance(content, dict), where, content, "a JSON object")
    return _config_from_current(migrate("run.json", content, where), where)


def _config_from_current(content: dict[str, Any], where: str) -> RunConfig:
    """Build a configuration from content as the current version writes it."""
    sections = parse_sections(content, where)
    gate_options = {}
    for gate, options in sections.pop("gate_options", {}).items():
        gate_options[gate] = _with_tuples(options)
    expert_options = _with_tuples(sections.pop("expert_options", {}))
    try:
        parts = {section: SECTIONS[section](**values) for section, values in sections.items()}
        return RunConfig(**parts, gate_options=gate_options, expert_options=expert_options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _with_tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with tuples in place of JSON's lists."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
    }


def load_config_json(path: str | Path) -> Any:
    """Load a run.json of any version as the current version writes it, without checking its keys.

    Raises:
        ValueError: the file cannot be read, is not JSON, or is of a newer version.
    """
    try:
        # Not only regular files: `--config <(command)` is a pipe.
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give the path of a run.json"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    require(isinstance(content, dict), str(path), content, "a JSON object")
    migrated = migrate("run.json", content, str(path))
    if "version" not in content and "config" not in content:
        _warn_of_migration(content, migrated, path)
    return migrated


def _warn_of_migration(
    content: dict[str, Any], migrated: dict[str, Any], path: str | Path
) -> None:
    """Log what a file without a version, which may be written by hand, is taken to mean."""
    before = content.get("moe")
    after = migrated.get("moe")
    if not isinstance(before, dict) or before == after:
        return
    changed = [
        f"{flag_name(name)} {value}"
        for name, value in after.items()
        if value != before.get(name)
    ]
    warn_on_rank0(
        "%s has no version and is read as the run of an older one, with %s; if it was written "
        'for this one, add "version": %d to it',
        path,
        ", ".join(changed),
        FORMAT_VERSION,
    )


def parse_sections(content: Any, where: str) -> dict[str, dict[str, Any]]:
    """Return the fields of each config section stored in a run.json, checked and typed.

    The options of each gate are returned as they are: the gate may not be known yet.

    Args:
        content: the parsed JSON.
        where: its source in error messages.
    Raises:
        ValueError: a key is unknown, or a value has the wrong type.
    """
    require(isinstance(content, dict), where, content, "a JSON object")
    for stored_section, values in content.items():
        if stored_section not in RUN_JSON_LAYOUT:
            raise ValueError(_unknown_key(where, stored_section, list(RUN_JSON_LAYOUT)))
        require(isinstance(values, dict), f"{where}: {stored_section}", values, "a JSON object")
    sections: dict[str, dict[str, Any]] = {}
    for stored_section, values in content.items():
        if stored_section == "expert_options":
            sections["expert_options"] = values
            continue
        if stored_section == "gate_options":
            for gate, options in values.items():
                key = f"{where}: gate_options.{shortened(gate)}"
                require(isinstance(options, dict), key, options, "a JSON object")
            sections["gate_options"] = dict(values)
            continue
        flags: list[Flag] = []
        for section in RUN_JSON_LAYOUT[stored_section]:
            flags += flags_of(SECTIONS[section], section)
        section_of = {flag.name: flag.section for flag in flags}
        typed = parse_stored_values(values, stored_section, flags, where)
        for name, value in typed.items():
            sections.setdefault(section_of[name], {})[name] = value
    return sections


def parse_stored_values(
    values: dict[str, Any], stored_section: str, flags: Iterable[Flag], where: str
) -> dict[str, Any]:
    """Check the keys of one section of run.json and convert its values to their types.

    Args:
        flags: flags of all fields that the section may hold.
        where: path of the file in error messages.
    Raises:
        ValueError: a key is unknown, or a value has the wrong type.
    """
    by_name = {flag.name: flag for flag in flags}
    typed = {}
    for name, value in values.items():
        key = f"{stored_section}.{name}"
        if name not in by_name:
            known = [f"{stored_section}.{field}" for field in by_name]
            raise ValueError(_unknown_key(where, key, known))
        typed[name] = parse_value(by_name[name], value, f"{where}: {key}")
    return typed


def _unknown_key(where: str, key: str, known: list[str]) -> str:
    """Return the message about an unknown key, with the most similar known one."""
    similar = difflib.get_close_matches(key[:100], known, n=1)
    if similar:
        advice = f"did you mean {similar[0]!r}?"
    else:
        advice = f"allowed: {' '.join(known)}"
    return f"{where}: unknown key {shortened(key)}; {advice}"
