"""Identity of a file's content that costs milliseconds for terabytes, to recognise moved files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from megatron.io.untrusted import open_regular

_BLOCK_BYTES = 1 << 12
_BLOCKS = 16
_METHOD = "s16"
"""Prefix of identities, to be changed with the two above. Earlier ones, of 64 blocks of 64 KiB,
have none."""


def content_id(paths: Iterable[str | Path]) -> str:
    """Return an identity of the content of files, wherever they are.

    It is a hash of the sizes, and of all content up to 64 KiB; of a larger file, of 16 evenly
    spaced blocks of 4 KiB, the first and the last included. Equal contents have equal identities;
    an edit of a large file that keeps its size may go unnoticed.

    Raises:
        OSError: A file cannot be read.
    """
    sha256 = hashlib.sha256()
    for path in paths:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            sha256.update(size.to_bytes(8, "little"))
            for block in _sampled_blocks(file, size):
                sha256.update(block)
    return f"{_METHOD}:{sha256.hexdigest()[:32]}"


def comparable(a: str, b: str) -> bool:
    """Return whether two identities are known and were made by the same method."""
    return bool(a and b) and a.rpartition(":")[0] == b.rpartition(":")[0]


def _sampled_blocks(file: BinaryIO, size: int) -> Iterable[bytes]:
    if size <= _BLOCKS * _BLOCK_BYTES:
        file.seek(0)
        yield file.read()
        return
    for i in range(_BLOCKS):
        file.seek((size - _BLOCK_BYTES) * i // (_BLOCKS - 1))
        yield file.read(_BLOCK_BYTES)
