"""Tests of merging datasets: exact joins, incompatible inputs, one-line errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.programs import REPO, TEXTS, documents, one_line_error, run
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import IndexedWriter
from megatron.tokenizer.byte import ByteTokenizer
from tools import merge_datasets

TOOL = "tools/merge_datasets.py"


def shard(prefix: Path, texts: list[str], sidecar: bool = True, **changes) -> list[list[int]]:
    t, name = ByteTokenizer(), f"{prefix}_text_document"
    with IndexedWriter(name, np.uint16) as writer:
        for text in texts:
            writer.add_document([*t.encode(text).tolist(), t.eod] if text else [])
        writer.finish(
            {
                "tokenizer": t.name,
                "vocab_hash": t.fingerprint,
                "vocab_size": t.vocab_size,
                "eod": t.eod,
                "append_eod": True,
                "sources": [f"{prefix.name}.jsonl"],
                **changes,
            }
        )
    if not sidecar:
        Path(f"{name}.json").unlink()
    return documents(Path(name))


def merge_here(monkeypatch, *arguments, code: int = 0) -> None:
    """Run the program in this process, where functions can be replaced."""
    monkeypatch.setattr(sys, "argv", ["merge_datasets.py", *map(str, arguments)])
    assert merge_datasets.main() == code


def refusal(monkeypatch, capsys, *arguments) -> str:
    merge_here(monkeypatch, *arguments, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_merge_concatenates_in_name_order(tmp_path):
    (tmp_path / "s").mkdir()
    last, first = shard(tmp_path / "s/b", TEXTS), shard(tmp_path / "s/a", ["x", "", "yz"])
    done = run(
        "tools/merge_datasets.py", "--input", "s", "--output-prefix", "out/all", cwd=tmp_path
    )
    assert documents(tmp_path / "out/all") == first + last
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "s/a_text_document",
        "s/b_text_document",
        "-> out/all",
    ]
    shard(tmp_path / "once", ["x", "", "yz", *TEXTS])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out/all{suffix}").read_bytes() == (
            tmp_path / f"once_text_document{suffix}"
        ).read_bytes()
    side = IndexedDataset(tmp_path / "out/all").sidecar
    assert (
        side["vocab_hash"] == ByteTokenizer().fingerprint
        and side["documents"] == 7
        and side["append_eod"] is True
    )
    assert [Path(p).name for p in side["merged"]] == ["a_text_document", "b_text_document"]
    assert side["sources"] == ["a.jsonl", "b.jsonl"]


def test_merge_without_sidecar_records_no_tokenizer(tmp_path):
    shard(tmp_path / "a", ["x"]), shard(tmp_path / "b", ["y"], sidecar=False)
    done = run(
        "tools/merge_datasets.py",
        "--input",
        "b_text_document",
        "a_text_document",
        "--output-prefix",
        "all",
        cwd=tmp_path,
    )
    assert (
        "b_text_document: 1 documents, 2 tokens (no .json: its tokenizer is not checked)"
        in done.stdout
    )
    assert (
        documents(tmp_path / "all") == [[120, 256], [121, 256]]
        and "vocab_hash" not in IndexedDataset(tmp_path / "all").sidecar
    )


def test_incompatible_inputs_are_refused(tmp_path):
    for name, changes in (
        ("a", {}),
        ("b", {"vocab_hash": "other"}),
        ("c", {"append_eod": False}),
    ):
        shard(tmp_path / name, ["x"], **changes)
    with IndexedWriter(tmp_path / "wide_text_document", np.int32) as writer:
        writer.add_document([1])
    (tmp_path / "nothing").mkdir()
    a = "a_text_document"
    for inputs, match in (
        (
            (a, "b_text_document"),
            "b_text_document.json records vocab_hash other, a_text_document.json ",
        ),
        ((a, "c_text_document"), "records append_eod False"),
        ((a, "wide_text_document"), "wide_text_document holds int32, a_text_document uint16"),
        ((a, "./" + a), f"--input names {tmp_path}/{a} twice"),
        (("nothing",), "--input nothing is a folder without .idx files"),
        ((a, "all"), "--output-prefix all is also an input"),
        ((a, "zzz"), "zzz.idx does not exist"),
    ):
        line = one_line_error(
            run(
                "tools/merge_datasets.py",
                "--input",
                *inputs,
                "--output-prefix",
                "all",
                cwd=tmp_path,
                code=2,
            )
        )
        assert match in line
    assert not list(tmp_path.glob("*all*"))


def test_inputs_are_sorted_by_prefix(tmp_path, monkeypatch, capsys):
    """Prefixes may be given with .bin or .idx."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("m")
    for name in ("m/10", "m/9", "b", "a", "z.bin"):
        shard(Path(name), [name])
    merge_here(
        monkeypatch,
        "--input",
        "b_text_document.bin",
        "m",
        "a_text_document.idx",
        "z.bin_text_document",
        "--output-prefix",
        "all.bin",
        "--verify",
    )
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "a_text_document",
        "b_text_document",
        "m/10_text_document",
        "m/9_text_document",
        "z.bin_text_document",
        "-> all",
    ]
    assert documents(tmp_path / "all") == [
        [*name.encode(), 256] for name in ("a", "b", "m/10", "m/9", "z.bin")
    ]


def test_suffix_of_the_name_stays(tmp_path):
    with IndexedWriter(tmp_path / "x.bin", np.uint16) as writer:
        writer.add_document([1])
    assert merge_datasets.find_prefixes(
        [str(tmp_path / "x.bin"), str(tmp_path / "y.bin")], "z"
    ) == [str(tmp_path / "x.bin"), str(tmp_path / "y")]


def test_full_disk_is_refused_first(tmp_path, monkeypatch, capsys):
    """Disk space is checked before anything is written."""
    shard(tmp_path / "a", ["x" * 99]), shard(tmp_path / "b", ["", "y" * 99])
    inputs = (
        "--input",
        tmp_path / "a_text_document",
        tmp_path / "b_text_document",
        "--output-prefix",
        tmp_path / "new/folder/all",
    )
    result, notes = 2 * 200 + 34 + 12 * 2 + 8 * 4, 4 * 2 + 4 * 3
    asked, left = [], []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: asked.append(path) or usage._replace(free=left[-1])
    )
    left.append(result + notes - 1)
    assert refusal(monkeypatch, capsys, *inputs) == (
        f"merge_datasets.py: error: {tmp_path}/new/folder/all needs 0.0 MB, but the disk of "
        f"{tmp_path} has 0.0 MB free. Free some space there, or write to another disk"
    )
    assert asked == [tmp_path] and not (tmp_path / "new").exists()
    left.append(result + 100)  # the estimate counts each input's header and first boundary
    merge_here(monkeypatch, *inputs)
    assert (
        sum(path.stat().st_size for path in (tmp_path / "new/folder").glob("all.[bi]*"))
        == result
    )


@pytest.mark.parametrize(
    ("corruption", "match"),
    [
        ("tokens", "all.bin differs from SHARDS/b_text_document.bin in the "),
        ("lengths", "all.idx differs from the indices of the inputs"),
        ("documents", "all.idx differs from the indices of the inputs"),
        ("magic", "all.idx is not a Megatron index"),
        ("short", "all.bin has 2 bytes, but its index counts "),
    ],
)
def test_verify_refuses_wrong_result(tmp_path, monkeypatch, capsys, corruption, match):
    shard(tmp_path / "a", ["xyz", "", "z"]), shard(tmp_path / "b", TEXTS)
    inputs = sorted(os.listdir(tmp_path))
    prepare = IndexedWriter.prepare

    def prepare_badly(writer: IndexedWriter, sidecar: dict) -> str:
        prefix = prepare(writer, sidecar)
        data = {
            suffix: bytearray(Path(prefix + suffix).read_bytes()) for suffix in (".bin", ".idx")
        }
        if corruption == "lengths":  # the same tokens as one document
            other = IndexedWriter(tmp_path.parent / "other", np.uint16)
            other.add_document(np.frombuffer(data[".bin"], np.uint16))
            shutil.copy(prepare(other) + ".idx", prefix + ".idx")
            other.discard()
        elif corruption == "short":
            os.truncate(prefix + ".bin", 2)
        else:
            suffix, at = {
                "tokens": (".bin", 15),
                "documents": (".idx", -16),
                "magic": (".idx", 0),
            }[corruption]
            data[suffix][at] ^= 1
            Path(prefix + suffix).write_bytes(data[suffix])
        return prefix

    monkeypatch.setattr(IndexedWriter, "prepare", prepare_badly)
    line = refusal(
        monkeypatch,
        capsys,
        "--input",
        tmp_path,
        "--output-prefix",
        tmp_path / "all",
        "--verify",
    )
    assert line.startswith("merge_datasets.py: error: --verify: ") and line.endswith(
        ". Nothing is published: merge again, and if this comes back, check the disk"
    )
    assert (
        match.replace("SHARDS", str(tmp_path)) in line
        and sorted(os.listdir(tmp_path)) == inputs
    )


def test_verify_names_the_position(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_datasets, "COMPARE_BYTES", 4)
    shard(tmp_path / "a", ["xyz"]), shard(tmp_path / "b", ["abcde"])
    datasets = [IndexedDataset(tmp_path / f"{name}_text_document") for name in "ab"]
    merge_here(monkeypatch, "--input", tmp_path, "--output-prefix", tmp_path / "all")
    seen = []
    merge_datasets.verify(str(tmp_path / "all"), datasets, seen.append)
    assert seen == [4] * 5
    data = bytearray((tmp_path / "all.bin").read_bytes())
    data[13] ^= 1
    (tmp_path / "all.bin").write_bytes(data)
    with pytest.raises(ValueError, match="b_text_document.bin in the 4 bytes from byte 12 on"):
        merge_datasets.verify(str(tmp_path / "all"), datasets, seen.append)


def test_linked_inputs_are_named_twice(tmp_path):
    """A pair that is named twice through a link is refused."""
    (tmp_path / "s").mkdir()
    shard(tmp_path / "s/a", ["x"]), shard(tmp_path / "b", ["y"])
    os.symlink("s", tmp_path / "link")
    for suffix in ("bin", "idx"):
        os.symlink(f"a_text_document.{suffix}", tmp_path / f"s/z.{suffix}")
        os.link(tmp_path / f"b_text_document.{suffix}", tmp_path / f"hard.{suffix}")
    b = (tmp_path / "b_text_document.idx").read_bytes()
    for inputs, output, match in (
        (("s",), "all", f"--input names {tmp_path}/s/"),
        (
            ("s/z", "link/a_text_document"),
            "all",
            f"--input names {tmp_path}/s/z twice. Name each shard once",
        ),
        (("hard", "b_text_document"), "all", f"--input names {tmp_path}/hard twice"),
        (
            ("s/a_text_document", "b_text_document"),
            "link/a_text_document",
            "--output-prefix link/a_text_document is also an input",
        ),
        (("b_text_document",), "hard", "--output-prefix hard is also an input"),
    ):
        line = one_line_error(
            run(TOOL, "--input", *inputs, "--output-prefix", output, cwd=tmp_path, code=2)
        )
        assert match in line
    assert (
        not list(tmp_path.glob("all*")) and (tmp_path / "b_text_document.idx").read_bytes() == b
    )


def test_output_without_name_is_refused(tmp_path):
    shard(tmp_path / "a", ["x"])
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    for output in ("", "new/", "folder", "folder/", "."):
        line = one_line_error(
            run(
                TOOL,
                "--input",
                "a_text_document",
                "--output-prefix",
                output,
                cwd=tmp_path,
                code=2,
            )
        )
        assert (
            f"--output-prefix is {output!r}; allowed: a path that ends in the pair's name, such as "
            in line
        )
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(tmp_path / "folder") == []


def test_malformed_sources_are_refused(tmp_path):
    shard(tmp_path / "a", ["x"]), shard(tmp_path / "b", ["y"], sources=3)
    line = one_line_error(
        run(
            TOOL,
            "--input",
            "a_text_document",
            "b_text_document",
            "--output-prefix",
            "all",
            cwd=tmp_path,
            code=2,
        )
    )
    assert line.endswith(
        "b_text_document.json records sources 3; allowed: a list. Correct it, or remove the file"
    )


def test_more_inputs_than_open_files(tmp_path):
    for i in range(60):
        shard(tmp_path / f"s/{i:02}", [f"{i}", "", "x" * i])
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "from tools import merge_datasets; sys.exit(merge_datasets.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--input", "s", "--output-prefix", "all", "--verify"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(
        "-> all: 180 documents, 1999 tokens, read back and equal to the inputs\n"
    )
    assert documents(tmp_path / "all") == [
        [*text.encode(), 256] if text else []
        for i in range(60)
        for text in (f"{i}", "", "x" * i)
    ]


def test_verify_finds_missing_documents(tmp_path):
    shard(tmp_path / "a", ["xyz"]), shard(tmp_path / "b", ["", "abcde"])
    a, b = (IndexedDataset(tmp_path / f"{name}_text_document") for name in "ab")
    with pytest.raises(
        ValueError,
        match="b_text_document.idx differs from the indices of the inputs: it has more of ",
    ):
        merge_datasets.verify(b.prefix, [], int)
    with pytest.raises(
        ValueError,
        match="a_text_document.idx differs from the indices of the inputs, from .*b_text",
    ):
        merge_datasets.verify(a.prefix, [a, b], int)
