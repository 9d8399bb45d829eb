"""Lines and columns beyond the limits: one clear line, and no more memory than there is."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from unittest import mock

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from helpers.programs import BYTES, REPO, one_line_error, run
from megatron.config.schema import TokenizerConfig
from megatron.data.ingest import chunking
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig, preprocess
from megatron.data.ingest.records import Chunk
from megatron.data.ingest.sources import open_sources

LIMIT = 300_000


@pytest.fixture
def small_limit(monkeypatch) -> None:
    monkeypatch.setattr(chunking, "MAX_LINE_BYTES", LIMIT)


def compressed(kind: str, data: bytes) -> bytes:
    if kind.endswith(".gz"):
        return gzip.compress(data)
    if kind.endswith(".xz"):
        return lzma.compress(data)
    if kind.endswith(".zst"):
        return zstandard.ZstdCompressor().compress(data)
    return data


@pytest.mark.parametrize("kind", ["a.json", "a.gz", "a.xz", "a.zst", "-"])
@pytest.mark.parametrize("before", [0, 30, 100])
def test_too_long_line_is_refused(tmp_path, monkeypatch, small_limit, kind, before):
    """100 lines fill a chunk of 1,000 bytes; 2 MB follow without a line feed."""
    head = b'{"text":1}\n' * before
    data = compressed(kind, head + b"[" + os.urandom(1_000_000).hex().encode() + b"]\n")
    pipe = io.BytesIO(data)
    buffer = mock.Mock(read1=lambda size: pipe.read(1 << 14))
    monkeypatch.setattr(sys, "stdin", mock.Mock(buffer=buffer))
    path = kind
    if kind != "-":
        (tmp_path / kind).write_bytes(data)
        path = str(tmp_path / kind)
    (source,) = open_sources([path])
    with pytest.raises(ValueError) as info:
        list(source.chunks(["text"], chunk_bytes=1000))
    assert str(info.value) == (
        f"{source.path}: the line that begins at byte {len(head)} of the text is longer than "
        f"{LIMIT} bytes; allowed: one JSON object per line, none longer. Rewrite the file (a "
        f"JSON array: jq -c '.[]')"
    )
    if kind == "-":
        assert pipe.tell() < LIMIT + 20_000, "the rest is not read"


@pytest.mark.parametrize("kind", ["a.json", "a.gz", "a.zst"])
def test_line_at_the_limit_is_read(tmp_path, small_limit, kind):
    for last in (b"", b"\n"):
        record = json.dumps({"text": "x" * (LIMIT - 12)}).encode()
        assert len(record) == LIMIT
        (tmp_path / kind).write_bytes(compressed(kind, b'{"text": ""}\n' + record + last))
        chunks = list(open_sources([str(tmp_path / kind)])[0].chunks(["text"], chunk_bytes=10))
        lengths = [len(c.parse(["text"]).texts["text"][0]) for c in chunks]
        assert lengths == [0, LIMIT - 12]


def test_too_long_line_cannot_be_skipped(tmp_path, small_limit):
    (tmp_path / "a.json").write_bytes(b"[" + b" " * (9 << 20) + b"]\n")
    config = PreprocessConfig(
        [str(tmp_path / "a.json")],
        str(tmp_path / "x"),
        EncodeConfig(TokenizerConfig(BYTES[1])),
        skip_errors=True,
    )
    match = "a.json: the line that begins at byte 0 of the text is longer than 300000"
    with pytest.raises(ValueError, match=match):
        preprocess(config)
    assert not list(tmp_path.glob("x*.idx"))


def test_too_long_line_takes_no_memory(tmp_path):
    """A line of 400 MB, most of them a hole in the file."""
    with open(tmp_path / "a.json", "wb") as file:
        file.write(b"[")
        file.truncate(400_000_000)
    program = """
from megatron.data.ingest.sources import open_sources
source, = open_sources(["a.json"])
try:
    [chunk.parse(["text"]) for chunk in source.chunks(["text"])]
except ValueError as error:
    print(error, open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        check=True,
    )
    message, _, kilobytes = done.stdout.strip().rpartition(" ")
    assert "a.json: the line that begins at byte 0 " in message and "134217728 bytes" in message
    assert int(kilobytes) < 150_000


@pytest.mark.parametrize("second", ["works", "fails too"])
def test_lack_of_memory_rejects_no_record(second):
    """A failed allocation is an error of the run, whether or not a second try succeeds."""
    loads = orjson.loads
    calls = []

    def sometimes_fail(line: bytes) -> object:
        calls.append(line)
        if b"big" in line and (len(calls) == 2 or second == "fails too"):
            raise orjson.JSONDecodeError("Not enough memory to allocate buffer", "", 0)
        return loads(line)

    data = b'{"text": "a"}\n{"text": "big"}\n'
    match = "not enough memory to parse a line of 16 bytes. Use fewer --workers, or"
    with mock.patch("orjson.loads", sometimes_fail), pytest.raises(OSError, match=match):
        Chunk(0, "x", "line", 0, len(data), 0, data).parse(["text"])
    parsed = Chunk(0, "x", "line", 0, 9, 0, b"Not enough memory\n").parse(["text"])
    assert [r.line for r in parsed.rejected] == [1], "these words in the data mean nothing"


def test_repeated_column_names_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "text", "title"]), path)
    (source,) = open_sources([str(path)])
    match = f"^{path}: 2 columns are named 'text'; allowed: one. Rename the others, "
    with pytest.raises(ValueError, match=match):
        list(source.chunks(["text"]))
    assert [c.parse(["title"]).texts for c in source.chunks(["title"])] == [{"title": ["c"]}]
    arguments = ("--input", path, "--vocab-size", 300, "--output", "t.json")
    done = run("tools/train_tokenizer.py", *arguments, cwd=tmp_path, code=2)
    assert "2 columns are named 'text'" in one_line_error(done)
