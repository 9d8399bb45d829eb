"""Tests of dataset inspection: statistics against plain loops, every problem, and the repair."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.programs import BYTES, CODES, by_hand, documents, one_line_error, run
from megatron.data.indexed import inspect
from megatron.data.indexed import repair as repair_module
from megatron.data.indexed.describe import describe
from megatron.data.indexed.inspect import scan, summarize
from megatron.data.indexed.opened import open_dataset
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.repair import repair
from megatron.data.indexed.writer import IndexedWriter, require_merge_space
from megatron.tokenizer.byte import ByteTokenizer
from megatron.tokenizer.null import NullTokenizer

TOOL = "tools/inspect_dataset.py"
EOD = 9


def pair(prefix: Path, docs: list[list[list[int]]], **changes) -> str:
    """Write a pair of documents that are lists of sequences."""
    return by_hand(
        prefix,
        [s for d in docs for s in d],
        np.cumsum([0, *map(len, docs)]).tolist(),
        **changes,
    )


def with_eod(docs: list[list[list[int]]]) -> list[list[list[int]]]:
    return [[*d[:-1], [*d[-1], EOD]] if any(d) else d for d in docs]


def uncounted(prefix: Path, docs: list[list[list[int]]], **changes) -> str:
    """Write a pair whose .bin has end-of-document tokens that the lengths do not count."""
    return pair(prefix, with_eod(docs), lengths=[len(s) for d in docs for s in d], **changes)


def record(prefix: str, **entries) -> None:
    Path(f"{prefix}.json").write_text(json.dumps(entries))


def inspect_all(prefix: str, tokenizer=None) -> dict:
    """Return what the program finds with --full."""
    opened = open_dataset(prefix, tokenizer)
    found = summarize(opened, tokenizer)
    found["full"], faults = scan(opened, tokenizer)
    return {**found, "faults": found["faults"] + faults}


DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 12), max_size=5), max_size=3), max_size=8)


@settings(max_examples=60, deadline=None)
@given(docs=DOCUMENTS, dtype=st.sampled_from(list(CODES)), block=st.integers(1, 5))
def test_statistics_match_plain_loops(tmp_path_factory, docs, dtype, block):
    prefix = pair(tmp_path_factory.mktemp("d") / "d", docs, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "_BLOCK_TOKENS", block)
        found = inspect_all(prefix, NullTokenizer(EOD))
    flat = [[t for s in d for t in s] for d in docs]
    lengths, tokens = [len(d) for d in flat], [t for d in flat for t in d]
    assert (found["documents"], found["tokens"], found["sequences"]) == (
        len(docs),
        len(tokens),
        sum(map(len, docs)),
    )
    assert (
        found["empty_documents"] == lengths.count(0)
        and found["document_index_entries"] == len(docs) + 1
    )
    assert found["document_length"] == (
        {
            "min": min(lengths),
            "median": statistics.median(lengths),
            "mean": pytest.approx(statistics.mean(lengths)),
            "max": max(lengths),
        }
        if docs
        else None
    )
    for row in found["histogram"]:
        assert (
            row["documents"]
            == sum(row["from"] <= n <= row["to"] for n in lengths)
            == row["share"] * len(docs)
        )
    assert sum(row["documents"] for row in found["histogram"]) == len(docs)
    assert [d["ids"] for d in found["first_documents"]] == flat[:3]
    full = found["full"]
    assert (full["smallest_id"], full["largest_id"]) == (
        (min(tokens), max(tokens)) if tokens else (None, None)
    )
    assert full["distinct_ids"] == len({t for t in tokens if t <= EOD})
    outside = [(i, j, t) for i, d in enumerate(flat) for j, t in enumerate(d) if t > EOD]
    assert full["ids_outside"] == len(outside) and bool(found["faults"]) == bool(outside)
    assert full["first_outside"] == (
        dict(zip(("document", "position", "id"), outside[0])) if outside else None
    )
    assert full["documents_ending_with_eod"] == sum(d[-1:] == [EOD] for d in flat)
    assert full["documents_not_ending_with_eod"] == sum(d[-1:] not in ([], [EOD]) for d in flat)
    assert full["documents_with_eod_inside"] == sum(EOD in d[:-1] for d in flat)
    assert full["documents_without_eod"] == sum(bool(d) and EOD not in d for d in flat)
    for suffix in ("bin", "idx"):
        data = Path(f"{prefix}.{suffix}").read_bytes()
        assert full[f"{suffix}_sha256"] == hashlib.sha256(data).hexdigest() and found[
            f"{suffix}_bytes"
        ] == len(data)


REPORT_TEXTS = ["hello", "", "naïve 日本\n", "b" * 100]


@pytest.fixture
def report_folder(tmp_path) -> Path:
    """Folder with the dataset `d` of `REPORT_TEXTS` and a sidecar."""
    t = ByteTokenizer()
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        for text in REPORT_TEXTS:
            writer.add_document([*t.encode(text).tolist(), t.eod] if text else [])
        writer.finish(
            {
                "tokenizer": t.name,
                "vocab_hash": t.fingerprint,
                "vocab_size": 257,
                "eod": 256,
                "append_eod": True,
                "sources": [f"{i}.jsonl" for i in range(7)],
            }
        )
    return tmp_path


def test_program_prints_report(report_folder):
    t = ByteTokenizer()
    done = run(TOOL, "d.bin", "--tokens", 4, "--json", "d.out", *BYTES, cwd=report_folder)
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == [
        "d",
        "format version 1, uint16, 3 sequences, 5 document-index entries",
        f"files .bin 244 bytes, .idx {34 + 12 * 3 + 8 * 5} bytes",
        "documents 4, 1 of them empty; 122 tokens",
        "lengths min 0, median 10.5, mean 30.5, max 101",
        f"0 to 0 1 25.00% {'#' * 40}",
        "1 to 1 0 0.00%",
        "2 to 3 0 0.00%",
        f"4 to 7 1 25.00% {'#' * 40}",
        f"8 to 15 1 25.00% {'#' * 40}",
        "16 to 31 0 0.00%",
        "32 to 63 0 0.00%",
        f"64 to 127 1 25.00% {'#' * 40}",
        "record tokenizer: ByteTokenizer",
        f"record vocab_hash: {t.fingerprint}",
        "record vocab_size: 257",
        "record eod: 256",
        "record append_eod: True",
        "record sources: 0.jsonl 1.jsonl 2.jsonl 3.jsonl 4.jsonl ... (7 in all)",
        "record dtype: uint16",
        "record documents: 4",
        "record sequences: 3",
        "record tokens: 122",
        f"record version: {IndexedDataset(report_folder / 'd').sidecar['version']}",
        "document 0 6 tokens: 'hell' ...",
        "document 1 0 tokens: ''",
        "document 2 15 tokens: 'naï' ...",
        "sound as far as read (--full reads all tokens)",
    ]
    (found,) = json.loads((report_folder / "d.out").read_text())
    assert found == {
        **summarize(open_dataset(str(report_folder / "d"), t), t, tokens=4),
        "prefix": "d",
    }
    assert found["first_documents"][0] == {
        "document": 0,
        "length": 6,
        "ids": [*b"hell"],
        "text": "hell",
    }


def test_program_prints_full_report(report_folder):
    done = run(TOOL, "d", "--documents", 1, "--full", cwd=report_folder)
    assert "document 0    6 tokens: 104 101 108 108 111 256\n" in done.stdout
    assert "document 1" not in done.stdout
    distinct = len({*"".join(REPORT_TEXTS).encode(), 256})
    bin_hash, idx_hash = (
        hashlib.sha256((report_folder / name).read_bytes()).hexdigest()
        for name in ("d.bin", "d.idx")
    )
    assert [" ".join(line.split()) for line in done.stdout.splitlines()[-5:]] == [
        f"ids 10 to 256, {distinct} distinct, 0 outside the vocabulary (its size: 257)",
        "ends 3 documents end with 256 (of the .json), 0 have it inside, 0 nowhere",
        f"sha256 .bin {bin_hash}",
        f".idx {idx_hash}",
        "sound all of it",
    ]


def test_program_escapes_unprintable_text(report_folder, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert r"'na\xefve \u65e5\u672c\n'" in run(TOOL, "d", *BYTES, cwd=report_folder).stdout


def test_dataset_without_documents_is_sound(tmp_path):
    prefix = pair(tmp_path / "d", [])
    found = inspect_all(prefix)
    assert (
        found["documents"] == found["tokens"] == 0
        and found["document_length"] is None
        and not found["faults"]
    )
    assert found["full"]["eod"] is found["full"]["smallest_id"] is None
    lines = describe(found)
    assert lines[-1].split() == ["sound", "all", "of", "it"] and not any(
        "#" in line for line in lines
    )
    assert inspect_all(pair(tmp_path / "e", [[], [[]]]))["empty_documents"] == 2


def test_impossible_ids_are_problems(tmp_path):
    for dtype, ids, first in (
        ("int32", [1, 1 << 24, -1], 1 << 24),
        ("int8", [1, -1, 2], -1),
        ("float32", [1.0, 1.5, np.nan], 1.5),
        ("float64", [np.nan, np.inf, 3.0], np.nan),
    ):
        found = inspect_all(pair(tmp_path / "d", [[[0]], [ids]], dtype=dtype))
        full = found["full"]
        assert (
            full["vocab_size"] is None
            and full["ids_outside"] in (1, 2)
            and full["distinct_ids"] in (2, 3)
        )
        assert (
            str(full["first_outside"]["id"]) == str(first)
            and full["first_outside"]["document"] == 1
        )
        (fault,) = found["faults"]
        assert f"outside the vocabulary, 0 to 16777215: the first, {first}, is token " in fault
        assert "its size: unknown" in "".join(describe(found))


def test_vocabulary_and_eod_sources(
    tmp_path,
):
    """The tokenizer comes first, then the sidecar, then the data."""
    prefix = pair(tmp_path / "d", [[], [[1, 9]], [[9, 2], [5]], [[3, 4]]])
    full = inspect_all(prefix)["full"]
    assert (full["vocab_size"], full["eod"], full["eod_source"]) == (
        None,
        9,
        "the last token of document 1",
    )
    record(prefix, vocab_size=5, eod=4)
    found = inspect_all(prefix)
    assert (
        found["full"]["vocab_size"],
        found["full"]["eod"],
        found["full"]["documents_ending_with_eod"],
    ) == (5, 4, 1)
    assert found["faults"] == [
        "3 ids are outside the vocabulary, 0 to 4: the first, 9, is token 1 of document 1"
    ]
    record(prefix, vocab_size="5", eod=None)
    full = inspect_all(prefix, NullTokenizer(9))["full"]
    assert (full["vocab_size"], full["eod"], full["eod_source"], full["ids_outside"]) == (
        10,
        9,
        "of the tokenizer",
        0,
    )
    assert inspect_all(prefix)["full"]["vocab_size"] is None


def test_mismatched_sidecar_is_a_problem(tmp_path):
    prefix = pair(tmp_path / "d", [[[1, 9]], [[2, 3]], [], [[9, 4]]])
    record(prefix, append_eod=True, eod=9, documents=5, tokens=6, sequences=3, dtype="int32")
    found = inspect_all(prefix)
    assert found["faults"] == [
        f"{prefix}.json records dtype int32, the index uint16: it belongs to other files",
        f"{prefix}.json records documents 5, the index 4: it belongs to other files",
        "2 documents do not end with the end-of-document id 9, though "
        f"{prefix}.json records append_eod",
    ]
    assert run(TOOL, "d", cwd=tmp_path, code=1).stdout.endswith(
        "  FAULT         d.json records documents 5, the index 4: it belongs to other files\n"
    )


@pytest.mark.parametrize("value", ["big", 2.5, -1, True, [1]])
def test_invalid_sidecar_numbers_are_problems(tmp_path, value):
    prefix = pair(tmp_path / "d", [[[1, 9]]])
    for entry in ("vocab_size", "eod"):
        record(prefix, **{entry: value})
        found = inspect_all(prefix)
        assert found["faults"] == [
            f"{prefix}.json records {entry} {value!r}; allowed: a number, 0 or more"
        ]
        assert (found["full"]["vocab_size"], found["full"]["eod"]) == (None, 9)
    assert "FAULT" in run(TOOL, "d", "--full", cwd=tmp_path, code=1).stdout


def test_shrinking_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "_BLOCK_TOKENS", 2)
    prefix = pair(tmp_path / "d", [[[1, 2, 3, 4]]])
    with pytest.raises(ValueError, match="d.bin became shorter while it was read"):
        scan(open_dataset(prefix), progress=lambda read: os.truncate(f"{prefix}.bin", 5))


CONTENT = st.lists(st.lists(st.lists(st.integers(0, 8), max_size=3), max_size=3), max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    docs=CONTENT.filter(lambda docs: any(any(d) for d in docs)),
    block=st.integers(1, 3),
    dtype=st.sampled_from([d for d in CODES if "float" not in d]),
)
def test_repair_writes_the_correct_pair(tmp_path_factory, docs, block, dtype):
    folder = tmp_path_factory.mktemp("d")
    bad, good = (
        uncounted(folder / "bad", docs, dtype=dtype),
        pair(folder / "good", with_eod(docs), dtype=dtype),
    )
    opened = open_dataset(bad)
    found = summarize(opened)
    assert found["uncounted_tokens"] == sum(map(any, docs)) and found["tokens"] == sum(
        len(s) for d in docs for s in d
    )
    assert (
        f"last token of each of {sum(map(any, docs))} documents uncounted" in found["faults"][0]
    )
    assert [d["ids"] for d in found["first_documents"]] == documents(Path(good))[:3]
    assert scan(opened)[0]["documents_ending_with_eod"] == sum(map(any, docs))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair_module, "_BLOCK_DOCUMENTS", block)
        assert repair(opened, str(folder / "out"), progress=seen.append) == EOD
    assert sum(seen) == 2 * os.path.getsize(f"{bad}.bin")
    for suffix in (".bin", ".idx"):
        assert (folder / f"out{suffix}").read_bytes() == Path(good + suffix).read_bytes()
    assert not inspect_all(str(folder / "out"))["faults"]


def test_program_repairs_dataset(tmp_path):
    docs = [[[*b"one"]], [], [[*b"two"], [*b"three"]]]
    t = ByteTokenizer()
    right = [[[*b"one", 256]], [], [[*b"two"], [*b"three", 256]]]
    bad = pair(tmp_path / "bad", right, lengths=[len(s) for d in docs for s in d])
    record(bad, key="text", append_eod=False)
    done = run(TOOL, "bad", *BYTES, cwd=tmp_path, code=1)
    assert done.stdout.splitlines()[-1].startswith(
        "  FAULT         the index leaves the last token of each of 2 "
    )
    assert "9 tokens: 'twothree'" in done.stdout and done.stderr == ""
    done = run(TOOL, "bad", "--repair", "new/out.bin", "--full", *BYTES, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert (
        lines[:2] == ["bad -> new/out: 2 documents end with 256 now", "new/out"]
        and "sound" in lines[-1]
    )
    assert documents(tmp_path / "new/out") == [[t for s in d for t in s] for d in right]
    side = IndexedDataset(tmp_path / "new/out").sidecar
    assert side.pop("version") and side == {
        "key": "text",
        "append_eod": True,
        "eod": 256,
        "tokenizer": t.name,
        "vocab_hash": t.fingerprint,
        "vocab_size": 257,
        "tool": "inspect_dataset",
        "repaired_from": str(tmp_path / "bad"),
        "dtype": "uint16",
        "documents": 3,
        "sequences": 3,
        "tokens": 13,
    }
    assert sorted(os.listdir(tmp_path / "new")) == ["out.bin", "out.idx", "out.json"]


def test_impossible_repairs_are_refused(tmp_path, monkeypatch):
    def refused(match: str, prefix: str, out: str = "out", tokenizer=None) -> None:
        with pytest.raises(ValueError, match=match):
            repair(open_dataset(prefix, tokenizer), str(tmp_path / out), tokenizer)

    docs = [[], [[1, 2]], [], [[3], [4, 5]]]
    refused(
        "out: nothing to repair, .*/sound.idx counts all tokens", pair(tmp_path / "sound", docs)
    )
    bad = uncounted(tmp_path / "bad", docs)
    os.symlink(tmp_path, tmp_path / "link")
    for out in ("bad", "link/bad"):
        refused("bad is the input itself", bad, out)
    refused(
        "bad are all 9, the end-of-document id of the tokenizer is 5; allowed: the same",
        bad,
        "out",
        NullTokenizer(5),
    )
    record(bad, eod=7)
    refused("the end-of-document id of the .json is 7", bad)
    floats = uncounted(tmp_path / "floats", docs, dtype="float32")
    refused("dtype of .*/out is float32; allowed: uint8", floats)
    other = pair(tmp_path / "other", [[], [[1, 2, 9]], [], [[3], [4, 5, 8]]], lengths=[2, 1, 2])
    refused(
        "other differ: 9 after document 1, 8 after document 3, so that they are no "
        "end-of-document tokens",
        other,
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    os.remove(f"{bad}.json")
    with pytest.raises(OSError, match="out needs 0.0 MB, but the disk of .* has 0.0 MB free"):
        repair(open_dataset(bad, None), str(tmp_path / "out"), None)
    assert not list(tmp_path.glob("out*"))


def test_space_check_in_missing_folder(tmp_path, monkeypatch):
    """The disk is that of the first parent folder that exists."""
    monkeypatch.chdir(tmp_path)
    usage, asked = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    for out in ("d", "new/folder/d", str(tmp_path / "d")):
        require_merge_space(out, [IndexedDataset(pair(tmp_path / "d", [[[1]]]))])
    assert asked == [tmp_path] * 3


def test_corrupt_pair_does_not_hide_others(tmp_path):
    for name in "abc":
        pair(tmp_path / name, [[[1, 2]]])
    (tmp_path / "b.idx").write_bytes(b"MMID")
    os.remove(tmp_path / "c.bin")
    done = run(TOOL, "b", "c", "a", "--json", "out", cwd=tmp_path, code=2)
    assert [line.split(" has ")[0].split(" does ")[0] for line in done.stderr.splitlines()] == [
        "inspect_dataset.py: error: b.idx",
        "inspect_dataset.py: error: c.bin",
    ]
    assert done.stdout.startswith("a\n") and "sound" in done.stdout
    found = json.loads((tmp_path / "out").read_text())
    assert [f["prefix"] for f in found] == ["b", "c", "a"] and [
        "error" in f for f in found
    ] == [True, True, False]


def test_invalid_flags_are_one_line(tmp_path):
    prefix = pair(tmp_path / "d", [[[1, 2]]])
    record(prefix, tokenizer="GPT2BPETokenizer", eod=50256)
    (tmp_path / "folder").mkdir()
    for arguments, match in (
        (("d", "--documents", -1), "--documents is -1; allowed: 0 or more"),
        (("d", "--tokens", -1), "--tokens is -1; allowed: 0 or more"),
        (("d", "--json", "folder"), "--json is 'folder'; allowed: a file; this is a folder"),
        (("d", "d", "--repair", "out"), "PREFIX with --repair is ['d', 'd']; allowed: one"),
        (("d", "--repair", "out"), "--repair out: nothing to repair"),
        (
            ("d", "--vocab-file", "none"),
            "--vocab-file none does not exist; GPT2BPETokenizer needs vocab.json",
        ),
        (
            ("d", *BYTES),
            "d.json records eod 50256 of GPT2BPETokenizer, this run's ByteTokenizer has 256",
        ),
    ):
        assert match in one_line_error(run(TOOL, *arguments, cwd=tmp_path, code=2))
    done = run(TOOL, "d", "--json", "nowhere/out", cwd=tmp_path, code=2)
    assert "nowhere/out" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob("*.tmp"))


def test_help_explains_exit_codes(tmp_path):
    text = run(TOOL, "--help", cwd=tmp_path).stdout
    assert (
        text.startswith("usage: inspect_dataset.py ")
        and "Exit code: 0 all sound, 1 a fault" in text
    )
