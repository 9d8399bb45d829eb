"""The index cache with several processes at once, and with processes that are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron.data.sampling import index_cache
from megatron.data.sampling.index_cache import Arrays, cached_arrays

CONTEXT = multiprocessing.get_context("fork")
KEY = {"seed": 3}


def arrays() -> Arrays:
    random = np.random.RandomState(3)
    return {
        "order": random.permutation(50_000).astype(np.int32),
        "bounds": np.arange(50_001),
        "none": np.empty(0),
    }


def assert_right(found: Arrays) -> None:
    assert found.keys() == arrays().keys()
    for name, a in arrays().items():
        assert found[name].dtype == a.dtype and np.array_equal(found[name], a), name


def files(folder: Path) -> list[str]:
    return sorted("cache" if name.endswith(".cache") else name for name in os.listdir(folder))


def build_at_once(folder: str, barrier, results) -> None:
    builds = []

    def build() -> Arrays:
        builds.append(1)
        time.sleep(0.3)  # so that all of them are here before the first has finished
        return arrays()

    barrier.wait(20)
    results.put((cached_arrays(folder, "test", KEY, build), len(builds)))


@pytest.mark.parametrize("locks", [True, False])
def test_eight_processes_build_at_once(tmp_path, locks, monkeypatch):
    if not locks:

        def refuse(*args):
            raise OSError("no locks here")

        monkeypatch.setattr(index_cache.fcntl, "flock", refuse)
    barrier, results = CONTEXT.Barrier(8), CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=build_at_once, args=(str(tmp_path), barrier, results))
        for _ in range(8)
    ]
    for p in processes:
        p.start()
    answers = [results.get(timeout=30) for _ in processes]
    for p in processes:
        p.join(30)
    for found, _ in answers:
        assert_right(found)
    assert sum(count for _, count in answers) == (1 if locks else 8)
    assert files(tmp_path) == [".lock", "cache"]


def stop_while_building(folder: str, here) -> None:
    def build() -> Arrays:
        here.set()
        time.sleep(60)
        raise AssertionError("not killed")

    cached_arrays(folder, "test", KEY, build)


def stop_while_writing(folder: str, here) -> None:
    def stop(*args) -> None:
        here.set()
        time.sleep(60)

    index_cache.os.fsync = stop
    cached_arrays(folder, "test", KEY, arrays)


@pytest.mark.parametrize("stop", [stop_while_building, stop_while_writing])
def test_a_builder_that_is_killed_is_in_nobodys_way(tmp_path, stop):
    """One process waits for it, one comes later."""
    here, barrier, results = CONTEXT.Event(), CONTEXT.Barrier(1), CONTEXT.Queue()
    victim = CONTEXT.Process(target=stop, args=(str(tmp_path), here))
    victim.start()
    assert here.wait(20)
    waiting = CONTEXT.Process(target=build_at_once, args=(str(tmp_path), barrier, results))
    waiting.start()
    time.sleep(0.2)
    assert results.empty() and len(list(tmp_path.glob(".*.tmp"))) == (
        stop is stop_while_writing
    )
    os.kill(victim.pid, signal.SIGKILL)
    found, builds = results.get(timeout=30)
    waiting.join(30)
    victim.join(30)
    assert_right(found)
    assert_right(cached_arrays(str(tmp_path), "test", KEY, lambda: pytest.fail("built again")))
    assert builds == 1 and files(tmp_path) == [".lock", "cache"]
