"""Recognises files that are not JSON lines by how they begin."""

from __future__ import annotations

import re

HEAD_BYTES = 1 << 10
"""bytes that `require_json_lines` needs of a file, unless it begins with blank lines"""

_SUFFIXES = {
    b"\x1f\x8b": ("gzip-compressed data", ".gz"),
    b"BZh": ("bzip2-compressed data", ".bz2"),
    b"\xfd7zXZ\0": ("xz-compressed data", ".xz"),
    b"\x28\xb5\x2f\xfd": ("data compressed with Zstandard", ".zst"),
    b"PAR1": ("a Parquet table", ".parquet"),
}
"""formats that are read from files with a suffix, by their first bytes"""
_UNREADABLE = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"\x04\x22\x4d\x18": "LZ4-compressed data",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_TAR_MAGIC = b"ustar"
_TAR_OFFSET = 257
_ARRAY = re.compile(rb"\s*\[\s*[{\n]")
"""the beginning of an array that continues on the next line, or whose first entry is an object"""


def require_json_lines(data: bytes, path: str) -> None:
    """Check how a text that should be JSON lines begins.

    Args:
        data: the text, or its first `HEAD_BYTES`.
        path: name of the source in messages.

    Raises:
        ValueError: it is another format, or a JSON array.
    """
    for magic, (kind, suffix) in _SUFFIXES.items():
        if data.startswith(magic):
            raise ValueError(
                f"{path} holds {kind}; allowed under this name: JSON lines. Give the file a "
                f"name that ends in {suffix}"
            )
    kind = next((kind for magic, kind in _UNREADABLE.items() if data.startswith(magic)), "")
    if data.startswith(_TAR_MAGIC, _TAR_OFFSET):
        kind = "a tar archive"
    if kind:
        raise ValueError(
            f"{path} holds {kind}; allowed: JSON lines in UTF-8. Unpack or convert it"
        )
    if _ARRAY.match(data):
        raise ValueError(
            f"{path} holds a JSON array; allowed: one JSON object per line. Rewrite the file: "
            f"jq -c '.[]'"
        )
