"""Version of the JSON files that describe runs and checkpoints, and migrations of older ones.

Each of `run.json`, `state.json`, `index.json` and `manifest.json` has an integer "version". A
change that an older version of this program would misread, or that makes an older file
unreadable, needs a new version: raise FORMAT_VERSION, add a function from the last version to the
new one to MIGRATIONS, and store a checkpoint of the new version in `tests/checkpoint/versions/`.
A new key with a default needs none: missing keys take their defaults.

    version 0   run.json only: the configuration under the key "config"
    version 1   no key "version"; the format of a manifest ends in " 1"
    version 2   the key "version"; descriptions of data files have a "content_id"
    version 3   run.json: settings of MoE layers with another meaning; see `run_json_v3`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.config import run_json_v3

FORMAT_VERSION = 3
CHECKPOINT_FORMAT = "moe-megatron checkpoint"
"""The format in a manifest; version 1 had its number here"""
_KEY = "version"
_FIRST_VERSION = 1
"""Version of a file without the key"""

Content = dict[str, Any]


class NewerVersionError(ValueError):
    """A file was written by a newer version of this program, which this one may misread."""


def with_version(content: Content) -> Content:
    """Return the content of a file that is written now, with the current version first."""
    return {_KEY: FORMAT_VERSION, **content}


def migrate(name: str, content: Content, where: str) -> Content:
    """Return the content of a file as the current version writes it, without its version.

    Args:
        name: Name that the file has in a checkpoint.
        where: Path of the file, for messages.

    Raises:
        NewerVersionError: The file is of a newer version.
        ValueError: Its version is not one.
    """
    content = dict(content)
    version = content.pop(_KEY, _version_without_key(name, content))
    if type(version) is not int or version < 0:
        raise ValueError(
            f"{where}: version is {str(version)[:100]!r}; allowed: an integer up to "
            f"{FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise NewerVersionError(
            f"{where} has format version {str(version)[:100]}; this version of moe-megatron reads "
            f"versions up to {FORMAT_VERSION}. Update moe-megatron to the version that wrote it"
        )
    for older in range(version, FORMAT_VERSION):
        migration = MIGRATIONS[older].get(name)
        if migration is not None:
            content = migration(content)
    return content


def _version_without_key(name: str, content: Content) -> int:
    if name == "run.json" and "config" in content:
        return 0
    return _FIRST_VERSION


# Migrations get the content without its version, whose types are not checked yet.


def _run_json_0_to_1(content: Content) -> Content:
    """Take the configuration out of a file that also described tokenizer and topology."""
    config = content.get("config")
    return config if isinstance(config, dict) else content


def _manifest_1_to_2(content: Content) -> Content:
    if content.get("format") == f"{CHECKPOINT_FORMAT} 1":
        content["format"] = CHECKPOINT_FORMAT
    return content


def _state_1_to_2(content: Content) -> Content:
    """Mark the content of data files as unknown: version 1 recorded sizes only."""
    data = content.get("data")
    if not isinstance(data, dict):
        return content
    described = {}
    for prefix, files in data.items():
        described[prefix] = {"content_id": "", **files} if isinstance(files, dict) else files
    return {**content, "data": described}


MIGRATIONS: dict[int, dict[str, Callable[[Content], Content]]] = {
    0: {"run.json": _run_json_0_to_1},
    1: {"manifest.json": _manifest_1_to_2, "state.json": _state_1_to_2},
    2: {"run.json": run_json_v3.migrate_run_json},
}
"""By version and file name, the function that makes a file one version newer; files without one
did not change"""
