"""The file `latest`, which names the checkpoint to resume from and which users edit to go back.

    <save>/latest        name of the checkpoint that was completed last, or of the user's choice
    <save>/latest.json   the name that this program wrote to `latest`, and the serial number of that
                         checkpoint; written after `latest`

When a run is killed between the commit of a checkpoint and the update of `latest`, an older name
is left there, as after an edit. `latest.json` distinguishes the two: then there is a checkpoint
with a higher serial number than the recorded one.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from megatron.config.fields import shortened
from megatron.io import atomic_write
from megatron.io.atomic_write import fsync_directory
from megatron.io.untrusted import parse_json, read_text_file
from megatron.log import get_logger

LATEST = "latest"
LATEST_RECORD = "latest.json"
_MAX_BYTES = 4096


class LatestRecord(NamedTuple):
    """What this program wrote to `latest`."""

    name: str
    """Name of the checkpoint"""
    serial: int
    """Its number in order of completion"""


def write_latest(directory: Path, name: str, serial: int) -> None:
    """Name a checkpoint that was just committed. A failure is logged: resuming works without."""
    try:
        atomic_write.write_text(directory / LATEST, name)
        record = json.dumps({"checkpoint": name, "serial": serial})
        atomic_write.write_text(directory / LATEST_RECORD, record + "\n")
        fsync_directory(directory)
    except OSError as error:
        # An old name would stand for a lost checkpoint when that one is deleted.
        for file in (LATEST, LATEST_RECORD):
            with contextlib.suppress(OSError):
                os.remove(directory / file)
        get_logger().warning(
            "%s is complete, but the file %s could not be updated: %s. Resuming does not need it",
            directory / name,
            LATEST,
            error,
        )


def read_latest(directory: Path) -> str:
    """Return the name in `latest`; empty if there is no such file.

    Raises:
        ValueError: It cannot be read.
    """
    marker = directory / LATEST
    try:
        return read_text_file(marker, _MAX_BYTES).strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise ValueError(f"{marker} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{marker} cannot be read: {error}") from None


def read_latest_record(directory: Path) -> LatestRecord | None:
    """Return what this program wrote to `latest`; None if that is not known."""
    try:
        content = parse_json(read_text_file(directory / LATEST_RECORD, _MAX_BYTES))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    record = LatestRecord(content.get("checkpoint"), content.get("serial"))
    if [type(value) for value in record] != [str, int]:
        return None
    return record


def latest_problem(directory: Path) -> str:
    """Return what is wrong with `latest`: it cannot be read, or its checkpoint does not exist.

    Then the newest checkpoint may be lost. Resuming from an older one, or starting from scratch,
    must not happen silently.
    """
    try:
        name = read_latest(directory)
    except ValueError as error:
        return str(error)
    if not name:
        return ""
    marker = directory / LATEST
    if not name.isprintable() or len(name) > 100 or Path(name).name != name:
        return f"{marker} holds {shortened(name)}, which is not the name of a checkpoint"
    if not (directory / name).is_dir():
        return f"{marker} names {name}, which does not exist"
    return ""
