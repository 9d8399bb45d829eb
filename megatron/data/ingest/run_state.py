"""Progress of a preprocessing run on disk, and what makes two runs the same job."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.schema import TokenizerConfig
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.formats import DocumentSource
from megatron.io.atomic_write import write_text
from megatron.tokenizer.base import Tokenizer

STATE_FILE = "state.json"
STAGING_LAYOUT = 2
"""version of the files in the staging directory, part of a job's identity; raise it when a
change would produce other bytes"""


@dataclass
class RunState:
    """How far a run got. The names of the fields are keys of `state.json`."""

    source: int = 0
    """index of the source that is being read"""
    position: int = 0
    """where its next chunk starts: byte of the text, or row"""
    line: int = 0
    """its lines or rows before that position"""
    skipped: int = 0
    """records that could not be used, in all sources"""
    rejected: int = 0
    """bytes of the file of rejected records"""
    read: int = 0
    """bytes of the inputs that are done"""
    published: bool = False
    """whether all outputs are written, and publishing them has begun"""
    use_reference: bool = False
    """whether the tokenizer's fast encoder is out of use"""
    writers: dict[str, dict] = field(default_factory=dict)
    """for each key, what `IndexedWriter.commit` returned; when published, a `PreparedOutput`
    without its prefix"""
    bytes: dict[str, int] = field(default_factory=dict)
    """for each key, bytes of the texts in UTF-8"""

    def save(self, path: str, identity: dict[str, Any]) -> None:
        """Write the state atomically, together with the identity of its job."""
        write_text(path, json.dumps({"job": identity, **asdict(self)}))


@dataclass(frozen=True)
class PreparedOutput:
    """A completely written output; it replaces the writer when only publishing is left."""

    prefix: str
    num_documents: int
    num_tokens: int
    file: list[int]
    """`file_identity` of its .bin file"""


def job_identity(
    encoding: EncodeConfig,
    sources: Sequence[DocumentSource],
    tokenizer: Tokenizer,
    max_documents: int,
) -> dict[str, Any]:
    """Return the JSON values that two runs share exactly if they would write the same."""
    return {
        "layout": STAGING_LAYOUT,
        "inputs": [source.identity() for source in sources],
        "tokenizer": [
            tokenizer.name,
            tokenizer.fingerprint,
            digest_of_files(encoding.tokenizer),
            tokenizer.eod,
        ],
        "keys": list(encoding.keys),
        "append_eod": encoding.append_eod,
        "split_sentences": encoding.split_sentences,
        "max_documents": max_documents,
    }


def identity_differences(identity: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Name the entries of two job identities that differ, in words."""
    if recorded["layout"] != STAGING_LAYOUT:
        return ["layout"]
    different = [name for name, value in identity.items() if recorded[name] != value]
    return [name.replace("_", " ") for name in different]


def file_identity(path: str) -> list[int]:
    """Return [device, inode, bytes, modification time in ns] of a file; [] if it is missing."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return []
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]


def digest_of_files(tokenizer: TokenizerConfig) -> str:
    """Compute the SHA-256 of a tokenizer's files.

    Its fingerprint covers the vocabulary only, not how text is split.
    """
    folder = Path(tokenizer.tokenizer_model)
    candidates = [
        tokenizer.vocab_file,
        tokenizer.merge_file,
        folder,
        folder / "tokenizer.json",
        folder / "tokenizer_config.json",
    ]
    digest = hashlib.sha256()
    for file in candidates:
        if os.path.isfile(file):
            digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()
