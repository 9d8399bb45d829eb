"""Inputs of another format than their names promise, and numbers that JSON lacks."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.programs import BYTES, documents, run
from helpers.sources import open_source, read, read_texts

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), file)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(LINES)
        archive.addfile(entry, io.BytesIO(LINES))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return file.getvalue()


NAMED = "holds {}; allowed under this name: JSON lines. Give the file a name that ends in {}"
CONVERT = "holds {}; allowed: JSON lines in UTF-8. Unpack or convert it"
ARRAY = "holds a JSON array; allowed: one JSON object per line. Rewrite the file: jq -c '.[]'"
FILES = {
    "gzip": (gzip.compress(LINES), NAMED.format("gzip-compressed data", ".gz")),
    "bzip2": (bz2.compress(LINES), NAMED.format("bzip2-compressed data", ".bz2")),
    "xz": (lzma.compress(LINES), NAMED.format("xz-compressed data", ".xz")),
    "zstd": (
        zstandard.ZstdCompressor().compress(LINES),
        NAMED.format("data compressed with Zstandard", ".zst"),
    ),
    "parquet": (parquet(), NAMED.format("a Parquet table", ".parquet")),
    "tar": (tar(), CONVERT.format("a tar archive")),
    "zip": (zipped(), CONVERT.format("a zip archive")),
    "utf-16": (LINES.decode().encode("utf-16"), CONVERT.format("text in UTF-16")),
    "array": (b'[{"text": "a"}, {"text": "b"}]', ARRAY),
    "array of lines": (b'\n[\n{"text": "a"},\n{"text": "b"}\n]\n', ARRAY),
    "array of strings": (b'[\r\n"a",\r\n"b"\r\n]\r\n', ARRAY),
    "indented array": (json.dumps([{"text": "a"}], indent=4).encode(), ARRAY),
}


@pytest.mark.parametrize("name", FILES)
def test_other_formats_are_named(tmp_path, name):
    """Under a wrong name before any work, in an archive or a pipe when it is read."""
    content, message = FILES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as info:
        open_source(path)
    assert str(info.value) == f"{path} {message}"
    inside = tmp_path / "a.gz"
    inside.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError) as info:
        read(open_source(inside))
    assert str(info.value) == f"{inside} {message}"
    with (
        mock.patch.object(sys, "stdin", mock.Mock(buffer=io.BytesIO(content))),
        pytest.raises(ValueError) as info,
    ):
        read(open_source("-"))
    assert str(info.value) == f"standard input {message}"


def test_program_names_other_formats(tmp_path):
    """Such a file is no record that could be skipped."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(FILES["xz"][0])
    flags = ("--output-prefix", "d", "--on-error", "skip", *BYTES)
    done = run(
        "tools/preprocess_data.py",
        *("--input", "a.jsonl", "b.jsonl", *flags),
        cwd=tmp_path,
        code=2,
    )
    assert done.stderr == f"preprocess_data.py: error: b.jsonl {FILES['xz'][1]}\n"
    (tmp_path / "b.jsonl").rename(tmp_path / "b.xz")
    run("tools/preprocess_data.py", *("--input", "a.jsonl", "b.xz", *flags), cwd=tmp_path)
    assert documents(tmp_path / "d_text_document") == [[97], [98]] * 2


@pytest.mark.parametrize(
    "first", [b"[]", b'["a"]', b"[1, {}]", b"  [[]]", b"", b"\xef\xbb\xbf"]
)
def test_first_line_may_be_unusable(tmp_path, first):
    """A list in one line is a record to reject, and not a file of another format."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(first + b"\n" + LINES)
    found, rejected, _ = read(open_source(path))
    assert found == [("a",), ("b",)]
    assert [number for number, _, _ in rejected] == ([1] if b"[" in first else [])


@pytest.mark.parametrize("other", [r'"\ud83d"', "1e400", "9" * 4000, "[" * 300 + "]" * 300])
def test_other_keys_may_hold_what_python_reads(other, tmp_path):
    """orjson refuses each of these, which Python's json module reads."""
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a", "other": {other}}}\n')
    assert read_texts(open_source(path)) == ["a"]


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.floats() | st.text(max_size=9) | st.sampled_from(["NaN", '"Infinity\\']),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
        max_leaves=6,
    ),
    st.booleans(),
)
def test_python_numbers_are_read(tmp_path_factory, value, ascii_only):
    """Python's json module writes NaN and infinite numbers, which JSON lacks."""
    record = {"score": value, "text": 'NaN, -Infinity: "\\'}
    content = json.dumps(record, ensure_ascii=ascii_only)
    path = Path(tmp_path_factory.mktemp("n"), "a.jsonl")
    path.write_text(content + "\n", encoding="utf-8")
    assert read_texts(open_source(path)) == [record["text"]]
