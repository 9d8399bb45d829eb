"""Inputs that would be read twice, never, or into more memory than there is: each is one clear line."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from helpers.programs import BYTES, REPO, jsonl, one_line_error, run
from megatron.config.schema import TokenizerConfig
from megatron.data.ingest import sources
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig, preprocess
from megatron.data.ingest.records import Chunk
from megatron.data.ingest.sources import open_sources


def refused(inputs: list[str], match: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match) as info:
        open_sources(inputs)
    assert "\n" not in str(info.value)


def test_a_file_under_two_names_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("soft", "hard", "other"):
        os.mkdir(folder)
        jsonl(Path(folder, "a.jsonl"), ["x"])
    os.symlink("a.jsonl", "soft/b.jsonl")
    os.link("hard/a.jsonl", "hard/b.jsonl")
    for folder in ("soft", "hard"):
        place = f"{tmp_path}/{folder}"
        refused(
            [folder],
            rf"^--input names {place}/b.jsonl twice \(also as {place}/a.jsonl\); allowed: each once",
        )
    os.symlink("soft", "linked")
    refused(
        ["linked/a.jsonl", "soft/a.jsonl"],
        f"soft/a.jsonl twice .also as {tmp_path}/linked/a.json",
    )
    assert [s.path for s in open_sources(["soft/a.jsonl", "other"])] == [
        "soft/a.jsonl",
        "other/a.jsonl",
    ]


def test_standard_input_under_two_names(tmp_path):
    def program(*inputs: str, data: bytes) -> subprocess.CompletedProcess:
        return subprocess.run(
            [
                sys.executable,
                str(REPO / "tools/train_tokenizer.py"),
                "--input",
                *inputs,
                "--vocab-size",
                "300",
                "--output",
                "t.json",
            ],
            cwd=tmp_path,
            input=data,
            capture_output=True,
            timeout=100,
        )

    for names in (("-", "/dev/stdin"), ("/dev/stdin", "-"), ("/dev/fd/0", "/dev/stdin")):
        done = program(*names, data=b'{"text": "a"}\n')
        assert (
            done.returncode == 2
            and b" twice (also as " in done.stderr
            and done.stderr.count(b"\n") == 1
        )
    assert b"1 of 1 documents" in program("-", data=b'{"text": "a"}\n').stdout


@pytest.mark.parametrize("script", ["tools/preprocess_data.py", "tools/train_tokenizer.py"])
def test_standard_input_that_is_closed(tmp_path, script):
    more = (
        f"--output-prefix x {' '.join(BYTES)}"
        if "preprocess" in script
        else "--vocab-size 300 --output x"
    )
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {REPO / script} --input - {more} <&-"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and not list(tmp_path.glob("x*"))
    assert one_line_error(done).endswith(
        "--input - is standard input, which is closed. Send it a file or the output of a program"
    )


def test_folders_give_regular_files_that_are_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "d/a.jsonl",
        "d/x.partial/rejected.jsonl",
        "d/x.partial/lock",
        "d/y.partial/b.jsonl",
        "d/z/c.jsonl",
        "d/z/lock",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    os.mkfifo("d/pipe.jsonl")
    expected = ["d/a.jsonl", "d/y.partial/b.jsonl", "d/z/c.jsonl"]
    assert [s.path for s in open_sources(["d"])] == expected
    os.remove("d/pipe.jsonl")
    assert [s.path for s in open_sources(["d/**/*.jsonl"])] == expected
    assert [s.path for s in open_sources(["d/x.partial/rejected.jsonl"])] == [
        "d/x.partial/rejected.jsonl"
    ]


LIMIT = 300_000


def compressed(kind: str, data: bytes) -> bytes:
    if kind.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.ZstdCompressor().compress(data) if kind.endswith(".zst") else data


@pytest.mark.parametrize("kind", ["a.json", "a.gz", "a.zst", "-"])
@pytest.mark.parametrize("before", [0, 30, 100])
def test_a_line_that_is_too_long(tmp_path, monkeypatch, kind, before):
    """The first 100 lines make a chunk of 1,000 bytes; 2 MB follow without a line feed."""
    monkeypatch.setattr(sources, "LARGEST_RECORD", LIMIT)
    head = b'{"text":1}\n' * before
    data = compressed(kind, head + b"[" + os.urandom(1_000_000).hex().encode() + b"]\n")
    pipe = io.BytesIO(data)
    monkeypatch.setattr(
        sys, "stdin", mock.Mock(buffer=mock.Mock(read1=lambda size: pipe.read(1 << 14)))
    )
    (tmp_path / "a").write_bytes(data)
    path = "-" if kind == "-" else str((tmp_path / "a").rename(tmp_path / kind))
    (source,) = open_sources([path])
    with pytest.raises(ValueError) as info:
        list(source.chunks(["text"], chunk_bytes=1000))
    assert str(info.value) == (
        f"{source.path}: the line that begins at byte {len(head)} of the text is longer than {LIMIT} bytes; allowed: "
        f"one JSON object per line, none longer. Rewrite the file (a JSON array: jq -c '.[]')"
    )
    if kind == "-":
        assert pipe.tell() < LIMIT + 20_000, "the rest is not read"


@pytest.mark.parametrize("kind", ["a.json", "a.gz", "a.zst"])
def test_a_line_at_the_limit(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "LARGEST_RECORD", LIMIT)
    for last in (b"", b"\n"):
        record = json.dumps({"text": "x" * (LIMIT - 12)}).encode()
        (tmp_path / kind).write_bytes(compressed(kind, b'{"text": ""}\n' + record + last))
        chunks = list(open_sources([str(tmp_path / kind)])[0].chunks(["text"], chunk_bytes=10))
        assert len(record) == LIMIT and [
            len(c.parse(["text"]).texts["text"][0]) for c in chunks
        ] == [0, LIMIT - 12]


def test_a_line_that_is_too_long_cannot_be_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_RECORD", LIMIT)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    (tmp_path / "a.json").write_bytes(b"[" + b" " * (9 << 20) + b"]\n")
    with pytest.raises(
        ValueError,
        match="a.json: the line that begins at byte 0 of the text is longer than 300000",
    ):
        preprocess(
            PreprocessConfig(
                [str(tmp_path / "a.json")],
                str(tmp_path / "x"),
                EncodeConfig(TokenizerConfig(BYTES[1])),
                True,
            )
        )
    assert not list(tmp_path.glob("x*.idx"))


def test_a_long_line_takes_no_memory(tmp_path):
    """400 MB, most of them a hole in the file."""
    with open(tmp_path / "a.json", "wb") as file:
        file.write(b"[")
        file.truncate(400_000_000)
    code = (
        "from megatron.data.ingest.sources import open_sources\n"
        "source, = open_sources(['a.json'])\n"
        "try: [c.parse(['text']) for c in source.chunks(['text'])]\n"
        "except ValueError as error: print(error, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        check=True,
    )
    message, _, kilobytes = done.stdout.strip().rpartition(" ")
    assert "a.json: the line that begins at byte 0 " in message and "134217728 bytes" in message
    assert int(kilobytes) < 150_000


@pytest.mark.parametrize("second", ["works", "fails too"])
def test_a_good_line_is_not_rejected_for_want_of_memory(second):
    loads, calls = orjson.loads, []

    def sometimes(line: bytes) -> object:
        calls.append(line)
        if b"big" in line and (len(calls) == 2 or second == "fails too"):
            raise orjson.JSONDecodeError("Not enough memory to allocate buffer", "", 0)
        return loads(line)

    data = b'{"text": "a"}\n{"text": "big"}\n'
    with (
        mock.patch("orjson.loads", sometimes),
        pytest.raises(
            OSError,
            match="not enough memory to parse a line of 16 bytes. Use fewer --workers, or",
        ),
    ):
        Chunk(0, "x", "line", 0, len(data), 0, data).parse(["text"])
    parsed = Chunk(0, "x", "line", 0, 9, 0, b"Not enough memory\n").parse(["text"])
    assert [r.line for r in parsed.rejected] == [1], "the words in the data mean nothing"


def test_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "text", "title"]), path)
    (source,) = open_sources([str(path)])
    with pytest.raises(
        ValueError,
        match=f"^{path}: 2 columns are named 'text'; allowed: one. Rename the others, ",
    ):
        list(source.chunks(["text"]))
    assert [c.parse(["title"]).texts for c in source.chunks(["title"])] == [{"title": ["c"]}]
    line = one_line_error(
        run(
            "tools/train_tokenizer.py",
            "--input",
            path,
            "--vocab-size",
            300,
            "--output",
            "t.json",
            cwd=tmp_path,
            code=2,
        )
    )
    assert "2 columns are named 'text'" in line
