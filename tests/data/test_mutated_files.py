"""Mutated data files: each is read, or refused in one line; nothing is left half-written."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from helpers.mutations import (
    LIMIT_SECONDS,
    assert_read_or_refused,
    mutate,
    mutate_json,
    run_forked,
)
from helpers.programs import BYTES, documents
from megatron.config.schema import DataConfig
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import IndexedWriter
from megatron.data.splits import build_splits
from megatron.exit_codes import classify_error
from megatron.tokenizer.byte import ByteTokenizer

PAIRS = 200
CACHES = 100
INPUTS = 200  # 500 files together
FEW = 8  # of each kind in `make test`
RECORDS = [{"text": f"record {i} " + "abc \u00e9 " * (i % 7)} for i in range(60)]


@contextmanager
def time_limit() -> Iterator[None]:
    """Fail when the block takes longer than LIMIT_SECONDS."""

    def fail(*_: object) -> None:
        raise AssertionError(f"took longer than {LIMIT_SECONDS} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, bytes]:
    """The files of a valid dataset, by suffix."""
    prefix = tmp_path_factory.mktemp("pair") / "d"
    draw = random.Random(0)
    tokenizer = ByteTokenizer()
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(30):
            writer.add_document([draw.randrange(256) for _ in range(draw.randrange(40))])
        writer.finish(
            {
                "tokenizer": tokenizer.name,
                "vocab_hash": tokenizer.fingerprint,
                "eod": tokenizer.eod,
            }
        )
    return {s: Path(f"{prefix}{s}").read_bytes() for s in (".idx", ".bin", ".json")}


def read_pair(prefix: str) -> None:
    """Read a dataset in all the ways in which a run does."""
    dataset = IndexedDataset(prefix)
    read = [dataset.read(i) for i in range(dataset.num_documents)]
    assert sum(map(len, read)) <= dataset.num_tokens
    assert sum(len(sequence) for sequence in dataset) == dataset.num_tokens
    made = build_splits(
        DataConfig(data_path=(prefix,), split="8,1,1"),
        seq_length=16,
        train_samples=30,
        valid_samples=3,
        test_samples=0,
        seed=1,
        tokenizer=ByteTokenizer(),
        vocab_size=257,
    )
    for samples in (made["train"], made["valid"]):
        for i in range(len(samples)):
            assert len(samples[i]) == 17


def refused_in_one_line(function: Callable, *arguments: object) -> bool:
    """Call a function; return whether it raised an error that is one line for the user."""
    try:
        with time_limit():
            function(*arguments)
    except (ValueError, OSError, RuntimeError) as error:
        line, code = classify_error(error)
        assert line is not None and code == 2
        assert "\n" not in str(line)
        return True
    return False


def check_pair(seed: int, pair: dict[str, bytes], folder: Path, programs: dict) -> bool:
    """Mutate one file of a dataset; return whether it is refused."""
    draw = random.Random(seed)
    folder.mkdir()
    prefix = str(folder / "d")
    suffix = draw.choice((".idx", ".idx", ".bin", ".json"))
    for other, data in pair.items():
        if other == suffix:
            is_json = suffix == ".json" and draw.random() < 0.7
            data = mutate_json(data, draw) if is_json else mutate(data, draw)
        Path(prefix + other).write_bytes(data)
    refused = refused_in_one_line(read_pair, prefix)
    output = folder / "output"
    code, text = run_forked(programs["inspect"], ["inspect", "--full", prefix], output)
    assert_read_or_refused(code, text, allowed=(0, 1))
    merged = str(folder / "merged")
    argv = ["merge", "--input", prefix, "--output-prefix", merged, "--verify"]
    code, text = run_forked(programs["merge"], argv, output)
    assert_read_or_refused(code, text)
    assert (code == 0) == os.path.exists(merged + ".idx")
    if code == 0:
        assert documents(merged) == documents(prefix)
    else:
        assert not list(folder.glob("merged*"))
    return refused


def check_cache(seed: int, pair: dict[str, bytes], folder: Path) -> None:
    """Mutate the cached indices of a blend: the samples are the same."""
    draw = random.Random(seed)
    folder.mkdir()
    prefixes = []
    for name in "ab":
        prefixes.append(str(folder / name))
        for suffix, data in pair.items():
            Path(prefixes[-1] + suffix).write_bytes(data)

    def samples() -> list[list[int]]:
        made = build_splits(
            DataConfig(data_path=tuple(prefixes), split="1"),
            seq_length=16,
            train_samples=20,
            valid_samples=0,
            test_samples=0,
            seed=1,
        )["train"]
        return [made[i].tolist() for i in range(20)]

    expected = samples()
    caches = sorted((folder / "index_cache").glob("*.cache"))
    assert len(caches) == 3
    for path in caches:
        path.write_bytes(mutate(path.read_bytes(), draw))
    with time_limit():
        assert samples() == expected
    assert sorted((folder / "index_cache").glob("*.cache")) == caches


@pytest.fixture(scope="module")
def inputs() -> dict[str, bytes]:
    """Valid inputs of preprocessing, by suffix."""
    import pyarrow
    import zstandard
    from pyarrow import parquet

    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(RECORDS)
    parquet.write_table(table, sink, row_group_size=20, write_page_checksum=True)
    return {
        ".jsonl": lines,
        ".bz2": bz2.compress(lines),
        ".xz": lzma.compress(lines),
        ".gz": gzip.compress(lines, mtime=0),
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress(lines),
        ".parquet": sink.getvalue().to_pybytes(),
    }


def check_input(seed: int, inputs: dict[str, bytes], folder: Path, programs: dict) -> bool:
    """Preprocess a mutated input; return whether it is refused."""
    draw = random.Random(seed)
    folder.mkdir()
    suffix = draw.choice(sorted(inputs))
    path = folder / f"in{suffix}"
    path.write_bytes(mutate(inputs[suffix], draw))
    prefix = str(folder / "out")
    argv = ["preprocess", "--input", str(path), "--output-prefix", prefix, *BYTES]
    argv += ["--append-eod", "--workers", "1"]
    if draw.random() < 0.5:
        argv += ["--on-error", "skip"]
    code, text = run_forked(programs["preprocess"], argv, folder / "output")
    assert_read_or_refused(code, text)
    if code == 0:
        assert len(documents(f"{prefix}_text_document")) > 0
    else:
        assert not list(folder.glob("out_text_document.*"))
        assert not (folder / "out.rejected.jsonl").exists()
    return code != 0


@pytest.fixture(scope="module")
def programs() -> dict[str, Callable[[], int]]:
    names = ("inspect_dataset", "merge_datasets", "preprocess_data")
    modules = {name: importlib.import_module(f"tools.{name}") for name in names}
    return {name.split("_")[0]: module.main for name, module in modules.items()}


def test_mutated_pairs_are_read_or_refused(pair, programs, tmp_path):
    refused = [check_pair(n, pair, tmp_path / str(n), programs) for n in range(FEW)]
    assert any(refused)


def test_mutated_caches_change_no_sample(pair, tmp_path):
    for seed in range(FEW):
        check_cache(seed, pair, tmp_path / str(seed))


def test_mutated_inputs_are_read_or_refused(inputs, programs, tmp_path):
    refused = [check_input(n, inputs, tmp_path / str(n), programs) for n in range(FEW)]
    assert any(refused) and not all(refused)


@pytest.mark.slow
def test_500_mutated_files(pair, inputs, programs, tmp_path):
    refused = []
    for seed in range(FEW, PAIRS):
        refused.append(check_pair(seed, pair, tmp_path / f"pair{seed}", programs))
    for seed in range(FEW, CACHES):
        check_cache(seed, pair, tmp_path / f"cache{seed}")
    for seed in range(FEW, INPUTS):
        folder = tmp_path / f"input{seed}"
        refused.append(check_input(seed, inputs, folder, programs))
    assert any(refused) and not all(refused)
