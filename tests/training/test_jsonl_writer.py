"""What is in metrics.jsonl, also on a full disk."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import struct
import types

import pytest

from helpers.metric_rows import EVAL, TRAIN
from megatron.training.jsonl_writer import JsonlWriter
from megatron.training.metric_writers import MetricsWriters
from megatron.training.metrics_file import read_metrics


def test_jsonl_appends_and_flushes_each_row(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(TRAIN)
    assert json.loads(path.read_text()) == TRAIN, "readable before the file is closed"
    writer.close()
    writer = JsonlWriter(path)
    writer.write(EVAL)
    writer.close()
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        "train",
        "eval",
    ]


def test_jsonl_keeps_nine_significant_digits(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    loss = struct.unpack("f", struct.pack("f", 5.1234567))[0]  # an fp32 value
    writer.write(
        {
            "kind": "train",
            "iteration": 1,
            "loss": loss,
            "lr": 3e-4,
            "grad_norm": math.nan,
            "aux_loss": math.inf,
            "x_by_layer": [0.1 + 0.2, -math.inf],
            "consumed_tokens": 12345678901234,
        }
    )
    writer.close()
    line = (tmp_path / "m.jsonl").read_text()
    assert line == (
        '{"kind": "train", "iteration": 1, "loss": 5.12345648, "lr": 0.0003, "grad_norm": NaN, '
        '"aux_loss": Infinity, "x_by_layer": [0.3, -Infinity], "consumed_tokens": 12345678901234}\n'
    )
    assert struct.unpack("f", struct.pack("f", json.loads(line)["loss"]))[0] == loss


def test_jsonl_ends_a_truncated_line_first(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "tra')
    writer = JsonlWriter(path)
    writer.write(EVAL)
    writer.close()
    assert [line[:8] for line in path.read_text().splitlines()] == ['{"kind":', '{"kind":']
    assert json.loads(path.read_text().splitlines()[1])["kind"] == "eval"


def test_full_disk_names_the_metrics_file():
    writer = JsonlWriter("/dev/full")
    with pytest.raises(
        OSError, match="^/dev/full cannot be written: No space left on device. Free"
    ):
        writer.write(TRAIN)
    writer.close()


@pytest.fixture
def limited_file(tmp_path, monkeypatch):
    """Return a writer, and the number of bytes that its disk still has room for, in a list."""
    writer = JsonlWriter(tmp_path / "m.jsonl")
    free = [0]
    file = writer.file

    def write(data: bytes) -> int:
        if not free[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = file.write(data[: free[0]])
        free[0] -= written
        return written

    writer.file = types.SimpleNamespace(write=write, close=file.close)
    yield writer, free
    writer.close()


@pytest.mark.parametrize("room", [0, 1, 20, 100])
def test_run_may_continue_without_metrics(room, limited_file, printed):
    """A row that was cut short is ended before the next one, and the losses are logged twice."""
    writer, free = limited_file
    writers = MetricsWriters([writer], "continue")
    free[0] = room
    for iteration in (1, 2):
        writers.write({**TRAIN, "iteration": iteration})
    (line,) = printed().splitlines()
    assert re.fullmatch(
        r"ERROR \S+m.jsonl cannot be written: No space left on device. Free some space.* The "
        r"training continues without metrics there, as --on-save-error sets",
        line,
    )
    free[0] = 10_000
    for iteration in (3, 4):
        writers.write({**TRAIN, "iteration": iteration})
    assert printed() == "WARNING metrics are written again; 2 row(s) were lost\n"
    assert [row["iteration"] for row in read_metrics(writer.path)] == [3, 4]


def test_metrics_error_stops_by_default(limited_file):
    writer, _ = limited_file
    with pytest.raises(OSError, match="m.jsonl cannot be written: No space left"):
        MetricsWriters([writer]).write(TRAIN)


def test_large_tables_are_written_at_evaluations_only(tmp_path):
    """A layer of 1,000 experts is below the limit, three of them above."""
    writer = JsonlWriter(tmp_path / "m.jsonl")
    rows = [
        {"kind": kind, "iteration": 1, "load_by_expert": [[1e-3] * 1000] * layers}
        for kind in ("train", "eval", "eval/wiki")
        for layers in (1, 3)
    ]
    for row in rows:
        writer.write(row)
    writer.close()
    del rows[1]["load_by_expert"]
    assert read_metrics(writer.path) == rows


def test_lists_of_lists_have_four_digits(tmp_path):
    """A layer without the metric is null; the numbers of a list alone keep their digits."""
    writer = JsonlWriter(tmp_path / "m.jsonl")
    row = {
        "kind": "train",
        "iteration": 1,
        "load_by_expert": [None, [1 / 3, 2e-7 / 3, 0.0], [math.nan]],
        "coactivation": [[[1 / 3]]],
        "load_cv_by_layer": [1 / 3],
    }
    writer.write(row)
    writer.close()
    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()
    assert line == (
        '{"kind": "train", "iteration": 1, "load_by_expert": [null, [0.3333, 6.667e-08, 0.0], '
        '[NaN]], "coactivation": [[[0.3333]]], "load_cv_by_layer": [0.333333333]}'
    )
