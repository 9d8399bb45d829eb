"""Metric writer of metrics.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron.io.atomic_write import errors_with_path
from megatron.training.metric_rows import MetricsRow, is_evaluation, tables
from megatron.training.writer_settings import WriterSettings

_SCALAR_DIGITS = 9
_NESTED_DIGITS = 4
MAX_TRAIN_TABLE = 2048
"""Values of the largest table by layer and expert that is written at every log line.

Larger ones would make files of gigabytes: evaluations have them, too.
"""


class JsonlWriter:
    """Appends one JSON object per line to a file and flushes it.

    NaN and infinities are written as NaN, Infinity and -Infinity, which Python's json
    reads. Floats have 9 significant digits, enough to distinguish all fp32 values. Those in a
    list of lists, such as the load of each expert of each layer, have 4, because there are
    thousands of them.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not buffered: a buffer would keep a part of a row that the disk had no space for.
        self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (closed by close)
        self._is_inside_line = False
        if self.file.tell() > 0:
            self.file.seek(-1, os.SEEK_END)
            # The previous run was killed inside a line, or its disk was full.
            self._is_inside_line = self.file.read(1) != b"\n"

    @staticmethod
    def create(settings: WriterSettings) -> JsonlWriter | None:
        if settings.logging.metrics_file:
            return JsonlWriter(settings.logging.metrics_file)
        if settings.save:
            return JsonlWriter(Path(settings.save) / "metrics.jsonl")
        return None

    def write(self, row: MetricsRow) -> None:
        large = () if is_evaluation(row) else _large_tables(row)
        rounded = {name: _round(value) for name, value in row.items() if name not in large}
        line = json.dumps(rounded).encode() + b"\n"
        if self._is_inside_line:
            line = b"\n" + line
        with errors_with_path(self.path):
            while line:
                written = self.file.write(line)
                line = line[written:]
                self._is_inside_line = bool(line)

    def close(self) -> None:
        with errors_with_path(self.path):
            self.file.close()


def _large_tables(row: MetricsRow) -> set[str]:
    """Return the names of tables with more values than MAX_TRAIN_TABLE."""
    names = set()
    for tag, shares in tables(row):
        if sum(len(shares_E or ()) for shares_E in shares) > MAX_TRAIN_TABLE:
            names.add(tag.removeprefix(f"{row['kind']}/"))
    return names


def _round(value: Any, digits: int = _SCALAR_DIGITS) -> Any:
    """Round floats, also inside a list and, to fewer digits, inside a list of lists."""
    if isinstance(value, (list, tuple)):
        if value and any(isinstance(element, (list, tuple)) for element in value):
            digits = _NESTED_DIGITS
        return [_round(element, digits) for element in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    return value
