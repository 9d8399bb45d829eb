"""Blends of many datasets under a low limit of open files."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from helpers import runs
from helpers.programs import REPO
from megatron.config.schema import DataConfig
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import IndexedWriter
from megatron.data.loader import BatchLoader, DataParallelShard
from megatron.data.sampling import index_cache
from megatron.data.splits import build_splits


@contextmanager
def spare_descriptors(number: int) -> Iterator[None]:
    """Let this process open only so many more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + number, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def write_datasets(folder: Path, number: int) -> tuple[str, ...]:
    """Write datasets of 40 tokens, each of which is the number of the dataset."""
    folder.mkdir()
    for k in range(number):
        with IndexedWriter(folder / f"d{k}", np.uint16) as writer:
            writer.add_documents(np.full(40, k), [10] * 4)
    return tuple(str(folder / f"d{k}") for k in range(number))


def train_samples(prefixes: tuple[str, ...], cache: Path):
    data = DataConfig(data_path=prefixes, split="1", data_cache_path=str(cache))
    made = build_splits(
        data, seq_length=8, train_samples=400, valid_samples=0, test_samples=0, seed=1
    )
    return made["train"]


def test_datasets_hold_no_descriptors(tmp_path):
    """Neither the tokens nor the sample indices do, also when they are built or found again."""
    prefixes = write_datasets(tmp_path / "data", 60)
    before = sorted(os.listdir("/proc/self/fd"))
    with spare_descriptors(20):
        built = train_samples(prefixes, tmp_path / "cache")
        again = train_samples(prefixes, tmp_path / "cache")
        for i in range(400):
            assert built[i].tolist() == again[i].tolist()
        assert {int(again[i][0]) for i in range(400)} == set(range(60))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_worker_processes_read_many_datasets(tmp_path):
    prefixes = write_datasets(tmp_path / "data", 60)
    with spare_descriptors(50):
        samples = train_samples(prefixes, tmp_path / "cache")
        loader = BatchLoader(
            samples,
            DataParallelShard(4, 4),
            data=DataConfig(num_workers=2),
            eod=None,
            vocab_size=60,
        )
        for n in range(100):
            expected = [samples[i][:-1].tolist() for i in range(4 * n, 4 * n + 4)]
            assert next(loader).tokens_BS.tolist() == expected
        del loader


@pytest.mark.parametrize("step", ["map_file", "_store"])
def test_descriptor_shortage_is_no_corruption(tmp_path, monkeypatch, caplog, step):
    """A cache that cannot be opened for lack of descriptors is neither ignored nor replaced."""
    folder = str(tmp_path)
    if step == "map_file":
        index_cache.cached_arrays(folder, "test", {}, lambda: {"a": np.ones(1)})

    def fail(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(index_cache, step, fail)
    with pytest.raises(OSError, match="Too many open files"):
        index_cache.cached_arrays(folder, "test", {}, lambda: {"a": np.zeros(1)})
    monkeypatch.undo()
    assert caplog.text == ""
    found = index_cache.cached_arrays(folder, "test", {}, lambda: {"a": np.zeros(1)})
    assert found["a"].tolist() == [step == "map_file"]


def test_unreadable_cache_is_built_again(tmp_path, monkeypatch, caplog):
    folder = str(tmp_path)
    index_cache.cached_arrays(folder, "test", {}, lambda: {"a": np.ones(1)})

    def fail(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(index_cache, "map_file", fail)
    found = index_cache.cached_arrays(folder, "test", {}, lambda: {"a": np.zeros(1)})
    assert found["a"].tolist() == [0] and "cannot be read" in caplog.text


def test_listing_the_cache_is_done_once(tmp_path, monkeypatch):
    """Listing a folder of thousands of indices for each of them would be quadratic."""
    listings = []
    glob = Path.glob

    def counted(self, pattern):
        listings.append(self)
        return glob(self, pattern)

    monkeypatch.setattr(Path, "glob", counted)
    train_samples(write_datasets(tmp_path / "data", 12), tmp_path / "cache")
    assert listings.count(tmp_path / "cache") == 1


@pytest.mark.slow
def test_run_reads_2000_datasets(tmp_path):
    """A run with worker processes may open 1,024 files only, whatever it does about it."""
    first = write_datasets(tmp_path / "data", 1)[0]
    prefixes = [first]
    for k in range(1, 2000):
        prefixes.append(str(tmp_path / "data" / f"d{k}"))
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(first + suffix, prefixes[-1] + suffix)
    assert len(IndexedDataset(prefixes[-1])) == 4
    argv = runs.flags(first, tmp_path, 2, "--num-workers", "2", "--eval-iters", "0")
    at = argv.index("--data-path") + 1
    argv[at : at + 1] = prefixes
    argv[argv.index("--split") + 1] = "1"
    command = f'ulimit -n 1024; exec {sys.executable} pretrain_gpt.py "$@"'
    done = subprocess.run(
        ["bash", "-c", command, "bash", *argv],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert [row["iteration"] for row in runs.metrics(tmp_path)] == [1, 2]
