"""A pool of ranks on this machine, started once and then given functions to run; gloo or NCCL.

For tests and for `tools/check_gate.py`, which run many short functions on the same ranks: starting
a rank takes seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.parallel.groups import Groups

_SECONDS_AFTER_A_FAILURE = 60
_groups: dict[int, Groups] = {}


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def groups_for(ep_size: int) -> Groups:
    """Return the Groups of an expert-parallel size in a rank; all ranks make it together."""
    if ep_size not in _groups:
        rank = dist.get_rank()
        world = dist.get_world_size()
        mine = None
        for first in range(0, world, ep_size):
            group = dist.new_group(list(range(first, first + ep_size)))
            if first <= rank < first + ep_size:
                mine = group
        _groups[ep_size] = Groups(
            rank=rank,
            world_size=world,
            backend=dist.get_backend(),
            reason="a pool of ranks on this machine",
            ep_size=ep_size,
            ep_group=mine if ep_size > 1 else None,
        )
    return _groups[ep_size]


def _worker(
    rank: int, world_size: int, backend: str, store: str, path: list[str], pipe: Any
) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # as a launcher would
    if backend == "nccl":
        os.environ["DS_ACCELERATOR"] = "cuda"
        torch.cuda.set_device(rank)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class RankPool:
    """Processes that share a group; `run(f, *args)` runs f on all and returns results by rank.

    They are started by the first `run`, and again after `stop`.

    Args:
        backend: gloo, with all on the CPU, or nccl, with a GPU for each.
    """

    def __init__(self, world_size: int, backend: str = "gloo"):
        self._world_size = world_size
        self._backend = backend
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for rank in range(self._world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker,
                daemon=True,
                args=(
                    rank,
                    self._world_size,
                    self._backend,
                    str(Path(self._folder.name) / "store"),
                    sys.path,
                    theirs,
                ),
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable, *args: Any, timeout: float = 120) -> list[Any]:
        """Return the ranks' results; RuntimeError with a rank's traceback or at a timeout.

        When a rank has failed, the others may wait for it in a collective: they are given
        `_SECONDS_AFTER_A_FAILURE` to fail, too, and are stopped then.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = self._receive(timeout)
        if None in answers:
            self.stop()
        for rank, answer in enumerate(answers):
            if answer is not None and not answer[0]:
                raise RuntimeError(f"rank {rank}:\n{answer[1]}")
        if None in answers:
            rank = answers.index(None)
            raise RuntimeError(f"rank {rank} ended, or gave no answer within {timeout} s")
        return [result for _, result in answers]

    def _receive(self, timeout: float) -> list[tuple[bool, Any] | None]:
        """Return the answer of each rank: (success, result or traceback); None: it has none."""
        answers: list[tuple[bool, Any] | None] = [None] * self._world_size
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                with contextlib.suppress(EOFError):  # the process ended
                    answers[rank] = pipe.recv()
                if answers[rank] is None or not answers[rank][0]:
                    limit = time.monotonic() + _SECONDS_AFTER_A_FAILURE
                    deadline = min(deadline, limit)
        return answers

    def stop(self) -> None:
        """Kill the ranks: leaving their process groups in order would take seconds."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._pipes = []
        self._processes = []
