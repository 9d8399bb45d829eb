"""Runs that tests can kill: forked from a server that has imported everything, so that each starts in a second."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess

os.environ.setdefault("DS_ACCELERATOR", "cpu")


def preload() -> None:
    """In the server. Threads would not survive a fork: nothing here starts one."""
    import torch

    from megatron.engine.distributed import prepare_deepspeed
    from megatron.engine.startup_patches import skip_triton_probe

    torch.set_num_threads(1)
    prepare_deepspeed(torch.device("cpu"))
    import deepspeed  # noqa: F401

    skip_triton_probe()
    import megatron.training.trainer  # noqa: F401


def run(argv: list[str], rank: int, ranks: int, port: int, output: str) -> None:
    """One rank of a run; its output goes to a file."""
    inherited = set(sys.modules)
    from megatron import exit_codes, pretrain

    assert inherited >= {"torch", "deepspeed"}, "the server has imported nothing"
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    exit_codes.exit_process(pretrain.main(argv))


def server() -> multiprocessing.context.BaseContext:
    """The server to start processes from, running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.killable_preload"])
    path, os.environ["PYTHONPATH"] = (
        os.environ.get("PYTHONPATH", ""),
        os.pathsep.join(filter(None, sys.path)),
    )
    forkserver.ensure_running()  # it does not hand sys.path on, and forgives that it cannot import what it should
    os.environ["PYTHONPATH"] = path
    return context


def start(argv: list[str], ranks: int, port: int, output: str) -> list[BaseProcess]:
    """The ranks of a run, as processes that can be killed and joined."""
    context = server()
    processes = [
        context.Process(target=run, args=(argv, rank, ranks, port, output), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes
