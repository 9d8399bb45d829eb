"""Manifest of a checkpoint: size and SHA-256 of every file, by which damage is found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.config.format_version import (
    CHECKPOINT_FORMAT,
    NewerVersionError,
    migrate,
    with_version,
)
from megatron.io import atomic_write
from megatron.io.progress import ProgressCallback, no_progress
from megatron.io.sha256 import FileDigest, digest_bytes, file_sha256
from megatron.io.untrusted import read_json_file

MANIFEST = "manifest.json"
HF_FOLDER = "hf"
"""Folder in a checkpoint with what a Hugging Face model had besides our tensors"""
JSON_FILES = ("run.json", "state.json", "index.json")
"""Files without tensors that every checkpoint has"""


class CorruptCheckpointError(ValueError):
    """A checkpoint is incomplete or damaged; the message names the file and the problem."""


def write_with_digest(path: Path, text: str) -> FileDigest:
    """Write a small file atomically and return its digest for the manifest."""
    content = text.encode()
    atomic_write.write_bytes(path, content)
    return digest_bytes(content)


def copy_with_digest(source: Path, target: Path) -> FileDigest:
    """Copy a file, following links, sync the copy to the disk, and return its digest."""
    shutil.copyfile(source, target)
    atomic_write.fsync_path(target)
    return FileDigest(os.path.getsize(target), file_sha256(target))


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises:
        CorruptCheckpointError: The file is missing, is not JSON, or is not a regular file.
    """
    try:
        return read_json_file(path)
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error}") from None


def migrate_json(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON file of a checkpoint as the current version writes it.

    Raises:
        CorruptCheckpointError: Its version is not one.
        NewerVersionError: It was written by a newer version of this program.
    """
    try:
        return migrate(file.name, content, str(file))
    except NewerVersionError:
        raise
    except ValueError as error:
        raise CorruptCheckpointError(str(error)) from None


def write_manifest(
    path: Path, iteration: int, serial: int, files: dict[str, FileDigest]
) -> None:
    """Write the manifest of the checkpoint in directory `path`, once all its files are synced.

    Args:
        serial: Number of the checkpoint in order of completion.
        files: Digest of every other file, by name.
    """
    manifest = with_version(
        {
            "format": CHECKPOINT_FORMAT,
            "iteration": iteration,
            "serial": serial,
            "files": {name: list(files[name]) for name in sorted(files)},
        }
    )
    manifest["checksum"] = manifest_checksum(manifest)
    atomic_write.write_text(path / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the checkpoint in directory `path`.

    Returns:
        The manifest: format, iteration, serial, files {name: [bytes, sha256]}, checksum.

    Raises:
        CorruptCheckpointError: It is missing, was changed after it was written, or does not
            name the files that every checkpoint has.
        NewerVersionError: The checkpoint was written by a newer version of this program.
    """
    file = path / MANIFEST
    if not file.exists() and any(path.glob("*_model_states.pt")):
        raise CorruptCheckpointError(
            f"{path} has files of a DeepSpeed checkpoint and no {MANIFEST}: it was written by an "
            "earlier version of this program or by another one, and cannot be read"
        )
    manifest = read_json(file)
    if not isinstance(manifest, dict) or not str(manifest.get("format")).startswith(
        CHECKPOINT_FORMAT
    ):
        raise CorruptCheckpointError(f"{file} is not the manifest of a {CHECKPOINT_FORMAT!r}")
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise CorruptCheckpointError(f"{file} is corrupt: its checksum does not match")
    manifest = migrate_json(file, manifest)
    if not _is_well_formed(manifest):
        raise CorruptCheckpointError(
            f"{file} is malformed: a field is missing or has a wrong type"
        )
    missing = [name for name in JSON_FILES if name not in manifest["files"]]
    if missing:
        raise CorruptCheckpointError(f"{file} does not name {', '.join(missing)}")
    return manifest


def read_serial(path: Path) -> int | None:
    """Return the serial number in a manifest of a newer version; None if it has none there.

    Raises:
        CorruptCheckpointError: The manifest cannot be read.
    """
    serial = read_json(path / MANIFEST).get("serial")
    return serial if _is_count(serial) else None


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, which is stored under "checksum"."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_well_formed(manifest: dict[str, Any]) -> bool:
    if manifest.get("format") != CHECKPOINT_FORMAT:
        return False
    for key in ("iteration", "serial"):
        if not _is_count(manifest.get(key)):
            return False
    files = manifest.get("files")
    if not isinstance(files, dict):
        return False
    return all(_is_file_entry(name, digest) for name, digest in files.items())


def _is_count(value: Any) -> bool:
    # Not isinstance: True is an int, too.
    return type(value) is int and 0 <= value < 2**63


def _is_file_entry(name: str, digest: Any) -> bool:
    """Return whether an entry is a digest of a file inside the checkpoint's own directory."""
    if not re.fullmatch(rf"({HF_FOLDER}/)?\w[\w.-]{{0,200}}", name, re.ASCII) or not isinstance(
        digest, list
    ):
        return False
    if [type(value) for value in digest] != [int, str]:
        return False
    return _is_count(digest[0])


def check_files(
    path: Path, names: Iterable[str], manifest: dict[str, Any], hashes: bool = True
) -> None:
    """Compare files of a checkpoint with the manifest.

    Args:
        path: Directory of the checkpoint.
        hashes: Read the files and compare their hashes; otherwise compare only their sizes.

    Raises:
        CorruptCheckpointError: A file is missing, or has another size or another SHA-256.
    """
    for name in names:
        _check_file(path / name, FileDigest(*manifest["files"][name]), hashes)


def _check_file(file: Path, expected: FileDigest, hashes: bool) -> None:
    try:
        size = file.stat().st_size
        if size != expected.nbytes:
            raise CorruptCheckpointError(
                f"{file} has {size} bytes, {expected.nbytes} were written"
            )
        if hashes and file_sha256(file) != expected.sha256:
            raise CorruptCheckpointError(
                f"{file} is corrupt: its SHA-256 is not the one in {MANIFEST}"
            )
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CorruptCheckpointError(f"{file} cannot be read: {error.strerror}") from None


def find_problems(
    path: Path,
    manifest: dict[str, Any],
    verify: bool = True,
    progress: ProgressCallback = no_progress,
) -> list[str]:
    """Return what is wrong with the files of a checkpoint; an empty list means it is valid.

    Args:
        verify: Compare the hashes of all files, which reads them. Otherwise compare the sizes
            of all files and the hashes of the small ones.
        progress: Called with the bytes of each file that was checked.
    """
    problems = []
    for name, (nbytes, _) in manifest["files"].items():
        try:
            check_files(path, [name], manifest, hashes=verify or name.endswith(".json"))
        except CorruptCheckpointError as error:
            problems.append(str(error))
        progress(nbytes)
    return problems
