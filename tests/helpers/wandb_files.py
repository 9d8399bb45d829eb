"""Reads the records of Weights & Biases' offline files.

wandb has no reader for Python. Its files are logs of LevelDB: blocks of 32 kB with chunks that
have a header of 7 bytes, and records of one or more chunks. A record is a protocol buffer of
wandb's own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_FILE_HEADER = 7
_CHUNK_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Yield the complete records of a .wandb file; a killed run leaves a part of the last one."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B", path
    position = _FILE_HEADER
    parts = []
    while position + _CHUNK_HEADER.size <= len(content):
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _CHUNK_HEADER.size:
            position += left_in_block
            continue
        _, length, kind = _CHUNK_HEADER.unpack_from(content, position)
        position += _CHUNK_HEADER.size
        chunk = content[position : position + length]
        position += length
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(chunk) < length:
            return
        if kind in (_FULL, _FIRST):
            parts = []
        parts.append(chunk)
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record


def run_files(folder: Path) -> list[Path]:
    """The .wandb files below a folder, of one process each, in the order of their start."""
    return sorted(folder.glob("wandb/*run-*/*.wandb"))


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged values of all processes of a run, each with wandb's own `_step`."""
    rows = []
    for path in run_files(folder):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                rows.append(_history_row(record.history))
    return rows


def _history_row(logged: Any) -> dict[str, Any]:
    row = {"_step": logged.step.num}
    for item in logged.item:
        row["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return row
