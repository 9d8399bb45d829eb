"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from megatron.io.untrusted import open_regular

_CHUNK_BYTES = 1 << 20


class FileDigest(NamedTuple):
    """Size and hash by which a written file is verified later."""

    nbytes: int
    sha256: str
    """SHA-256 in hexadecimal"""


def digest_bytes(content: bytes) -> FileDigest:
    """Return the digest of a file with this content."""
    return FileDigest(len(content), hashlib.sha256(content).hexdigest())


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal, reading it in chunks."""
    sha256 = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
    return sha256.hexdigest()
