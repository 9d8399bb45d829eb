"""Tests of the .bin/.idx format: bytes laid out by hand, round trips, and corrupt files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.programs import CODES, by_hand
from megatron.data.indexed import reader
from megatron.data.indexed import writer as writer_module
from megatron.data.indexed.reader import DatasetIndex, IndexedDataset, dtype_for_vocab
from megatron.data.indexed.writer import IndexedWriter


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> IndexedDataset:
    with IndexedWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add_document(ids)
    return IndexedDataset(prefix)


def leftovers(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_writer_output_matches_the_format(tmp_path, dtype):
    documents = [[5, 6, 7], [], [8], [9, 10]]
    by_hand(tmp_path / "hand", [d for d in documents if d], [0, 1, 1, 2, 3], dtype=dtype)
    write(tmp_path / "ours", documents, np.dtype(dtype).type)
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (
            tmp_path / f"hand{suffix}"
        ).read_bytes()
    assert (tmp_path / "ours.idx").stat().st_size == 34 + 12 * 3 + 8 * 5


@pytest.mark.parametrize("dtype", CODES)
def test_reader_supports_every_dtype(tmp_path, dtype):
    d = IndexedDataset(by_hand(tmp_path / "d", [[1, 2], [3]], [0, 2], dtype=dtype))
    assert d.dtype == np.dtype(dtype) and [s.tolist() for s in d] == [[1, 2], [3]]


def test_dataset_attributes_and_reads(tmp_path):
    d = IndexedDataset(
        by_hand(tmp_path / "d", [[1, 2], [3, 4, 5], [], [6]], [0, 2, 2, 4], dtype="int32")
    )
    assert len(d) == 4 and d.num_documents == 3 and d.num_tokens == 6 and d.sidecar is None
    assert d.lengths.tolist() == [2, 3, 0, 1] and d.lengths.dtype == np.int32
    assert d.pointers.tolist() == [0, 8, 20, 20] and d.pointers.dtype == np.int64
    assert d.document_index.tolist() == [0, 2, 2, 4] and d.document_index.dtype == np.int64
    assert d.document_lengths().tolist() == [5, 0, 1] and d.prefix == str(tmp_path / "d")
    assert d[1].tolist() == [3, 4, 5] and not d[1].flags.writeable
    assert d.read(0).tolist() == [1, 2, 3, 4, 5]
    assert d.read(0, 1, 3).tolist() == [2, 3, 4]
    assert d.read(0, 5).tolist() == d.read(1).tolist() == d.read(2, 1, 0).tolist() == []


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=12),
    cuts=st.integers(1, 4),
)
def test_documents_survive_round_trip(tmp_path_factory, documents, cuts):
    """Documents added in batches give the same files as documents added one by one."""
    folder = tmp_path_factory.mktemp("d")
    d = write(folder / "single", documents)
    with IndexedWriter(folder / "batches", np.uint16) as writer:
        for i in range(0, len(documents), cuts):
            part = documents[i : i + cuts]
            writer.add_documents(
                np.array([t for doc in part for t in doc], np.uint32),
                [len(doc) for doc in part],
            )
    assert [d.read(i).tolist() for i in range(d.num_documents)] == documents
    assert d.document_lengths().tolist() == [len(doc) for doc in documents]
    assert d.num_tokens == sum(map(len, documents)) and len(d) == sum(
        1 for doc in documents if doc
    )
    for suffix in (".idx", ".bin"):
        assert (folder / f"single{suffix}").read_bytes() == (
            folder / f"batches{suffix}"
        ).read_bytes()


def test_dtype_for_vocab_follows_megatron():
    assert dtype_for_vocab(65499) == np.uint16 and dtype_for_vocab(65500) == np.int32


def test_dataset_is_pickled_by_prefix(tmp_path):
    d = write(tmp_path / "d", [[1, 2, 3]])
    data = pickle.dumps(d)
    assert len(data) < 300 and pickle.loads(data).read(0).tolist() == [1, 2, 3]


@pytest.mark.parametrize("copy", ["in the kernel", "in Python"])
def test_add_dataset_concatenates(tmp_path, monkeypatch, copy):
    if copy == "in Python":

        def refuse(*args):
            raise OSError("crosses filesystems")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    parts = [[[1, 2], [], [3]], [[]], [[4, 5, 6], []]]
    datasets = [write(tmp_path / f"part{i}", part) for i, part in enumerate(parts)]
    with IndexedWriter(tmp_path / "all", np.uint16) as writer:
        for i, d in enumerate(datasets):
            writer.add_dataset(d)
            writer.add_document([7 + i])
    write(tmp_path / "once", [*parts[0], [7], *parts[1], [8], *parts[2], [9]])
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"all{suffix}").read_bytes() == (
            tmp_path / f"once{suffix}"
        ).read_bytes()


def test_short_kernel_copy_is_completed(tmp_path, monkeypatch):
    real, calls = os.copy_file_range, []

    def short(source, target, count, offset, at):
        calls.append(count)
        return real(source, target, 3, offset, at) if len(calls) == 1 else 0

    d = write(tmp_path / "d", [list(range(50))])
    monkeypatch.setattr(os, "copy_file_range", short)
    with IndexedWriter(tmp_path / "copy", np.uint16) as writer:
        writer.add_dataset(d)
    assert len(calls) == 2 and IndexedDataset(tmp_path / "copy").read(0).tolist() == list(
        range(50)
    )


def test_sidecar_records_entries_and_counts(tmp_path):
    with IndexedWriter(tmp_path / "new" / "d", np.uint16) as writer:
        writer.add_document([1, 2])
        writer.add_document([])
        writer.finish({"tokenizer": "ByteTokenizer"})
    side = IndexedDataset(tmp_path / "new" / "d").sidecar
    assert side.pop("version") and side == {
        "tokenizer": "ByteTokenizer",
        "dtype": "uint16",
        "documents": 2,
        "sequences": 1,
        "tokens": 2,
    }
    assert leftovers(tmp_path / "new") == ["d.bin", "d.idx", "d.json"]
    deep = b"[" * 100_000 + b"]" * 100_000
    for damage in (b"{", b"[1]", b'"\xff"', deep, b'{"a": ' + b"9" * 5000 + b"}"):
        (tmp_path / "new" / "d.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"d\.json is corrupt"):
            IndexedDataset(tmp_path / "new" / "d")


def test_index_is_published_last(tmp_path, monkeypatch):
    """An old index is removed before the other files are replaced."""
    write(tmp_path / "d", [[1]])
    steps, replace = [], os.replace

    def spy(source, target):
        steps.append((os.path.basename(target), (tmp_path / "d.idx").exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    assert write(tmp_path / "d", [[2, 3]]).read(0).tolist() == [2, 3]
    assert steps == [("d.bin", False), ("d.json", False), ("d.idx", False)]


def test_failure_keeps_the_old_files(tmp_path):
    write(tmp_path / "d", [[1]])
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([2])
        raise RuntimeError
    assert leftovers(tmp_path) == ["d.bin", "d.idx", "d.json"]
    assert IndexedDataset(tmp_path / "d").read(0).tolist() == [1]


def test_failed_publication_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module, "_write_durably", full)
    with pytest.raises(OSError), IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([2])
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("ids", "lengths", "match"),
    [
        ([65536], [1], "a token id for .* is 65536; allowed in uint16: 0 to 65535"),
        ([-1], [1], "a token id for .* is -1"),
        ([1, 2], [1], "add up to 1"),
        ([1.5], [1], "float64"),
        ([[1]], [1], r"shape \(1, 1\)"),
        ([1], [2, -1], "has -1 tokens"),
        ([1], [2**31], "has 2147483648 tokens"),
    ],
)
def test_invalid_documents_are_refused(tmp_path, ids, lengths, match):
    with (
        IndexedWriter(tmp_path / "d", np.uint16) as writer,
        pytest.raises(ValueError, match=match),
    ):
        writer.add_documents(np.array(ids), lengths)


@pytest.mark.parametrize(("lengths", "counts"), [([1, 1], [1]), ([1], [2]), ([1, 1], [3, -1])])
def test_mismatched_sequence_counts_are_refused(tmp_path, lengths, counts):
    with (
        IndexedWriter(tmp_path / "d", np.uint16) as writer,
        pytest.raises(ValueError, match="one length per sequence"),
    ):
        writer.add_documents(np.ones(len(lengths), int), np.array(lengths), np.array(counts))


def test_dataset_that_grows_is_refused(tmp_path):
    """The input gets longer after it was opened."""
    d = write(tmp_path / "d", [[1, 2]])
    with open(tmp_path / "d.bin", "ab") as file:
        file.write(b"xx")
    with (
        pytest.raises(ValueError, match="all.bin has 6 bytes, 2 tokens take 4"),
        IndexedWriter(tmp_path / "all", np.uint16) as writer,
    ):
        writer.add_dataset(d)
    assert not list(tmp_path.glob("all*"))


def test_unsupported_dtypes_are_refused(tmp_path):
    for dtype in (np.float32, np.uint32):
        with pytest.raises(
            ValueError, match="allowed: uint8, int8, int16, int32, int64, uint16"
        ):
            IndexedWriter(tmp_path / "d", dtype)
    d = write(tmp_path / "d", [[1]])
    with (
        pytest.raises(ValueError, match="holds uint16, .* int32"),
        IndexedWriter(tmp_path / "e", np.int32) as writer,
    ):
        writer.add_dataset(d)
    assert leftovers(tmp_path) == ["d.bin", "d.idx", "d.json"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, "not a Megatron index"),
        ({"version": 2}, "format version 2; allowed: 1"),
        ({"code": 9}, "dtype code 9"),
        ({"tail": b"\x00\x01"}, "modes section"),
        ({"tail": b"\x00"}, "truncated or corrupt"),
        ({"lengths": [-2, 4]}, "negative sequence lengths"),
        ({"pointers": [0, 2]}, "pointers are not the running sum"),
        ({"pointers": [4, 0]}, "pointers are not the running sum"),
        (
            {"bin": b"\x01\x00\x01\x00"},
            "one token per non-empty document .2. more than its index counts",
        ),
        ({"bin": b"\x01\x00"}, "counts 3 tokens of 2 bytes, 6 bytes"),
        ({"lengths": [2, 2]}, "has 6 bytes, but its index counts 4 tokens"),
    ],
)
def test_corrupt_files_are_refused(tmp_path, changes, match):
    prefix = by_hand(tmp_path / "d", [[1, 2], [3]], [0, 1, 2], **changes)
    with pytest.raises(ValueError, match=match):
        IndexedDataset(prefix)


@pytest.mark.parametrize("block", [1, 2, 1 << 16])
@pytest.mark.parametrize(
    "bounds", [[], [0], [1, 2], [0, 1], [0, 2, 1, 2], [0, 1, 2, 1, 2], [0, 2**63 - 1, -2, 2]]
)
def test_invalid_document_index_is_refused(tmp_path, monkeypatch, bounds, block):
    monkeypatch.setattr(reader, "_BLOCK_ENTRIES", block)
    with pytest.raises(
        ValueError, match="document index does not rise from 0 to the number of sequences, 2"
    ):
        IndexedDataset(by_hand(tmp_path / "d", [[1, 2], [3]], bounds))


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_truncation_at_any_byte_is_refused(tmp_path, suffix):
    prefix = by_hand(tmp_path / "d", [[1, 2], [3], [4, 5]], [0, 1, 3])
    valid = Path(prefix + suffix).read_bytes()
    for size in range(len(valid)):
        Path(prefix + suffix).write_bytes(valid[:size])
        with pytest.raises(ValueError, match="truncated"):
            IndexedDataset(prefix)


def content(prefix: str) -> tuple | None:
    """Return all documents and sequences of a pair, or None if it is refused."""
    try:
        d = IndexedDataset(prefix)
    except (ValueError, FileNotFoundError):
        return None
    return [d.read(i).tolist() for i in range(d.num_documents)], [s.tolist() for s in d]


@settings(max_examples=10, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 127), max_size=4), max_size=3), max_size=4
    ),
    dtype=st.sampled_from(list(CODES)),
)
def test_corruption_never_changes_the_data(tmp_path_factory, documents, dtype):
    """With a flipped bit of the header, or truncated, a pair is refused or reads the same."""
    prefix = by_hand(
        tmp_path_factory.mktemp("d") / "d",
        [s for d in documents for s in d],
        np.cumsum([0, *map(len, documents)]).tolist(),
        dtype=dtype,
    )
    right = content(prefix)
    assert right[0] == [[t for s in d for t in s] for d in documents]
    valid = {suffix: Path(prefix + suffix).read_bytes() for suffix in (".idx", ".bin")}
    header = int.from_bytes(valid[".idx"][:34], "little")
    corruptions = [
        (".idx", (header ^ 1 << bit).to_bytes(34, "little") + valid[".idx"][34:])
        for bit in range(34 * 8)
    ]
    corruptions += [
        (suffix, data[:size]) for suffix, data in valid.items() for size in range(len(data))
    ]
    for suffix, corrupt in corruptions:
        Path(prefix + suffix).write_bytes(corrupt)
        assert content(prefix) in (None, right)
        Path(prefix + suffix).write_bytes(valid[suffix])


@pytest.mark.parametrize("part", ["lengths", "pointers"])
def test_corruption_is_found_in_every_block(tmp_path, monkeypatch, part):
    monkeypatch.setattr(reader, "_BLOCK_ENTRIES", 2)
    sequences = [[1], [2, 3], [], [4], [5, 6]]
    right = {"lengths": [1, 2, 0, 1, 2], "pointers": [0, 2, 6, 6, 8]}
    by_hand(tmp_path / "d", sequences, [0, 5], **right)
    assert len(IndexedDataset(tmp_path / "d")) == 5
    for i in range(5):
        for change in (1, 2, -4):
            corrupt = {
                **right,
                part: [n + change * (k == i) for k, n in enumerate(right[part])],
            }
            with pytest.raises(ValueError, match="negative|running sum|counts"):
                IndexedDataset(by_hand(tmp_path / "d", sequences, [0, 5], **corrupt))


def test_given_index_is_used_and_pickled(tmp_path):
    prefix = by_hand(tmp_path / "d", [[1, 2], [3]], [0, 1, 2])
    other = DatasetIndex(
        np.dtype(np.uint16), np.array([1, 2], np.int32), np.array([0, 2]), np.array([0, 0, 2])
    )
    d = pickle.loads(pickle.dumps(IndexedDataset(prefix, other)))
    assert [d.read(i).tolist() for i in range(2)] == [[], [1, 2, 3]] and d.num_tokens == 3


def test_uncounted_eod_tokens_are_refused(tmp_path):
    """The lengths and pointers leave out the end-of-document token that .bin holds.

    Some forks of Megatron's preprocessing write such files.
    """
    prefix = by_hand(tmp_path / "d", [[1, 2, 0], [3, 0], []], [0, 1, 2, 3], lengths=[2, 1, 0])
    with pytest.raises(
        ValueError,
        match=r"document i would start i tokens early\. Repair it with "
        r"tools/inspect_dataset.py \S+/d --repair OUT, or preprocess the text again",
    ):
        IndexedDataset(prefix)


def test_missing_file_names_similar_prefixes(tmp_path):
    write(tmp_path / "corpus_text_document", [[1]])
    for wrong in (
        "corpus",
        "corpus_text_document.bin",
        "corpus_text_document.idx",
        "korpus_text_document",
        "zzz",
    ):
        with pytest.raises(
            FileNotFoundError,
            match=f"{wrong}.idx does not exist.*without .bin and .idx.*: "
            f"{tmp_path}/corpus_text_document$",
        ):
            IndexedDataset(tmp_path / wrong)
    with pytest.raises(
        FileNotFoundError, match="The folder .*/nowhere does not exist; prefixes there: none"
    ):
        IndexedDataset(tmp_path / "nowhere" / "d")
    os.remove(tmp_path / "corpus_text_document.bin")
    with pytest.raises(FileNotFoundError, match="corpus_text_document.bin does not exist"):
        IndexedDataset(tmp_path / "corpus_text_document")


def test_reads_beyond_the_end_are_refused(tmp_path):
    d = write(tmp_path / "d", [[1, 2], [3]])
    for sequence in (-1, 2):
        with pytest.raises(IndexError, match="allowed 0 to 1"):
            d[sequence]
        with pytest.raises(IndexError, match=f"document {sequence}"):
            d.read(sequence)
    for offset, length in ((0, 3), (2, 1), (-1, 1), (3, None), (1, -1)):
        with pytest.raises(ValueError, match="of document 0 of .*allowed 0 to 2"):
            d.read(0, offset, length)


def test_dataset_without_documents_is_valid(tmp_path):
    d = write(tmp_path / "d", [])
    assert (
        len(d) == d.num_documents == d.num_tokens == 0 and d.document_lengths().tolist() == []
    )
    assert json.loads((tmp_path / "d.json").read_text())["documents"] == 0
