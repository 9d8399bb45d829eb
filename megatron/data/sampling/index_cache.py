"""Index cache: named arrays built once per node, kept in a file and memory-mapped by every process.

Layout of a file: magic (8 bytes) | u32 CRC-32 of all that follows | u32 size of the JSON header,
padded to 64 bytes | header, name -> [dtype, length] | the arrays, each padded to 64 bytes.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron.io.atomic_write import atomic_open, temporary_pattern
from megatron.io.mapped_file import map_file
from megatron.log import get_logger, warn_on_rank0

_MAGIC = b"MOEIDX01"
_HEADER = struct.Struct("<8sII")
_ALIGNMENT = 64  # bytes
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing about the cache: building it again would meet them, too."""

Arrays = dict[str, np.ndarray]


def cached_arrays(
    folder: str, kind: str, key: dict[str, Any], build: Callable[[], Arrays]
) -> Arrays:
    """Return the one-dimensional arrays of `build()`, from the cache if it has them.

    A corrupt file is built again. If the folder cannot be written, rank 0 logs one warning, and
    the arrays stay in memory: the result is the same, but every process builds its own.

    Args:
        folder: folder of the cache, created if missing; empty: no cache.
        kind: first part of the file name.
        key: everything that the arrays depend on, as JSON values.
        build: builds the arrays.
    """
    if not folder:
        return build()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(folder) / f"{kind}-{digest}.cache"
    cached = _load(path)
    if cached is not None:
        return cached
    built = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive_builder(path):
            cached = _load(path)  # another process may have built it while this one waited
            if cached is not None:
                return cached
            built = build()
            _store(path, built)
    except OSError as error:
        if error.errno in _OUT_OF_RESOURCES:
            raise
        _warn_not_stored(folder, error.strerror or str(error))
        if built is None:
            built = build()
        return built
    return _load(path) or built


def unwritable_reason(folder: str) -> str:
    """Return why no array can be stored in a folder; empty if one can be.

    A folder that does not exist is not created, because its name may be a mistake: then the
    nearest folder above it must be writable.

    Raises:
        OSError: this process has too many open files.
    """
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"0")
    except OSError as error:
        if error.errno in _OUT_OF_RESOURCES:
            raise
        return f"{folder}: {error.strerror or error}"
    return ""


@functools.cache
def _warn_not_stored(folder: str, reason: str) -> None:
    """Log once per folder that its arrays stay in memory: a blend has thousands of them."""
    warn_on_rank0(
        "cannot write the index cache %s (%s): every rank keeps the indices in its memory. Set "
        "--data-cache-path to a folder that can be written",
        folder,
        reason,
    )


def files_key(*paths: str) -> list[list[Any]]:
    """Return the identity of files as a cache key: path, bytes, modification time in ns."""
    identities = []
    for path in paths:
        stat = os.stat(path)
        identities.append([os.path.abspath(path), stat.st_size, stat.st_mtime_ns])
    return identities


def _load(path: Path) -> Arrays | None:
    """Map the arrays of a file; None if there is no such file or it is corrupt."""
    if not path.is_file():
        return None
    try:
        data = map_file(path)
        magic, checksum, header_size = _HEADER.unpack(data[: _HEADER.size].tobytes())
        checksum_end = _HEADER.size - 4
        if magic != _MAGIC or zlib.crc32(data[checksum_end:].data) != checksum:
            raise ValueError("wrong checksum")
    except (ValueError, struct.error) as error:
        get_logger().warning(
            "the index cache %s is corrupt (%s): building it again", path, error
        )
        return None
    except OSError as error:
        if error.errno in _OUT_OF_RESOURCES:
            raise
        get_logger().warning(
            "the index cache %s cannot be read (%s): building it again", path, error
        )
        return None
    header = json.loads(data[_ALIGNMENT : _ALIGNMENT + header_size].tobytes())
    arrays = {}
    offset = _ALIGNMENT + _padded(header_size)
    for name, (dtype, length) in header.items():
        size = length * np.dtype(dtype).itemsize
        arrays[name] = data[offset : offset + size].view(dtype)
        offset += _padded(size)
    return arrays


def _store(path: Path, arrays: Arrays) -> None:
    """Write the arrays to a file atomically."""
    header = {name: [array.dtype.str, len(array)] for name, array in arrays.items()}
    sections = [json.dumps(header).encode()]
    for array in arrays.values():
        sections.append(np.ascontiguousarray(array).view(np.uint8).data)
    parts = [struct.pack("<I", len(sections[0])), bytes(_ALIGNMENT - _HEADER.size)]
    for section in sections:
        parts.append(section)
        parts.append(bytes(_padded(len(section)) - len(section)))
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    with atomic_open(path) as file:
        file.write(_MAGIC + struct.pack("<I", checksum))
        file.writelines(parts)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@contextmanager
def _exclusive_builder(path: Path) -> Iterator[None]:
    """Admit one process of the node at a time, after removing what a killed one left.

    Where the filesystem has no locks, every process builds the same file, which does no harm.
    """
    with open(path.parent / ".lock", "a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            _remove_leftovers(path.parent)
        yield


@functools.cache
def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes, once per process and folder.

    The caller holds the lock, so that no process is writing. Listing the folder for every
    dataset of a blend of thousands would take longer than building their indices.
    """
    for leftover in folder.glob(temporary_pattern("*.cache")):
        leftover.unlink()
