"""Index caches: named arrays that are computed once per node, kept in one file and memory-mapped by every process.

File: magic (8 bytes) | u32 CRC of all that follows | u32 size of the JSON header, padded to 64 bytes | header:
name -> [dtype, length] | the arrays, each padded to 64 bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

LOGGER = logging.getLogger("megatron")
MAGIC = b"MOEIDX01"
HEADER = struct.Struct("<8sII")
ALIGN = 64

Arrays = dict[str, np.ndarray]


def cached_arrays(
    folder: str, kind: str, key: dict[str, Any], build: Callable[[], Arrays]
) -> Arrays:
    """`build()`'s one-dimensional arrays, from the cache in `folder` when it has them.

    A damaged file is rebuilt. When the folder cannot be written, the arrays stay in memory and a warning says so: the
    result is the same, but every process builds its own.

    Args:
        folder: created when missing; empty: no cache.
        kind: first part of the file's name.
        key: everything the arrays depend on, as JSON values.
    """
    if not folder:
        return build()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(folder) / f"{kind}-{name}.cache"
    if (arrays := _load(path)) is not None:
        return arrays
    arrays = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_builder(path):
            if (
                found := _load(path)
            ) is not None:  # built by another process while this one waited
                return found
            arrays = build()
            _store(path, arrays)
    except OSError as error:
        LOGGER.warning(
            "cannot write the index cache %s (%s): every process keeps its own in memory. Set "
            "--data-cache-path to a folder that can be written",
            path,
            error.strerror or error,
        )
        return build() if arrays is None else arrays
    return _load(path) or arrays


def files_key(*paths: str) -> list[list[Any]]:
    """Identity of files for a cache key: absolute path, bytes, modification time in ns."""
    stats = [(os.path.abspath(p), os.stat(p)) for p in paths]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _load(path: Path) -> Arrays | None:
    """The mapped arrays; None when there is no such file or it is damaged."""
    if not path.is_file():
        return None
    try:
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
        magic, checksum, header_size = HEADER.unpack(data[: HEADER.size].tobytes())
        if magic != MAGIC or zlib.crc32(data[HEADER.size - 4 :].data) != checksum:
            raise ValueError("wrong checksum")
    except (OSError, ValueError, struct.error) as error:
        LOGGER.warning("the index cache %s is damaged (%s): building it again", path, error)
        return None
    arrays, at = {}, ALIGN + _padded(header_size)
    for name, (dtype, length) in json.loads(
        data[ALIGN : ALIGN + header_size].tobytes()
    ).items():
        size = length * np.dtype(dtype).itemsize
        arrays[name] = data[at : at + size].view(dtype)
        at += _padded(size)
    return arrays


def _store(path: Path, arrays: Arrays) -> None:
    """Write under a temporary name and rename: readers see a whole file or none."""
    header = json.dumps({name: [a.dtype.str, len(a)] for name, a in arrays.items()}).encode()
    parts = [struct.pack("<I", len(header)), bytes(ALIGN - HEADER.size)]
    for part in (
        header,
        *(np.ascontiguousarray(a).view(np.uint8).data for a in arrays.values()),
    ):
        parts += [part, bytes(_padded(len(part)) - len(part))]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    temp = path.with_name(
        f".{path.name}.{uuid.uuid4().hex}.tmp"
    )  # process numbers repeat on other nodes
    try:
        with open(temp, "wb") as file:
            file.write(MAGIC + struct.pack("<I", checksum))
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temp)


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


@contextmanager
def _one_builder(path: Path) -> Iterator[None]:
    """One process of the node at a time, which first removes what a killed one left.

    Where the filesystem has no locks, all build the same, and none is harmed.
    """
    with open(path.parent / ".lock", "a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                left.unlink()
        yield
