"""The .bin/.idx format: bytes laid out by hand, round trips, and every way a file can be wrong."""

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
def test_the_writer_lays_out_the_bytes_of_the_format(tmp_path, dtype):
    documents = [[5, 6, 7], [], [8], [9, 10]]
    by_hand(tmp_path / "hand", [d for d in documents if d], [0, 1, 1, 2, 3], dtype=dtype)
    write(tmp_path / "ours", documents, np.dtype(dtype).type)
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (
            tmp_path / f"hand{suffix}"
        ).read_bytes()
    assert (tmp_path / "ours.idx").stat().st_size == 34 + 12 * 3 + 8 * 5


@pytest.mark.parametrize("dtype", CODES)
def test_every_dtype_of_the_format_is_read(tmp_path, dtype):
    d = IndexedDataset(by_hand(tmp_path / "d", [[1, 2], [3]], [0, 2], dtype=dtype))
    assert d.dtype == np.dtype(dtype) and [s.tolist() for s in d] == [[1, 2], [3]]


def test_what_a_dataset_offers(tmp_path):
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
def test_round_trip_and_batches_equal_single_documents(tmp_path_factory, documents, cuts):
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


def test_dtype_for_vocab():
    assert dtype_for_vocab(65499) == np.uint16 and dtype_for_vocab(65500) == np.int32


def test_a_dataset_travels_to_another_process_by_name(tmp_path):
    d = write(tmp_path / "d", [[1, 2, 3]])
    data = pickle.dumps(d)
    assert len(data) < 300 and pickle.loads(data).read(0).tolist() == [1, 2, 3]


@pytest.mark.parametrize("how", ["in the kernel", "by hand"])
def test_adding_datasets_is_concatenation(tmp_path, monkeypatch, how):
    if how == "by hand":

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


def test_a_copy_that_the_kernel_cuts_short_is_completed(tmp_path, monkeypatch):
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


def test_the_sidecar(tmp_path):
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
    for damage in (b"{", b"[1]", b'"\xff"'):
        (tmp_path / "new" / "d.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"d\.json is corrupt"):
            IndexedDataset(tmp_path / "new" / "d")


def test_the_index_is_published_last_and_an_old_one_is_gone_before(tmp_path, monkeypatch):
    write(tmp_path / "d", [[1]])
    steps, replace = [], os.replace

    def spy(source, target):
        steps.append((os.path.basename(target), (tmp_path / "d.idx").exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    assert write(tmp_path / "d", [[2, 3]]).read(0).tolist() == [2, 3]
    assert steps == [("d.bin", False), ("d.json", False), ("d.idx", False)]


def test_a_failure_leaves_the_old_files_and_nothing_else(tmp_path):
    write(tmp_path / "d", [[1]])
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([2])
        raise RuntimeError
    assert leftovers(tmp_path) == ["d.bin", "d.idx", "d.json"]
    assert IndexedDataset(tmp_path / "d").read(0).tolist() == [1]


def test_a_failure_while_publishing_leaves_nothing_temporary(tmp_path, monkeypatch):
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
def test_documents_that_cannot_be_written(tmp_path, ids, lengths, match):
    with (
        IndexedWriter(tmp_path / "d", np.uint16) as writer,
        pytest.raises(ValueError, match=match),
    ):
        writer.add_documents(np.array(ids), lengths)


@pytest.mark.parametrize(("lengths", "counts"), [([1, 1], [1]), ([1], [2]), ([1, 1], [3, -1])])
def test_sequences_that_do_not_fit_their_documents(tmp_path, lengths, counts):
    with (
        IndexedWriter(tmp_path / "d", np.uint16) as writer,
        pytest.raises(ValueError, match="one length per sequence"),
    ):
        writer.add_documents(np.ones(len(lengths), int), np.array(lengths), np.array(counts))


def test_a_dataset_that_grows_while_it_is_copied(tmp_path):
    d = write(tmp_path / "d", [[1, 2]])
    with open(tmp_path / "d.bin", "ab") as file:
        file.write(b"xx")
    with (
        pytest.raises(ValueError, match="all.bin has 6 bytes, 2 tokens take 4"),
        IndexedWriter(tmp_path / "all", np.uint16) as writer,
    ):
        writer.add_dataset(d)
    assert not list(tmp_path.glob("all*"))


def test_writers_of_wrong_dtypes(tmp_path):
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
def test_damaged_files_are_refused_at_opening(tmp_path, changes, match):
    prefix = by_hand(tmp_path / "d", [[1, 2], [3]], [0, 1, 2], **changes)
    with pytest.raises(ValueError, match=match):
        IndexedDataset(prefix)


@pytest.mark.parametrize("block", [1, 2, 1 << 16])
@pytest.mark.parametrize(
    "bounds", [[], [0], [1, 2], [0, 1], [0, 2, 1, 2], [0, 1, 2, 1, 2], [0, 2**63 - 1, -2, 2]]
)
def test_document_indices_that_do_not_rise_from_zero_to_the_end(
    tmp_path, monkeypatch, bounds, block
):
    monkeypatch.setattr(reader, "_BLOCK_ENTRIES", block)
    with pytest.raises(
        ValueError, match="document index does not rise from 0 to the number of sequences, 2"
    ):
        IndexedDataset(by_hand(tmp_path / "d", [[1, 2], [3]], bounds))


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_truncation_at_any_byte_is_an_error(tmp_path, suffix):
    prefix = by_hand(tmp_path / "d", [[1, 2], [3], [4, 5]], [0, 1, 3])
    whole = Path(prefix + suffix).read_bytes()
    for size in range(len(whole)):
        Path(prefix + suffix).write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated"):
            IndexedDataset(prefix)


def content(prefix: str) -> tuple | None:
    """All that a pair says, or None when it is refused."""
    try:
        d = IndexedDataset(prefix)
    except (ValueError, FileNotFoundError):
        return None
    return [d.read(i).tolist() for i in range(d.num_documents)], [s.tolist() for s in d]


@settings(max_examples=20, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 127), max_size=4), max_size=3), max_size=4
    ),
    dtype=st.sampled_from(list(CODES)),
)
def test_a_flipped_bit_of_the_header_and_a_truncation_never_change_the_data(
    tmp_path_factory, documents, dtype
):
    prefix = by_hand(
        tmp_path_factory.mktemp("d") / "d",
        [s for d in documents for s in d],
        np.cumsum([0, *map(len, documents)]).tolist(),
        dtype=dtype,
    )
    right = content(prefix)
    assert right[0] == [[t for s in d for t in s] for d in documents]
    whole = {suffix: Path(prefix + suffix).read_bytes() for suffix in (".idx", ".bin")}
    header = int.from_bytes(whole[".idx"][:34], "little")
    damages = [
        (".idx", (header ^ 1 << bit).to_bytes(34, "little") + whole[".idx"][34:])
        for bit in range(34 * 8)
    ]
    damages += [
        (suffix, data[:size]) for suffix, data in whole.items() for size in range(len(data))
    ]
    for suffix, damaged in damages:
        Path(prefix + suffix).write_bytes(damaged)
        assert content(prefix) in (None, right)
        Path(prefix + suffix).write_bytes(whole[suffix])


@pytest.mark.parametrize("part", ["lengths", "pointers"])
def test_damage_is_seen_in_every_block_of_the_index(tmp_path, monkeypatch, part):
    monkeypatch.setattr(reader, "_BLOCK_ENTRIES", 2)
    sequences = [[1], [2, 3], [], [4], [5, 6]]
    right = {"lengths": [1, 2, 0, 1, 2], "pointers": [0, 2, 6, 6, 8]}
    by_hand(tmp_path / "d", sequences, [0, 5], **right)
    assert len(IndexedDataset(tmp_path / "d")) == 5
    for i in range(5):
        for change in (1, 2, -4):
            damaged = {
                **right,
                part: [n + change * (k == i) for k, n in enumerate(right[part])],
            }
            with pytest.raises(ValueError, match="negative|running sum|counts"):
                IndexedDataset(by_hand(tmp_path / "d", sequences, [0, 5], **damaged))


def test_a_given_index_is_read_by_and_travels_too(tmp_path):
    prefix = by_hand(tmp_path / "d", [[1, 2], [3]], [0, 1, 2])
    other = DatasetIndex(
        np.dtype(np.uint16), np.array([1, 2], np.int32), np.array([0, 2]), np.array([0, 0, 2])
    )
    d = pickle.loads(pickle.dumps(IndexedDataset(prefix, other)))
    assert [d.read(i).tolist() for i in range(2)] == [[], [1, 2, 3]] and d.num_tokens == 3


def test_shards_that_do_not_count_the_end_of_document(tmp_path):
    """The fork's bug as it is: lengths and pointers without the end-of-document token, which .bin has."""
    prefix = by_hand(tmp_path / "d", [[1, 2, 0], [3, 0], []], [0, 1, 2, 3], lengths=[2, 1, 0])
    with pytest.raises(
        ValueError,
        match=r"document i would start i tokens early\. Repair it with "
        r"tools/inspect_dataset.py \S+/d --repair OUT, or preprocess the text again",
    ):
        IndexedDataset(prefix)


def test_missing_files_name_what_is_near(tmp_path):
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


def test_reading_beyond_the_end(tmp_path):
    d = write(tmp_path / "d", [[1, 2], [3]])
    for sequence in (-1, 2):
        with pytest.raises(IndexError, match="allowed 0 to 1"):
            d[sequence]
        with pytest.raises(IndexError, match=f"document {sequence}"):
            d.read(sequence)
    for offset, length in ((0, 3), (2, 1), (-1, 1), (3, None), (1, -1)):
        with pytest.raises(ValueError, match="of document 0 of .*allowed 0 to 2"):
            d.read(0, offset, length)


def test_a_dataset_without_documents(tmp_path):
    d = write(tmp_path / "d", [])
    assert (
        len(d) == d.num_documents == d.num_tokens == 0 and d.document_lengths().tolist() == []
    )
    assert json.loads((tmp_path / "d.json").read_text())["documents"] == 0
