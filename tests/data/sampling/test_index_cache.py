"""Tests of the index cache with concurrent processes, and with processes that are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron.data.sampling import index_cache
from megatron.data.sampling.index_cache import Arrays, cached_arrays

CONTEXT = multiprocessing.get_context("fork")
KEY = {"seed": 3}
SECONDS = 120  # limit of every wait: a failed test ends


def arrays() -> Arrays:
    random = np.random.RandomState(3)
    return {
        "order": random.permutation(50_000).astype(np.int32),
        "bounds": np.arange(50_001),
        "none": np.empty(0),
    }


def assert_expected(found: Arrays) -> None:
    assert found.keys() == arrays().keys()
    for name, a in arrays().items():
        assert found[name].dtype == a.dtype and np.array_equal(found[name], a), name


def files(folder: Path) -> list[str]:
    return sorted("cache" if name.endswith(".cache") else name for name in os.listdir(folder))


@pytest.fixture
def lock_calls(monkeypatch):
    """Semaphore that is released by every call of flock, before the call."""
    calls = CONTEXT.Semaphore(0)
    flock = index_cache.fcntl.flock

    def counted(*args) -> None:
        calls.release()
        flock(*args)

    monkeypatch.setattr(index_cache.fcntl, "flock", counted)
    return calls


def build_in_child(folder: str, wait, results) -> None:
    """Get the arrays, calling `wait` before they are built; put them and the number of builds."""
    builds = []

    def build() -> Arrays:
        builds.append(1)
        wait()
        return arrays()

    results.put((cached_arrays(folder, "test", KEY, build), len(builds)))


def start_builders(folder: Path, number: int, wait) -> list[tuple[Arrays, int]]:
    """Return what `number` processes that start together get, and how often each one built."""
    results = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=build_in_child, args=(str(folder), wait, results))
        for _ in range(number)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=SECONDS) for _ in processes]
    for process in processes:
        process.join(SECONDS)
    return answers


def test_concurrent_processes_build_once(tmp_path, lock_calls):
    """The builder is slow: it ends after all other processes wait for the lock."""

    def wait_for_others() -> None:
        for _ in range(8):
            assert lock_calls.acquire(timeout=SECONDS)

    answers = start_builders(tmp_path, 8, wait_for_others)
    for found, _ in answers:
        assert_expected(found)
    assert sum(builds for _, builds in answers) == 1
    assert files(tmp_path) == [".lock", "cache"]


def test_without_locks_every_process_builds(tmp_path, monkeypatch):
    """On a filesystem without locks all processes build and store at the same time."""

    def refuse(*args) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(index_cache.fcntl, "flock", refuse)
    barrier = CONTEXT.Barrier(8)
    answers = start_builders(tmp_path, 8, lambda: barrier.wait(SECONDS))
    for found, _ in answers:
        assert_expected(found)
    assert sum(builds for _, builds in answers) == 8
    assert files(tmp_path) == [".lock", "cache"]


def stop_while_building(folder: str, stopped) -> None:
    def build() -> Arrays:
        stopped.set()
        threading.Event().wait()

    cached_arrays(folder, "test", KEY, build)


def stop_while_writing(folder: str, stopped) -> None:
    def stop(*args) -> None:
        stopped.set()
        threading.Event().wait()

    os.fsync = stop
    cached_arrays(folder, "test", KEY, arrays)


@pytest.mark.parametrize("stop", [stop_while_building, stop_while_writing])
def test_killed_builder_blocks_no_other(tmp_path, stop, lock_calls):
    """After the builder is killed, the process that waits for it builds, and later ones load."""
    stopped = CONTEXT.Event()
    results = CONTEXT.Queue()
    victim = CONTEXT.Process(target=stop, args=(str(tmp_path), stopped))
    victim.start()
    assert stopped.wait(SECONDS)
    assert lock_calls.acquire(timeout=SECONDS)
    waiting = CONTEXT.Process(
        target=build_in_child, args=(str(tmp_path), lambda: None, results)
    )
    waiting.start()
    assert lock_calls.acquire(timeout=SECONDS)
    assert results.empty()
    assert len(list(tmp_path.glob(".*.tmp"))) == (stop is stop_while_writing)
    os.kill(victim.pid, signal.SIGKILL)
    found, builds = results.get(timeout=SECONDS)
    waiting.join(SECONDS)
    victim.join(SECONDS)
    assert_expected(found)
    again = cached_arrays(str(tmp_path), "test", KEY, lambda: pytest.fail("built again"))
    assert_expected(again)
    assert builds == 1 and files(tmp_path) == [".lock", "cache"]
