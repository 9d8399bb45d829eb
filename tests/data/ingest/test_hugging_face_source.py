"""Hugging Face datasets as document sources."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from helpers.sources import KEYS, open_source, read, read_texts
from megatron.data.ingest.sources import open_sources


@pytest.fixture
def write_dataset(tmp_path, monkeypatch):
    """A function that writes the splits of the local dataset hf:name."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def write(**splits: str) -> None:
        Path("name").mkdir(exist_ok=True)
        for split, content in splits.items():
            Path("name", split + ".jsonl").write_text(content)

    return write


def test_hugging_face_dataset_is_read(write_dataset):
    rows = [{"text": f"t{i}" * i, "title": None if i == 3 else "x", "n": i} for i in range(10)]
    write_dataset(
        train="".join(json.dumps(row) + "\n" for row in rows),
        test=json.dumps({"text": "b", "title": ""}),
    )
    source = open_source("hf:name")
    for chunk_bytes, number in ((1, 10), (30, 3), (10**6, 1)):
        chunks = list(source.chunks(KEYS, chunk_bytes=chunk_bytes))
        found, rejected, count = read(source, KEYS, chunk_bytes=chunk_bytes)
        assert found == [(r["text"], r["title"]) for r in rows if r["title"]] and count == 10
        assert rejected == [(4, 3, "'title' is NoneType; allowed: a string")]
        assert len(chunks) == number
        for i, chunk in enumerate(chunks):
            rest = list(source.chunks(KEYS, start=chunk.end, chunk_bytes=chunk_bytes))
            assert rest == chunks[i + 1 :]
    assert read_texts(open_source("hf:name@default:test")) == ["b"]
    assert chunks[0].location(4) == "hf:name, row 4"
    assert source.resumable and (source.size, source.unit) == (0, "row")


def test_identity_includes_local_files(write_dataset):
    write_dataset(train='{"text": "a"}\n', test='{"text": "b"}\n')
    source = open_source("hf:name")
    assert source.identity()[:3] == ["hf:name", 0, 0]
    files = sorted(str(path.resolve()) for path in Path("name").iterdir())
    assert [file for file, *_ in source.identity()[3]] == files
    assert open_source("hf:other").identity()[3] == []
    os.utime(files[0], (1, 1))
    assert open_source("hf:name").identity() != source.identity()


def test_unreadable_datasets_are_refused(write_dataset):
    write_dataset(train='{"text": "a"}\n')
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
            read(open_source(name), keys)
        assert str(info.value).startswith(message) and "\n" not in str(info.value)
    write_dataset(train='{"text": "a"}\n{"text"\n')
    with pytest.raises(ValueError, match=r"^--input hf:name cannot be read \(.+\)$"):
        read(open_source("hf:name"))
    for name in ("hf:", "hf:@x", "hf:a@b@c", "hf:a:"):
        with pytest.raises(ValueError, match="allowed for a Hugging Face dataset: hf:NAME"):
            open_sources([name])


def test_library_errors_take_one_line(write_dataset):
    """When the dataset is opened, and in the middle of its rows."""
    with (
        mock.patch("datasets.load_dataset", side_effect=ConnectionError("no\nnet")),
        pytest.raises(ValueError, match=r"^--input hf:far cannot be read \(no\)$"),
    ):
        read(open_source("hf:far"))
    rows = mock.MagicMock(column_names=["text"])
    rows.select_columns.return_value.skip.return_value = iter(lambda: 1 / 0, None)
    match = r"^--input hf:far cannot be read \(division by zero\)$"
    with (
        mock.patch("datasets.load_dataset", return_value=rows),
        pytest.raises(ValueError, match=match),
    ):
        read(open_source("hf:far"))
