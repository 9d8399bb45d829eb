"""Building sample indices while other ranks wait, with slow, failing and killed builders."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from helpers import killable, runs
from helpers.faulty import LIMIT_SECONDS
from helpers.spawn import free_port, groups_for
from helpers.waiting import wait_until
from megatron import log
from megatron.config.fields import require
from megatron.config.schema import DataConfig
from megatron.data import splits as splits_module
from megatron.data.index_builder import all_can_store, build_on_each_node, build_on_ranks
from megatron.data.indexed.writer import IndexedWriter
from megatron.data.sampling import sample_index
from megatron.exit_codes import classify_error

SHORT = ["--eval-iters", "0"]


def _build(local_ranks: list[int], outcomes: list[str], folder: str) -> str:
    """On a rank: build with a time limit of 2 s per collective; return the error, or "".

    Args:
        local_ranks: number of each rank within its node.
        outcomes: for each rank, what its builder does.
    """
    rank = dist.get_rank()
    groups = replace(groups_for(1), local_rank=local_ranks[rank])

    def build() -> None:
        Path(folder, f"built{rank}").touch()
        outcome = outcomes[rank]
        if outcome == "slow":
            threading.Event().wait(3.0)
        elif outcome == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif outcome:
            require(False, "--split", outcome, "proportions")

    fork = os.fork
    if outcomes[rank] == "no fork":
        fork = mock.Mock(side_effect=OSError("no process can be started"))
    default = timedelta(seconds=60)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    try:
        with mock.patch.object(os, "fork", fork):
            build_on_each_node(build, groups, classify_error)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.distributed_c10d._set_pg_timeout(default, dist.group.WORLD)
    return ""


@pytest.mark.parametrize(
    ("local_ranks", "outcomes", "message", "builders"),
    [
        ([0, 1], ["slow", ""], "", ["built0"]),
        ([0, 0], ["", "slow"], "", ["built0", "built1"]),
        ([0, 1], ["2,x", ""], "ValueError: --split is '2,x'; allowed", ["built0"]),
        ([0, 0], ["", "2,x"], "ValueError: --split is '2,x'; allowed", ["built0", "built1"]),
        ([0, 1], ["killed", ""], "OSError: process ", ["built0"]),
        ([0, 0], ["", "no fork"], "OSError: no process can be started", ["built0"]),
    ],
)
def test_ranks_wait_for_all_builders(
    ranks2, tmp_path, local_ranks, outcomes, message, builders
):
    """Two ranks on one node, or on one node each; a build is longer than a collective may be."""
    errors = ranks2.run(_build, local_ranks, outcomes, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == builders
    assert errors[0] == errors[1]
    if message:
        assert errors[0].startswith(message)
    else:
        assert errors[0] == ""


def _build_in_memory(takes_part: list[bool], outcomes: list[str]) -> tuple[object, str]:
    """On a rank: build with a time limit of 2 s per collective; return (result, error)."""
    rank = dist.get_rank()

    def build() -> dict:
        if outcomes[rank] == "slow":
            threading.Event().wait(3.0)
        elif outcomes[rank]:
            raise FileNotFoundError(outcomes[rank])
        return {"train": [rank]}

    default = timedelta(seconds=60)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    try:
        return build_on_ranks(build, groups_for(1), takes_part[rank]), ""
    except FileNotFoundError as error:
        return None, str(error)
    finally:
        dist.distributed_c10d._set_pg_timeout(default, dist.group.WORLD)


@pytest.mark.parametrize(
    ("takes_part", "outcomes", "expected"),
    [
        ([True, True], ["", "slow"], [({"train": [0]}, ""), ({"train": [1]}, "")]),
        ([True, False], ["slow", ""], [({"train": [0]}, ""), (None, "")]),
        ([True, True], ["", "missing"], [({"train": [0]}, ""), (None, "missing")]),
    ],
)
def test_ranks_wait_for_builds_in_memory(ranks2, takes_part, outcomes, expected):
    assert ranks2.run(_build_in_memory, takes_part, outcomes) == expected


def _probe(local_ranks: list[int], folders: list[str]) -> tuple[bool, str]:
    """On a rank: return whether the cache of all nodes can be written, and the log."""
    rank = dist.get_rank()
    os.environ["RANK"] = str(rank)
    groups = replace(groups_for(1), local_rank=local_ranks[rank])
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        log.setup()
        can_store = all_can_store([folders[rank]], groups)
    return can_store, output.getvalue()


@pytest.mark.parametrize(
    ("local_ranks", "names", "expected", "warns"),
    [
        ([0, 1], ["new/a", "new/b"], True, False),
        ([0, 1], ["new/a", "file"], True, False),
        ([0, 1], ["file", "new/a"], False, False),
        ([0, 0], ["new/a", "file/a"], False, True),
    ],
)
def test_one_rank_of_each_node_probes(ranks2, tmp_path, local_ranks, names, expected, warns):
    (tmp_path / "file").touch()
    folders = [str(tmp_path / name) for name in names]
    answers = ranks2.run(_probe, local_ranks, folders)
    assert [can_store for can_store, _ in answers] == [expected] * 2
    expected_text = "cannot write the index cache on the node of rank 1"
    assert [expected_text in text for _, text in answers] == [warns, False]
    assert "--data-cache-path" in answers[0][1] or not warns
    assert os.listdir(tmp_path) == ["file"], "a probe leaves nothing"


def test_unwritable_cache_is_not_built_twice(data, tmp_path):
    """Every rank builds its own, without a builder, and one line says so."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(data + suffix, tmp_path / f"d{suffix}")
    (tmp_path / "index_cache").touch()  # a file: root can write every folder
    argv = runs.flags(str(tmp_path / "d"), tmp_path, 2)
    found = codes(start(argv, tmp_path, "killed"))
    text = (tmp_path / "output.txt").read_text()
    assert found == [0, 0], text
    lines = [line for line in text.splitlines() if "index cache" in line]
    assert len(lines) == 1 and not lines[0].startswith("[rank 1]")
    assert "--data-cache-path" in lines[0] and "File exists" in lines[0]


def test_bug_in_builder_shows_its_traceback(data, tmp_path):
    """An error inside numpy is no mistake of the user, on two ranks as on one."""
    argv = runs.flags(data, tmp_path, 2, *SHORT, "--data-cache-path", str(tmp_path))
    assert codes(start(argv, tmp_path, "bug")) == [1, 1]
    text = (tmp_path / "output.txt").read_text()
    assert "in build_with_fault" in text
    assert "ValueError: could not broadcast input array" in text
    assert " error: could not broadcast" not in text


def run(argv: list[str], rank: int, ranks: int, port: int, output: str, fault: str) -> None:
    """In a forked process: one rank of a run whose builder, a child of rank 0, has a fault."""
    from megatron.data import splits

    build = splits.build_splits
    trainer = os.getpid()

    def build_with_fault(*args, **options):
        if os.getpid() != trainer:
            if fault == "slow":
                threading.Event().wait(20.0)
            elif fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "bug":
                np.zeros(3)[:] = np.zeros(4)
            elif fault == "hang":
                Path(output).with_suffix(".pids").write_text(f"{trainer} {os.getpid()}\n")
                threading.Event().wait()
        return build(*args, **options)

    splits.build_splits = build_with_fault
    killable.run(argv, rank, ranks, port, output)


def start(argv: list[str], folder: Path, fault: str) -> list:
    port = free_port()
    output = str(folder / "output.txt")
    processes = [
        killable.server().Process(
            target=run, args=(argv, rank, 2, port, output, fault), daemon=True
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def codes(processes: list) -> list[int]:
    end = time.monotonic() + LIMIT_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return found


@pytest.mark.slow
def test_slow_build_exceeds_the_time_limit(data, tmp_path):
    limit = ("--timeout-minutes", "0.25", "--data-cache-path", str(tmp_path))
    argv = runs.flags(data, tmp_path, 2, *SHORT, *limit)
    assert codes(start(argv, tmp_path, "slow")) == [0, 0], (tmp_path / "output.txt").read_text()
    assert [row["iteration"] for row in runs.metrics(tmp_path)] == [1, 2]


def test_killed_builder_ends_all_ranks(data, tmp_path):
    argv = runs.flags(data, tmp_path, 2, *SHORT, "--data-cache-path", str(tmp_path))
    assert codes(start(argv, tmp_path, "killed")) == [2, 2]
    text = (tmp_path / "output.txt").read_text()
    lines = [line for line in text.splitlines() if "error:" in line]
    assert len(lines) == 2 and "Traceback" not in text
    for line in lines:
        assert "which builds the sample indices, was ended by signal Killed" in line


def test_killed_rank_ends_builder_and_peer(data, tmp_path):
    """Rank 0 is killed while its builder hangs: rank 1 and the builder end, too."""
    argv = runs.flags(data, tmp_path, 2, *SHORT, "--data-cache-path", str(tmp_path))
    processes = start(argv, tmp_path, "hang")
    pids = tmp_path / "output.pids"
    wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"), "the builder")
    rank0, builder = map(int, pids.read_text().split())
    os.kill(rank0, signal.SIGKILL)
    assert codes(processes) == [-signal.SIGKILL, 1]
    assert "[rank 1] error: another rank ended" in (tmp_path / "output.txt").read_text()
    wait_until(lambda: not _runs(builder), "the end of the builder")


def _runs(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_restart_keeps_finished_indices(tmp_path, monkeypatch):
    """A build that ends in the middle of many datasets continues with the next one."""
    prefixes = []
    for k in range(6):
        prefixes.append(str(tmp_path / f"d{k}"))
        with IndexedWriter(prefixes[-1], np.uint16) as writer:
            writer.add_documents(np.arange(40), [10] * 4)
    data = DataConfig(data_path=tuple(prefixes), split="1")
    build = sample_index.build_order
    built = []

    def counted(*arguments):
        if len(built) == 4:
            raise KeyboardInterrupt
        built.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(sample_index, "build_order", counted)
    sizes = {"seq_length": 8, "train_samples": 24, "valid_samples": 0, "test_samples": 0}
    with pytest.raises(KeyboardInterrupt):
        splits_module.build_splits(data, **sizes, seed=1)
    again = []
    monkeypatch.setattr(
        sample_index, "build_order", lambda *args: again.append(args) or build(*args)
    )
    assert len(splits_module.build_splits(data, **sizes, seed=1)["train"]) == 24
    assert len(built) == 4 and len(again) == 2


def test_long_builds_are_logged(tmp_path, monkeypatch, caplog):
    prefixes = []
    for k in range(2):
        prefixes.append(str(tmp_path / f"d{k}"))
        with IndexedWriter(prefixes[-1], np.uint16) as writer:
            writer.add_documents(np.arange(40), [10] * 4)
    monkeypatch.setattr(splits_module, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(sample_index, "_LOGGED_DOCUMENTS", 4)
    sizes = {"seq_length": 8, "train_samples": 4, "valid_samples": 0, "test_samples": 0}
    data = DataConfig(data_path=tuple(prefixes), split="1")
    with caplog.at_level(logging.INFO, "megatron"):
        splits_module.build_splits(data, **sizes, seed=1)
    assert "train split: 1 of 2 datasets have their sample index" in caplog.text
    assert f"building the sample index of {prefixes[1]}: 4 documents, 2 samples" in caplog.text
