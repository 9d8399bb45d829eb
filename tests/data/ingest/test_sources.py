"""Reading documents: every kind of source against a dumb loop, hostile and damaged files, what `--input` may name."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
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

from megatron.data.ingest.records import CHUNK_BYTES, Chunk, RejectedRecord
from megatron.data.ingest.sources import DocumentSource, open_sources

KEYS = ["text", "title"]
BOM = b"\xef\xbb\xbf"
LINE_KINDS = ["plain.jsonl", "members.gz", "frames.zst", "-"]


def line(text: str, title: str = "") -> bytes:
    return json.dumps({"text": text, "title": title}, ensure_ascii=False).encode()


def write(folder: str | Path, kind: str, data: bytes) -> str:
    """`data` as a source of that kind: gz and zst in two members, with what may stand between and behind them."""
    path, half = Path(folder, kind), len(data) // 2
    if kind.endswith(".gz"):
        data = gzip.compress(data[:half]) + gzip.compress(data[half:]) + b"\0" * 20
    elif kind.endswith(".zst"):
        skippable = bytes.fromhex("502a4d18 03000000 616263")
        frames = [
            zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])
        ]
        data = frames[0] + skippable + frames[1]
    if kind == "-":
        sys.stdin = mock.Mock(buffer=io.BytesIO(data))  # the caller puts it back
    else:
        path.write_bytes(data)
    return kind if kind == "-" else str(path)


def only(path: str | Path) -> DocumentSource:
    (source,) = open_sources([str(path)])
    return source


def read(
    source: DocumentSource, keys=("text",), **arguments
) -> tuple[list[tuple], list[tuple[int, int, str]], int]:
    """(values of each document, (number, documents before, reason) of each rejected record, records)."""
    documents, rejected, lines = [], [], 0
    for chunk in source.chunks(keys, **arguments):
        parsed = pickle.loads(pickle.dumps(chunk)).parse(keys)
        assert parsed == chunk.parse(keys) and {len(parsed.texts[key]) for key in keys} == {
            len(parsed.texts[keys[0]])
        }
        rejected += [
            (lines + r.line, len(documents) + r.before, r.reason) for r in parsed.rejected
        ]
        documents += zip(*(parsed.texts[key] for key in keys))
        lines += parsed.lines
    return documents, rejected, lines


def texts(source: DocumentSource, **arguments) -> list[str]:
    documents, rejected, _ = read(source, **arguments)
    assert not rejected
    return [text for (text,) in documents]


GOOD = st.tuples(st.text(max_size=30), st.text(max_size=5)).map(lambda pair: line(*pair))
LINES = st.lists(
    st.one_of(
        GOOD,
        GOOD,
        st.sampled_from(
            [
                b"",
                b" \t",
                b"\r",
                b"[]",
                b'{"text": 1, "title": ""}',
                b'{"text": ""}',
                b'{"text": "a", "title": NaN}',
                b'{"text": "\xff", "title": ""}',
                line("a" * 500),
            ]
        ),
    ),
    max_size=12,
)


def dumb_lines(
    lines: list[bytes], chunk_bytes: int
) -> tuple[list[tuple], list[tuple[int, int]], list[int]]:
    """(documents, (line, documents before) of the bad ones, chunks' ends) of lines with their line feeds."""
    documents, bad, ends, at, begun = [], [], [], 0, 0
    for number, raw in enumerate(lines, 1):
        at += len(raw)
        if at - begun >= chunk_bytes or number == len(lines):
            ends.append(at)
            begun = at
        try:
            record = json.loads(raw.removeprefix(BOM if number == 1 else b"").decode())
            documents.append((str.__str__(record["text"]), str.__str__(record["title"])))
        except (ValueError, KeyError, TypeError):
            if raw.removeprefix(BOM if number == 1 else b"").strip():
                bad.append((number, len(documents)))
    return documents, bad, ends


@settings(max_examples=150, deadline=None)
@given(
    LINES,
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 300),
    st.sampled_from(LINE_KINDS),
)
def test_lines_against_a_dumb_loop(raw, feed, bom, last_feed, chunk_bytes, kind):
    lines = [part + feed for part in raw]
    if lines and not last_feed:
        lines[-1] = lines[-1].removesuffix(feed)
    lines = [part for part in [(BOM if bom else b"") + b"".join(lines[:1]), *lines[1:]] if part]
    documents, bad, ends = dumb_lines(lines, chunk_bytes)
    data = b"".join(lines)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "stdin"):
        source = only(write(folder, kind, data))
        chunks = list(source.chunks(KEYS, chunk_bytes=chunk_bytes))
        assert [chunk.end for chunk in chunks] == ends
        assert [chunk.start for chunk in chunks] == [0, *ends][: len(ends)]
        assert {chunk.unit for chunk in chunks} <= {"line"} and source.unit == "line"
        assert sum(chunk.read for chunk in chunks) == (source.size if chunks else 0)
        assert source.size == (0 if kind == "-" else os.path.getsize(source.path))
        write(folder, kind, data)
        found, rejected, count = read(source, KEYS, chunk_bytes=chunk_bytes)
        assert found == documents and [r[:2] for r in rejected] == bad
        assert count == len(lines) - (lines[:1] == [BOM])  # nothing is left of such a line
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
def test_parquet_against_a_dumb_loop(rows, group, chunk_bytes):
    documents = [row for row in rows if None not in row]
    bad = [
        (n, sum(None not in row for row in rows[:n]))
        for n, row in enumerate(rows, 1)
        if None in row
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.parquet")
        columns = [pa.array(column, pa.string()) for column in zip(*rows)] or [
            pa.array([], pa.string())
        ] * 2
        pq.write_table(
            pa.table(
                [columns[1], pa.array(range(len(rows))), columns[0]], ["title", "n", "text"]
            ),
            path,
            row_group_size=group,
        )
        source = only(path)
        chunks = list(source.chunks(KEYS, chunk_bytes=chunk_bytes))
        found, rejected, count = read(source, KEYS, chunk_bytes=chunk_bytes)
        assert found == documents and [r[:2] for r in rejected] == bad and count == len(rows)
        assert [*(c.start for c in chunks), len(rows)] == [0, *(c.end for c in chunks)]
        assert sum(chunk.read for chunk in chunks) == (source.size if chunks else 0)
        size = sum(1 + sum(len(value or "") for value in row) for row in rows)
        assert len(chunks) <= size // chunk_bytes + 1 and source.unit == "row"
        for i, chunk in enumerate(chunks):
            assert (
                list(source.chunks(KEYS, start=chunk.end, chunk_bytes=chunk_bytes))
                == chunks[i + 1 :]
            )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (
            b'{"text": "a"',
            "not a JSON object in UTF-8 (unexpected end of data: line 1 column 13 (char 12))",
        ),
        (b"text", "not a JSON object in UTF-8 ("),
        (b'{"text": "\xff"}', "not a JSON object in UTF-8 (str is not valid UTF-8"),
        (b'{"text": "\\ud800"}', "not a JSON object in UTF-8 ("),
        (b'{"text": "a", "n": NaN}', "not a JSON object in UTF-8 ("),
        (b'{"text": "a"} {"text": "b"}', "not a JSON object in UTF-8 ("),
        (b'{"text": "a\x00"}', "not a JSON object in UTF-8 ("),
        (b"[" * 5000 + b"]" * 5000, "not a JSON object in UTF-8 ("),
        (BOM + b'{"text": "a"}', "not a JSON object in UTF-8 ("),
        (
            b'{"body": "a", "title": "b"}',
            "no key 'text'; there are: body, title. Set --json-keys",
        ),
        (b'{"a\\nb": 1}', "no key 'text'; there are: a\\nb. Set --json-keys"),
        (
            json.dumps({str(i): 0 for i in range(9999)}).encode(),
            "no key 'text'; there are: 0, 1, 2, 3, 4, 5, ",
        ),
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
def test_lines_that_cannot_be_used(tmp_path, monkeypatch, kind, bad, reason):
    monkeypatch.setattr(sys, "stdin", None)
    source = only(write(tmp_path, kind, line("good") + b"\n\r\n" + bad + b"\r\n" + line("")))
    (chunk,) = source.chunks(["text"])
    parsed = chunk.parse(["text"])
    (rejected,) = parsed.rejected
    assert parsed.texts == {"text": ["good", ""]} and parsed.lines == 4
    assert (rejected.line, rejected.before, rejected.raw) == (3, 1, bad + b"\r")
    assert (
        rejected.reason.startswith(reason)
        and len(rejected.reason) < 400
        and "\n" not in rejected.reason
    )
    assert chunk.place(3) == f"{'standard input' if kind == '-' else source.path}:3"


def test_a_document_needs_all_keys():
    data = b'{"text": "a", "title": "b"}\n{"text": "a"}\n{"title": "b"}\n{"text": "a", "title": 5}\n'
    parsed = Chunk(0, "x", "line", 0, len(data), 0, data).parse(KEYS)
    assert parsed.texts == {"text": ["a"], "title": ["b"]} and [
        r.line for r in parsed.rejected
    ] == [2, 3, 4]
    assert [r.reason.split(";")[0] for r in parsed.rejected] == [
        "no key 'title'",
        "no key 'text'",
        "'title' is a JSON int",
    ]


@pytest.mark.parametrize("kind", LINE_KINDS)
def test_long_lines_and_empty_files(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sys, "stdin", None)
    documents = ["x" * 3_000_000, "é", "\u2028\x0b\x85", "y" * 1_000_000]
    source = only(write(tmp_path, kind, b"\n".join(line(d) for d in documents)))
    chunks = list(source.chunks(["text"], chunk_bytes=1000))
    assert [
        text for c in chunks for text in c.parse(["text"]).texts["text"]
    ] == documents and len(chunks) == 2
    assert list(only(write(tmp_path, kind, b"")).chunks(["text"])) == []
    assert texts(only(write(tmp_path, kind, BOM))) == []


def test_a_chunk_is_bounded_whatever_the_compression(tmp_path):
    data = (line("a" * 1000) + b"\n") * 30000
    for kind in ("a.gz", "b.zst"):
        chunks = list(only(write(tmp_path, kind, data)).chunks(["text"]))
        assert [len(c.data) for c in chunks[:-1]] == [
            CHUNK_BYTES + -CHUNK_BYTES % len(line("a" * 1000) + b"\n")
        ] * 3
        assert sum(len(c.data) for c in chunks) == len(data)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((line("abc") + b"\n") * 10)
    source = only(path)
    with open(path, "ab") as file:
        file.write(b"\n" * 100)
    first, second = source.chunks(["text"], chunk_bytes=200)
    assert second.end == source.size and len(first.parse(["text"]).texts["text"]) == 7
    path.write_bytes(path.read_bytes()[:210])
    for chunk in (second, list(source.chunks(["text"]))[-1]):
        with pytest.raises(
            ValueError, match=f"^{path} became shorter while it was read: it ends before byte "
        ):
            chunk.parse(["text"])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        first.parse(["text"])


@pytest.mark.parametrize("kind", ["a.gz", "a.zst", "a.zstd"])
def test_damaged_compressed_files(tmp_path, kind):
    data = b"".join(line(os.urandom(50).hex()) + b"\n" for _ in range(6000))
    whole = (
        gzip.compress(data)
        if kind == "a.gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    )
    path = tmp_path / kind
    path.write_bytes(whole)
    assert len(texts(only(path))) == 6000
    cuts = [0, 1, 5, 17, len(whole) // 2, len(whole) - 9, len(whole) - 1]
    flipped = [
        whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
        for at in (0, len(whole) // 2, len(whole) - 1)
    ]
    if kind == "a.gz":
        flipped.append(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])  # the checksum
    done = []
    for content in [
        *(whole[:cut] for cut in cuts),
        *flipped,
        whole + whole[:9],
        whole + b"garbage",
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError) as info:
            texts(only(path), chunk_bytes=1000)
        assert str(info.value).startswith(
            f"{path}: the compressed data is damaged or cut off after "
        )
        assert "\n" not in str(info.value) and str(info.value).endswith(
            "). Fetch the file again"
        )
        done.append(int(str(info.value).split("after ")[1].split()[0]))
    assert done[:4] == [0] * 4 and 0 < done[4] < len(data) and done[-1] == len(data)


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.zst", "zstandard"), ("a.parquet", "pyarrow.parquet"), ("hf:name", "datasets")],
)
def test_optional_packages(tmp_path, monkeypatch, name, package):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"")
    with mock.patch.dict(sys.modules, {package: None}), pytest.raises(ValueError) as info:
        open_sources([name])
    assert str(info.value) == (
        f"--input {name} needs the package {package.split('.')[0]}, which is not installed. "
        f"Install it: pip install 'moe-megatron[data]'"
    )


def test_parquet_values_that_cannot_be_used(tmp_path):
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 4, 5)))
    strings = pa.Array.from_buffers(
        pa.string(), 3, [None, offsets, pa.py_buffer(b"ok\xff\xfeb")]
    )
    pq.write_table(pa.table({"text": strings, "n": [1, 2, None]}), tmp_path / "a.parquet")
    source = only(tmp_path / "a.parquet")
    assert read(source) == (
        [("ok",), ("b",)],
        [(2, 1, "'text' is binary; allowed: a string")],
        3,
    )
    (chunk,) = source.chunks(["n"])
    assert chunk.parse(["n"]).rejected == [
        RejectedRecord(1, 0, "'n' is int; allowed: a string", b'{"n": 1}'),
        RejectedRecord(2, 0, "'n' is int; allowed: a string", b'{"n": 2}'),
        RejectedRecord(3, 0, "'n' is NoneType; allowed: a string", b'{"n": null}'),
    ]
    assert chunk.place(2) == f"{tmp_path}/a.parquet, row 2"
    with pytest.raises(
        ValueError, match=r"a.parquet: no column 'body'; there are: text, n. Set --json-keys$"
    ):
        list(source.chunks(["body"]))
    rows = Chunk(0, "x", "row", 0, 2, 0, {"text": ["\ud800", b"\xff"]}).parse(["text"])
    assert [(r.reason, r.raw) for r in rows.rejected] == [
        ("'text' has a lone surrogate; allowed: a string in UTF-8", b'{"text": "\\ud800"}'),
        ("'text' is binary; allowed: a string", b'{"text": "b\'\\\\xff\'"}'),
    ]


def test_damaged_parquet_files(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [os.urandom(500).hex() for _ in range(100)]}),
        path,
        write_page_checksum=True,
    )
    whole = path.read_bytes()
    for content in (
        b"",
        b"text",
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:9999] + bytes([whole[9999] ^ 255]) + whole[10000:],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError) as info:
            texts(only(path))
        assert str(info.value).startswith(
            f"{path} is damaged, or no parquet file ("
        ) and "\n" not in str(info.value)


def test_a_row_group_is_not_read_at_once(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [os.urandom(5000).hex() for _ in range(3000)]}),
        path,
        row_group_size=3000,
        use_dictionary=False,
        write_batch_size=50,
    )  # else pages as large as half of the row group
    pool, most = pa.default_memory_pool(), 0
    before = pool.bytes_allocated()
    for _ in only(path).chunks(["text"], chunk_bytes=1 << 20):
        most = max(most, pool.bytes_allocated() - before)
    assert path.stat().st_size > 15e6 and most < 5e6


def test_standard_input_and_pipes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", mock.Mock(buffer=io.BytesIO(line("a") + b"\n" + line("b")))
    )
    os.mkfifo(tmp_path / "pipe")
    data = b"".join(line(str(i)) + b"\n" for i in range(20000))
    thread = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    thread.start()
    stdin, pipe = open_sources(["-", str(tmp_path / "pipe")])
    assert texts(pipe, chunk_bytes=1000) == [*map(str, range(20000))] and texts(stdin) == [
        "a",
        "b",
    ]
    thread.join()
    assert not stdin.resumable and not pipe.resumable and stdin.size == pipe.size == 0
    assert stdin.identity() == ["standard input", 0, 0] and pipe.identity() == [
        str(tmp_path / "pipe"),
        0,
        0,
    ]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder whose `name` is the dataset hf:name; the library writes nothing outside it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def dataset(**files: str) -> None:
        for name, content in files.items():
            Path("name", name + ".jsonl").parent.mkdir(exist_ok=True)
            Path("name", name + ".jsonl").write_text(content)

    return dataset


def test_a_hugging_face_dataset(hub):
    rows = [{"text": f"t{i}" * i, "title": None if i == 3 else "x", "n": i} for i in range(10)]
    hub(
        train="".join(json.dumps(row) + "\n" for row in rows),
        test=json.dumps({"text": "b", "title": ""}),
    )
    source = only("hf:name")
    for chunk_bytes in (1, 30, 10**6):
        chunks = list(source.chunks(KEYS, chunk_bytes=chunk_bytes))
        found, rejected, count = read(source, KEYS, chunk_bytes=chunk_bytes)
        assert found == [(r["text"], r["title"]) for r in rows if r["title"]] and count == 10
        assert rejected == [(4, 3, "'title' is NoneType; allowed: a string")]
        assert len(chunks) == {1: 10, 30: 3, 10**6: 1}[chunk_bytes]
        for i, chunk in enumerate(chunks):
            assert (
                list(source.chunks(KEYS, start=chunk.end, chunk_bytes=chunk_bytes))
                == chunks[i + 1 :]
            )
    assert (
        texts(only("hf:name@default:test")) == ["b"] and chunks[0].place(4) == "hf:name, row 4"
    )
    assert (
        source.resumable
        and source.identity()[:3] == ["hf:name", 0, 0]
        and (source.size, source.unit) == (0, "row")
    )
    files = sorted(str(path.resolve()) for path in Path("name").iterdir())
    assert [file for file, *_ in source.identity()[3]] == files and open_sources(["hf:other"])[
        0
    ].identity()[3] == []
    os.utime(files[0], (1, 1))
    assert only("hf:name").identity() != source.identity()


def test_hugging_face_datasets_that_cannot_be_read(hub):
    hub(train='{"text": "a"}\n')
    for name, keys, message in (
        ("hf:name:other", ["text"], "--input hf:name:other cannot be read (Bad split: other"),
        (
            "hf:name@cfg",
            ["text"],
            "--input hf:name@cfg cannot be read (BuilderConfig 'cfg' not found",
        ),
        ("hf:name", ["body"], "hf:name: no column 'body'; there are: text. Set --json-keys"),
    ):
        with pytest.raises(ValueError) as info:
            read(only(name), keys)
        assert str(info.value).startswith(message) and "\n" not in str(info.value)
    hub(train='{"text": "a"}\n{"text"\n')
    with pytest.raises(ValueError, match=r"^--input hf:name cannot be read \(.+\)$"):
        read(only("hf:name"))
    with (
        mock.patch("datasets.load_dataset", side_effect=ConnectionError("no\nnet")),
        pytest.raises(ValueError, match=r"^--input hf:far cannot be read \(no\)$"),
    ):
        read(only("hf:far"))
    rows = mock.MagicMock(column_names=["text"])  # breaks off in the middle
    rows.select_columns.return_value.skip.return_value = iter(lambda: 1 / 0, None)
    with (
        mock.patch("datasets.load_dataset", return_value=rows),
        pytest.raises(
            ValueError, match=r"^--input hf:far cannot be read \(division by zero\)$"
        ),
    ):
        read(only("hf:far"))
    for name in ("hf:", "hf:@x", "hf:a@b@c", "hf:a:"):
        with pytest.raises(ValueError, match="allowed for a Hugging Face dataset: hf:NAME"):
            open_sources([name])


def test_what_inputs_stand_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "d/b.jsonl",
        "d/a.jsonl.gz",
        "d/s/c.JSON",
        "d/s/t/d.zst",
        "d/e.parquet",
        "d/README.md",
        "d/.hidden.jsonl",
        "d/.git/x.jsonl",
        "part-0",
        "part-1",
        "odd[1].jsonl",
        "f.zstd",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    for inputs, expected in (
        (["d"], "d/a.jsonl.gz d/b.jsonl d/e.parquet d/s/c.JSON d/s/t/d.zst"),
        (["part-1", "d/s/", "part-0"], "part-1 d/s/c.JSON d/s/t/d.zst part-0"),
        (["part-*"], "part-0 part-1"),
        (["d/*"], "d/README.md d/a.jsonl.gz d/b.jsonl d/e.parquet"),
        (["d/**/*.jsonl", "d/**/*.JSON"], "d/b.jsonl d/s/c.JSON"),
        (["odd[1].jsonl", "-", "f.zstd"], "odd[1].jsonl|standard input|f.zstd"),
    ):
        sources = open_sources(inputs)
        assert [s.path for s in sources] == expected.split("|" if "|" in expected else " ")
        assert [s.number for s in sources] == list(range(len(sources)))
    os.symlink("..", "d/s/back")  # leads round in a circle
    kinds = {
        s.path: type(s).__name__
        for s in open_sources(["d", "part-0", "f.zstd", "-", "d/README.md"])
    }
    assert list(kinds.values()) == [
        "CompressedLines",
        "JsonLines",
        "Parquet",
        "JsonLines",
        "CompressedLines",
        "JsonLines",
        "CompressedLines",
        "Stream",
        "JsonLines",
    ]
    stat = os.stat("part-0")
    assert (
        only("part-0").identity() == [str(tmp_path / "part-0"), 0, stat.st_mtime_ns]
        and only("part-0").resumable
    )


def test_inputs_that_stand_for_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/a.jsonl", "none/README.md", "link/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    os.symlink("nowhere", "link/gone.jsonl")
    twice = f"--input names {tmp_path}/d/a.jsonl twice; allowed: each once"
    for inputs, error, message in (
        (["gone"], FileNotFoundError, "--input gone does not exist"),
        ([""], FileNotFoundError, "--input  does not exist"),
        (["link"], FileNotFoundError, "--input link/gone.jsonl does not exist"),
        (["d/*.txt"], FileNotFoundError, "--input d/*.txt matches no file"),
        (
            ["none"],
            ValueError,
            "--input none is a folder without files of a known suffix; known: .jsonl .json .gz "
            ".zst .zstd .parquet",
        ),
        (["d", "d/a.jsonl"], ValueError, twice),
        (["d/a.jsonl", "./d/*.jsonl"], ValueError, twice),
        (["d/a.jsonl", str(tmp_path / "d/a.jsonl")], ValueError, twice),
        (["-", "-"], ValueError, "--input names - twice"),
        (["hf:a", "hf:a"], ValueError, "--input names hf:a twice"),
    ):
        with pytest.raises(error) as info:
            open_sources(inputs)
        assert str(info.value).startswith(message) and "\n" not in str(info.value)
    with (
        mock.patch("os.scandir", side_effect=PermissionError(13, "Permission denied", "d")),
        pytest.raises(PermissionError, match="Permission denied"),
    ):
        open_sources(["d"])
