"""Document sources: every format against a reference loop, extreme and damaged files."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sources import KEYS, open_source, read, read_texts
from megatron.data.ingest.records import DEFAULT_CHUNK_BYTES, Chunk, RejectedRecord
from megatron.data.ingest.sources import open_sources

BOM = b"\xef\xbb\xbf"
LINE_KINDS = ["plain.jsonl", "members.gz", "streams.bz2", "streams.xz", "frames.zst", "-"]


def line(text: str, title: str = "") -> bytes:
    return json.dumps({"text": text, "title": title}, ensure_ascii=False).encode()


def write(folder: str | Path, kind: str, data: bytes) -> str:
    """Make a source of some lines, and return its path.

    Compressed files get two members, with what is allowed between and after them. For "-",
    sys.stdin is replaced; the caller restores it.
    """
    if kind == "-":
        sys.stdin = mock.Mock(buffer=io.BytesIO(data))
        return kind
    path = Path(folder, kind)
    half = len(data) // 2
    if kind.endswith(".gz"):
        data = gzip.compress(data[:half]) + gzip.compress(data[half:]) + b"\0" * 20
    elif kind.endswith(".bz2"):
        data = bz2.compress(data[:half]) + bz2.compress(data[half:])
    elif kind.endswith(".xz"):
        padding = b"\0" * 4
        data = lzma.compress(data[:half]) + padding + lzma.compress(data[half:]) + padding
    elif kind.endswith(".zst"):
        skippable = bytes.fromhex("502a4d18 03000000 616263")
        first, second = (
            zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])
        )
        data = first + skippable + second
    path.write_bytes(data)
    return str(path)


GOOD = st.tuples(st.text(max_size=30), st.text(max_size=5)).map(lambda pair: line(*pair))
OTHER = [
    b"",
    b" \t",
    b"\r",
    b"[]",
    b'{"text": 1, "title": ""}',
    b'{"text": ""}',
    b'{"text": "a", "title": NaN}',
    b'{"text": "NaN \\" Infinity", "title": "", "score": NaN, "s": [-Infinity,Infinity]}',
    b'{"text": "a", "title": "", "n": -NaN}',
    b'{"text": "a", "title": "", "n": NaNs}',
    b'{"text": "a", "title": ""}\x0b',
    b"\x0b\x0c",
    b'{"text": "\xff", "title": ""}',
    line("a" * 500),
]
LINES = st.lists(st.one_of(GOOD, GOOD, st.sampled_from(OTHER)), max_size=12)


def reference_lines(
    lines: list[bytes], chunk_bytes: int
) -> tuple[list[tuple], list[tuple[int, int]], list[int]]:
    """Parse lines (with their line feeds) one by one.

    Returns:
        (documents, (line, documents before it) of each bad line, end of each chunk).
    """
    documents = []
    bad = []
    ends = []
    position = 0
    chunk_start = 0
    for number, raw in enumerate(lines, 1):
        position += len(raw)
        if position - chunk_start >= chunk_bytes or number == len(lines):
            ends.append(position)
            chunk_start = position
        text = raw.removeprefix(BOM) if number == 1 else raw
        try:
            record = json.loads(text.decode())
            documents.append((str.__str__(record["text"]), str.__str__(record["title"])))
        except (ValueError, KeyError, TypeError):
            if text.strip():
                bad.append((number, len(documents)))
    return documents, bad, ends


def assemble_lines(raw: list[bytes], feed: bytes, bom: bool, last_feed: bool) -> list[bytes]:
    """Add line feeds and a byte-order mark to lines."""
    lines = [part + feed for part in raw]
    if lines and not last_feed:
        lines[-1] = lines[-1].removesuffix(feed)
    if bom:
        lines = [BOM + b"".join(lines[:1]), *lines[1:]]
    return [part for part in lines if part]


@settings(max_examples=150, deadline=None)
@given(
    LINES,
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 300),
    st.sampled_from(LINE_KINDS),
)
def test_lines_equal_reference_loop(raw, feed, bom, last_feed, chunk_bytes, kind):
    lines = assemble_lines(raw, feed, bom, last_feed)
    documents, bad, ends = reference_lines(lines, chunk_bytes)
    data = b"".join(lines)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "stdin"):
        source = open_source(write(folder, kind, data))
        chunks = list(source.chunks(KEYS, chunk_bytes=chunk_bytes))
        assert [chunk.end for chunk in chunks] == ends
        assert [chunk.start for chunk in chunks] == [0, *ends][: len(ends)]
        assert {chunk.unit for chunk in chunks} <= {"line"} and source.unit == "line"
        assert sum(chunk.disk_bytes for chunk in chunks) == (source.size if chunks else 0)
        assert source.size == (0 if kind == "-" else os.path.getsize(source.path))
        write(folder, kind, data)
        found, rejected, count = read(source, KEYS, chunk_bytes=chunk_bytes)
        assert found == documents and [r[:2] for r in rejected] == bad
        # A first line that is a byte-order mark only does not count.
        assert count == len(lines) - (lines[:1] == [BOM])
        for i, end in enumerate(ends):
            write(folder, kind, data)
            rest = list(source.chunks(KEYS, start=end, chunk_bytes=chunk_bytes))
            assert [(c.start, c.end, c.data) for c in rest] == [
                (c.start, c.end, c.data) for c in chunks[i + 1 :]
            ]
            if kind == "plain.jsonl":
                assert rest == chunks[i + 1 :]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.none() | st.text(max_size=30), st.none() | st.text(max_size=3)),
        max_size=12,
    ),
    st.integers(1, 5),
    st.integers(1, 100),
)
def test_parquet_equals_reference_loop(rows, group, chunk_bytes):
    documents = [row for row in rows if None not in row]
    bad = []
    for n, row in enumerate(rows, 1):
        if None in row:
            bad.append((n, sum(None not in earlier for earlier in rows[:n])))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.parquet")
        columns = [pa.array(column, pa.string()) for column in zip(*rows)]
        if not rows:
            columns = [pa.array([], pa.string())] * 2
        numbers = pa.array(range(len(rows)))
        table = pa.table([columns[1], numbers, columns[0]], ["title", "n", "text"])
        pq.write_table(table, path, row_group_size=group)
        source = open_source(path)
        chunks = list(source.chunks(KEYS, chunk_bytes=chunk_bytes))
        found, rejected, count = read(source, KEYS, chunk_bytes=chunk_bytes)
        assert found == documents and [r[:2] for r in rejected] == bad and count == len(rows)
        assert [*(c.start for c in chunks), len(rows)] == [0, *(c.end for c in chunks)]
        assert sum(c.disk_bytes for c in chunks) == (source.size if chunks else 0)
        size = sum(1 + sum(len(value or "") for value in row) for row in rows)
        assert len(chunks) <= size // chunk_bytes + 1 and source.unit == "row"
        for i, chunk in enumerate(chunks):
            rest = list(source.chunks(KEYS, start=chunk.end, chunk_bytes=chunk_bytes))
            assert rest == chunks[i + 1 :]


# Records that cannot be used

NOT_JSON = "not a JSON object in UTF-8 ("
TRAILING = "unexpected content after document: line 1 column 14 (char 13))"
EOF = "unexpected end of data: line 1 column 2 (char 1))"
DEEP = b"[" * 5000 + b"]" * 5000
MANY_KEYS = json.dumps({str(i): 0 for i in range(9999)}).encode()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "a"', NOT_JSON + "unexpected end of data: line 1 column 13 (char 12))"),
        (b"text", NOT_JSON),
        (b'{"text": "\xff"}', NOT_JSON + "str is not valid UTF-8"),
        (b'{"text": "\\ud800"}', "'text' has a lone surrogate; allowed: a string"),
        (b'{"text": "\\ud800", "n": NaN}', "'text' has a lone surrogate; allowed: a string"),
        (b'{"text": "NaN \xff"}', NOT_JSON + "str is not valid UTF-8"),
        (b'{"n": NaN, "text": ' + DEEP + b"}", NOT_JSON),
        (b'{"text": "a", "n": NaN, "m": ' + b"9" * 5000 + b"}", NOT_JSON),
        (b'{"text": NaN}', "'text' is a JSON float; allowed: a string"),
        (b'{"text": "a"}\x0b', NOT_JSON + TRAILING + "; b'\\x0b' around it is no white"),
        (b"{", NOT_JSON + EOF + "; it continues on the next line; allowed: one per"),
        (b'{"text": "a"} {"text": "b"}', NOT_JSON),
        (b'{"text": "a\x00"}', NOT_JSON),
        (DEEP, NOT_JSON),
        (BOM + b'{"text": "a"}', NOT_JSON),
        (
            b'{"body": "a", "title": "b"}',
            "no key 'text'; there are: body, title. Set --json-keys",
        ),
        (b'{"a\\nb": 1}', "no key 'text'; there are: a\\nb. Set --json-keys"),
        (MANY_KEYS, "no key 'text'; there are: 0, 1, 2, 3, 4, 5, "),
        (b"{}", "no key 'text'; there are: none. Set --json-keys"),
        (b'["text"]', "the line is a JSON list; allowed: an object"),
        (b'"text"', "the line is a JSON str; allowed: an object"),
        (b"null", "the line is a JSON NoneType; allowed: an object"),
        (b'{"text": 7}', "'text' is a JSON int; allowed: a string"),
        (b'{"text": null}', "'text' is a JSON NoneType; allowed: a string"),
        (b'{"text": ["a"]}', "'text' is a JSON list; allowed: a string"),
    ],
)
@pytest.mark.parametrize("kind", LINE_KINDS)
def test_unusable_lines_are_rejected(tmp_path, monkeypatch, kind, bad, reason):
    monkeypatch.setattr(sys, "stdin", None)
    lines = line("good") + b"\n\r\n" + bad + b"\r\n" + line("")
    source = open_source(write(tmp_path, kind, lines))
    (chunk,) = source.chunks(["text"])
    parsed = chunk.parse(["text"])
    (rejected,) = parsed.rejected
    assert parsed.texts == {"text": ["good", ""]} and parsed.lines == 4
    found = (rejected.line, rejected.documents_before, rejected.raw)
    assert found == (3, 1, bad + b"\r")
    assert rejected.reason.startswith(reason)
    assert len(rejected.reason) < 400 and "\n" not in rejected.reason
    name = "standard input" if kind == "-" else source.path
    assert chunk.location(3) == f"{name}:3"


def test_documents_need_all_keys():
    data = b'{"text": "a", "title": "b"}\n{"text": "a"}\n{"title": "b"}\n'
    data += b'{"text": "a", "title": 5}\n'
    parsed = Chunk(0, "x", "line", 0, len(data), 0, data).parse(KEYS)
    assert parsed.texts == {"text": ["a"], "title": ["b"]}
    assert [r.line for r in parsed.rejected] == [2, 3, 4]
    assert [r.reason.split(";")[0] for r in parsed.rejected] == [
        "no key 'title'",
        "no key 'text'",
        "'title' is a JSON int",
    ]


# Sizes and damage


@pytest.mark.parametrize("kind", LINE_KINDS)
def test_long_lines_and_empty_files(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sys, "stdin", None)
    documents = ["x" * 3_000_000, "é", "\u2028\x0b\x85", "y" * 1_000_000]
    source = open_source(write(tmp_path, kind, b"\n".join(line(d) for d in documents)))
    chunks = list(source.chunks(["text"], chunk_bytes=1000))
    assert len(chunks) == 2
    found = []
    for chunk in chunks:
        found += chunk.parse(["text"]).texts["text"]
    assert found == documents
    assert list(open_source(write(tmp_path, kind, b"")).chunks(["text"])) == []
    assert read_texts(open_source(write(tmp_path, kind, BOM))) == []


def test_compressed_chunks_are_bounded(tmp_path):
    record = line("a" * 1000) + b"\n"
    data = record * 30000
    for kind in ("a.gz", "b.zst", "c.bz2", "d.xz"):
        source = open_source(write(tmp_path, kind, data))
        sizes = [len(c.data) for c in source.chunks(["text"])]
        to_line_end = -DEFAULT_CHUNK_BYTES % len(record)
        assert sizes[:-1] == [DEFAULT_CHUNK_BYTES + to_line_end] * 3
        assert sum(sizes) == len(data)


def test_file_that_shrinks_is_refused(tmp_path):
    """What is appended to a file after it was opened is ignored."""
    path = tmp_path / "a.jsonl"
    path.write_bytes((line("abc") + b"\n") * 10)
    source = open_source(path)
    with open(path, "ab") as file:
        file.write(b"\n" * 100)
    first, second = source.chunks(["text"], chunk_bytes=200)
    assert second.end == source.size and len(first.parse(["text"]).texts["text"]) == 7
    path.write_bytes(path.read_bytes()[:210])
    match = f"^{path} became shorter while it was read: it ends before byte "
    for chunk in (second, list(source.chunks(["text"]))[-1]):
        with pytest.raises(ValueError, match=match):
            chunk.parse(["text"])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        first.parse(["text"])


def flip(data: bytes, position: int, bits: int = 255) -> bytes:
    """Change one byte."""
    changed = bytearray(data)
    changed[position] ^= bits
    return bytes(changed)


@pytest.mark.parametrize("kind", ["a.gz", "a.bz2", "a.xz", "a.zst", "a.zstd"])
def test_damaged_compressed_files_are_refused(tmp_path, kind):
    data = b"".join(line(os.urandom(50).hex()) + b"\n" for _ in range(6000))
    if kind == "a.gz":
        valid = gzip.compress(data)
    elif kind == "a.bz2":
        valid = bz2.compress(data, compresslevel=1)  # several blocks
    elif kind == "a.xz":
        valid = lzma.compress(data, preset=0)
    else:
        valid = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    path = tmp_path / kind
    path.write_bytes(valid)
    assert len(read_texts(open_source(path))) == 6000
    size = len(valid)
    damaged = [valid[:cut] for cut in (0, 1, 5, 17, size // 2, size - 9, size - 1)]
    damaged += [flip(valid, at) for at in (0, size // 2, size - 1)]
    if kind == "a.gz":
        damaged.append(flip(valid, size - 8, bits=1))  # the checksum
    damaged += [valid + valid[:9], valid + b"garbage"]
    decoded = []
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError) as info:
            read_texts(open_source(path), chunk_bytes=1000)
        message = str(info.value)
        start = f"{path}: the compressed data is damaged or cut off after "
        assert message.startswith(start) and message.endswith("). Fetch the file again")
        assert "\n" not in message
        decoded.append(int(message.removeprefix(start).split()[0]))
    assert decoded[:4] == [0] * 4 and 0 < decoded[4] < len(data) and decoded[-1] == len(data)


@pytest.mark.parametrize("kind", ["a.gz", "a.bz2", "a.xz"])
def test_failing_disk_is_no_damage(tmp_path, kind):
    """bz2 reports damage as an OSError, as the system reports a failing disk."""
    source = open_source(write(tmp_path, kind, line("a")))
    file = mock.Mock()
    file.read.side_effect = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        next(source._decompress(file))


@pytest.mark.parametrize(
    ("name", "module"),
    [("a.zst", "zstandard"), ("a.parquet", "pyarrow.parquet"), ("hf:name", "datasets")],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, name, module):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"")
    with mock.patch.dict(sys.modules, {module: None}), pytest.raises(ValueError) as info:
        open_sources([name])
    assert str(info.value) == (
        f"--input {name} needs the package {module.split('.')[0]}, which is not installed. "
        f"Install it: pip install 'moe-megatron[data]'"
    )


# Parquet


def test_unusable_parquet_values_are_rejected(tmp_path):
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 4, 5)))
    strings = pa.Array.from_buffers(
        pa.string(), 3, [None, offsets, pa.py_buffer(b"ok\xff\xfeb")]
    )
    pq.write_table(pa.table({"text": strings, "n": [1, 2, None]}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    reason = "'text' is binary; allowed: a string"
    assert read(source) == ([("ok",), ("b",)], [(2, 1, reason)], 3)
    (chunk,) = source.chunks(["n"])
    assert chunk.parse(["n"]).rejected == [
        RejectedRecord(1, 0, "'n' is int; allowed: a string", b'{"n": 1}'),
        RejectedRecord(2, 0, "'n' is int; allowed: a string", b'{"n": 2}'),
        RejectedRecord(3, 0, "'n' is NoneType; allowed: a string", b'{"n": null}'),
    ]
    assert chunk.location(2) == f"{tmp_path}/a.parquet, row 2"
    match = r"a.parquet: no column 'body'; there are: text, n. Set --json-keys$"
    with pytest.raises(ValueError, match=match):
        list(source.chunks(["body"]))
    rows = Chunk(0, "x", "row", 0, 2, 0, {"text": ["\ud800", b"\xff"]}).parse(["text"])
    assert [(r.reason, r.raw) for r in rows.rejected] == [
        ("'text' has a lone surrogate; allowed: a string in UTF-8", b'{"text": "\\ud800"}'),
        ("'text' is binary; allowed: a string", b'{"text": "b\'\\\\xff\'"}'),
    ]


def test_damaged_parquet_files_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [os.urandom(500).hex() for _ in range(100)]})
    pq.write_table(table, path, write_page_checksum=True)
    valid = path.read_bytes()
    damaged = (b"", b"text", valid[: len(valid) // 2], valid[:-1], flip(valid, 9999))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError) as info:
            read_texts(open_source(path))
        message = str(info.value)
        assert message.startswith(f"{path} is damaged, or no parquet file (")
        assert "\n" not in message


def test_row_groups_are_read_in_parts(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [os.urandom(5000).hex() for _ in range(3000)]}),
        path,
        row_group_size=3000,
        use_dictionary=False,
        write_batch_size=50,  # otherwise pages are as large as half of the row group
    )
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    most = 0
    for _ in open_source(path).chunks(["text"], chunk_bytes=1 << 20):
        most = max(most, pool.bytes_allocated() - before)
    assert path.stat().st_size > 15e6 and most < 5e6


# Pipes


def test_standard_input_and_pipes_are_read(tmp_path, monkeypatch):
    buffer = io.BytesIO(line("a") + b"\n" + line("b"))
    monkeypatch.setattr(sys, "stdin", mock.Mock(buffer=buffer))
    os.mkfifo(tmp_path / "pipe")
    data = b"".join(line(str(i)) + b"\n" for i in range(20000))
    thread = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    thread.start()
    stdin, pipe = open_sources(["-", str(tmp_path / "pipe")])
    assert read_texts(pipe, chunk_bytes=1000) == [*map(str, range(20000))]
    assert read_texts(stdin) == ["a", "b"]
    thread.join()
    assert not stdin.resumable and not pipe.resumable and stdin.size == pipe.size == 0
    assert stdin.identity() == ["standard input", 0, 0]
    assert pipe.identity() == [str(tmp_path / "pipe"), 0, 0]
