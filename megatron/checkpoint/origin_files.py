"""The folder `hf/` of a checkpoint, which each checkpoint of a run takes from the one before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron.checkpoint.manifest import (
    HF_FOLDER,
    CorruptCheckpointError,
    copy_with_digest,
    read_manifest,
)
from megatron.config.tokenizer import TokenizerConfig
from megatron.io.atomic_write import fsync_directory
from megatron.io.sha256 import FileDigest


def copy_hf_folder(source: Path, unfinished: Path) -> dict[str, FileDigest]:
    """Copy the folder of one checkpoint to another one, which is not complete yet.

    Args:
        source: Directory of a complete checkpoint.
        unfinished: Directory of the other one.

    Returns:
        The digest of every file by path in the checkpoint.

    Raises:
        OSError: A file cannot be read or written, or `source` is no longer a checkpoint.
    """
    digests = {}
    try:
        files = read_manifest(source)["files"]
    except CorruptCheckpointError as error:
        raise OSError(f"the folder {HF_FOLDER}/ cannot be copied: {error}") from None
    names = [name for name in files if name.startswith(f"{HF_FOLDER}/")]
    if names:
        (unfinished / HF_FOLDER).mkdir()
    for name in names:
        digests[name] = copy_with_digest(source / name, unfinished / name)
    if names:
        fsync_directory(unfinished / HF_FOLDER)
    return digests


def with_found_files(tokenizer: TokenizerConfig, checkpoint: Path) -> TokenizerConfig:
    """Return a tokenizer's configuration with files of a checkpoint in place of missing ones.

    The folder that a converted checkpoint names may have been moved since.

    Args:
        checkpoint: Directory of the checkpoint.
    """
    found = {}
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        path = Path(getattr(tokenizer, name))
        copy = checkpoint / HF_FOLDER / path.name
        if path.name and not path.exists() and copy.is_file():
            found[name] = str(copy)
    return replace(tokenizer, **found)
