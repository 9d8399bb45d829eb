"""What the words after `--input` stand for: files, patterns, folders, pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from helpers.programs import BYTES, REPO, jsonl, one_line_error
from megatron.data.ingest.formats import JsonLines
from megatron.data.ingest.sources import open_sources


def touch(*names: str) -> None:
    """Create empty files, and their folders."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")


def test_inputs_are_expanded_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch("d/b.jsonl", "d/a.jsonl.gz", "d/s/c.JSON", "d/s/t/d.zst", "d/e.parquet")
    touch("d/README.md", "d/.hidden.jsonl", "d/.git/x.jsonl")
    touch("part-0", "part-1", "odd[1].jsonl", "f.zstd")
    for inputs, expected in (
        (["d"], "d/a.jsonl.gz d/b.jsonl d/e.parquet d/s/c.JSON d/s/t/d.zst"),
        (["part-1", "d/s/", "part-0"], "part-1 d/s/c.JSON d/s/t/d.zst part-0"),
        (["part-*"], "part-0 part-1"),
        (["d/*.[!m]*"], "d/a.jsonl.gz d/b.jsonl d/e.parquet"),
        (["d/**/*.jsonl", "d/**/*.JSON"], "d/b.jsonl d/s/c.JSON"),
        (["odd[1].jsonl", "-", "f.zstd"], "odd[1].jsonl|standard input|f.zstd"),
    ):
        sources = open_sources(inputs)
        assert [s.path for s in sources] == expected.split("|" if "|" in expected else " ")
        assert [s.number for s in sources] == list(range(len(sources)))


def test_suffix_selects_the_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch("d/b.jsonl", "d/a.jsonl.gz", "d/s/c.JSON", "d/s/t/d.zst", "d/e.parquet")
    touch("part-0", "f.zstd", "g.BZ2", "h.xz")
    os.symlink("..", "d/s/back")  # a link to a folder that contains it
    sources = open_sources(["d", "part-0", "f.zstd", "-", "g.BZ2", "h.xz"])
    assert [type(source).__name__ for source in sources] == [
        "GzipLines",
        "JsonLines",
        "Parquet",
        "JsonLines",
        "ZstandardLines",
        "JsonLines",
        "ZstandardLines",
        "PipeSource",
        "Bzip2Lines",
        "XzLines",
    ]
    stat = os.stat("part-0")
    (source,) = open_sources(["part-0"])
    assert source.identity() == [str(tmp_path / "part-0"), 0, stat.st_mtime_ns]
    assert source.resumable


def test_other_suffixes_are_json_lines(tmp_path, monkeypatch):
    """A file that is named, or matched by a pattern, may have any; in a folder it is no input."""
    monkeypatch.chdir(tmp_path)
    touch("d/a.jsonl", "d/lines.ndjson", "b.txt")
    for inputs in (["d/lines.ndjson"], ["b.txt"]):
        (source,) = open_sources(inputs)
        assert type(source) is JsonLines
    assert [source.path for source in open_sources(["d/*"])] == ["d/a.jsonl", "d/lines.ndjson"]
    assert [source.path for source in open_sources(["d"])] == ["d/a.jsonl"]


def test_missing_and_repeated_inputs_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch("d/a.jsonl", "none/README.md", "link/x")
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
            ".bz2 .xz .zst .zstd .parquet",
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
    denied = PermissionError(13, "Permission denied", "d")
    with (
        mock.patch("os.scandir", side_effect=denied),
        pytest.raises(PermissionError, match="Permission denied"),
    ):
        open_sources(["d"])


def test_files_with_two_names_are_refused(tmp_path, monkeypatch):
    """By a symbolic or a hard link."""
    monkeypatch.chdir(tmp_path)
    for folder in ("soft", "hard", "other"):
        os.mkdir(folder)
        jsonl(Path(folder, "a.jsonl"), ["x"])
    os.symlink("a.jsonl", "soft/b.jsonl")
    os.link("hard/a.jsonl", "hard/b.jsonl")
    os.symlink("soft", "linked")
    for inputs, match in (
        (
            ["soft"],
            rf"^--input names {tmp_path}/soft/b.jsonl twice "
            rf"\(also as {tmp_path}/soft/a.jsonl\); allowed: each once",
        ),
        (
            ["hard"],
            rf"^--input names {tmp_path}/hard/b.jsonl twice "
            rf"\(also as {tmp_path}/hard/a.jsonl\); allowed: each once",
        ),
        (
            ["linked/a.jsonl", "soft/a.jsonl"],
            f"soft/a.jsonl twice .also as {tmp_path}/linked/a.json",
        ),
    ):
        with pytest.raises(ValueError, match=match) as info:
            open_sources(inputs)
        assert "\n" not in str(info.value)
    paths = [source.path for source in open_sources(["soft/a.jsonl", "other"])]
    assert paths == ["soft/a.jsonl", "other/a.jsonl"]


def test_repeated_standard_input_is_refused(tmp_path):
    def train(*inputs: str, data: bytes) -> subprocess.CompletedProcess:
        program = [sys.executable, str(REPO / "tools/train_tokenizer.py")]
        return subprocess.run(
            [*program, "--input", *inputs, "--vocab-size", "300", "--output", "t.json"],
            cwd=tmp_path,
            input=data,
            capture_output=True,
            timeout=300,
        )

    for names in (("-", "/dev/stdin"), ("/dev/stdin", "-"), ("/dev/fd/0", "/dev/stdin")):
        done = train(*names, data=b'{"text": "a"}\n')
        assert done.returncode == 2 and b" twice (also as " in done.stderr
        assert done.stderr.count(b"\n") == 1
    assert b"1 of 1 documents" in train("-", data=b'{"text": "a"}\n').stdout


@pytest.mark.parametrize("script", ["tools/preprocess_data.py", "tools/train_tokenizer.py"])
def test_closed_standard_input_is_refused(tmp_path, script):
    more = "--vocab-size 300 --output x"
    if "preprocess" in script:
        more = f"--output-prefix x {' '.join(BYTES)}"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {REPO / script} --input - {more} <&-"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and not list(tmp_path.glob("x*"))
    assert one_line_error(done).endswith(
        "--input - is standard input, which is closed. Send it a file or the output of a program"
    )


def test_folders_give_finished_regular_files(tmp_path, monkeypatch):
    """Neither pipes nor what a run has not published yet."""
    monkeypatch.chdir(tmp_path)
    touch("d/a.jsonl", "d/x.partial/rejected.jsonl", "d/x.partial/lock")
    touch("d/y.partial/b.jsonl", "d/z/c.jsonl", "d/z/lock")
    os.mkfifo("d/pipe.jsonl")
    expected = ["d/a.jsonl", "d/y.partial/b.jsonl", "d/z/c.jsonl"]
    assert [s.path for s in open_sources(["d"])] == expected
    os.remove("d/pipe.jsonl")
    assert [s.path for s in open_sources(["d/**/*.jsonl"])] == expected
    unpublished = "d/x.partial/rejected.jsonl"
    assert [s.path for s in open_sources([unpublished])] == [unpublished]
