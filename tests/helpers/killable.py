"""Runs that tests can kill.

They are forked from a server that has imported everything, so each starts in a second.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess

os.environ.setdefault("DS_ACCELERATOR", "cpu")


def preload() -> None:
    """In the server: import what a run needs.

    Nothing here may start a thread, because threads do not survive a fork.
    """
    import torch

    from megatron.engine.distributed import prepare_deepspeed
    from megatron.engine.startup_patches import skip_triton_probe

    torch.set_num_threads(1)
    prepare_deepspeed(torch.device("cpu"))
    import deepspeed  # noqa: F401

    skip_triton_probe()
    import megatron.training.trainer  # noqa: F401


def run(argv: list[str], rank: int, ranks: int, port: int, output: str) -> None:
    """In a forked process: one rank of a run, with its output appended to a file."""
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
    """The multiprocessing context of the server, which is started at the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.killable_preload"])
    path = os.environ.get("PYTHONPATH", "")
    # The server does not inherit sys.path, and ignores a preload that it cannot import.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    forkserver.ensure_running()
    os.environ["PYTHONPATH"] = path
    return context


def start(argv: list[str], ranks: int, port: int, output: str) -> list[BaseProcess]:
    """Start the ranks of a run as processes that can be killed and joined."""
    context = server()
    processes = [
        context.Process(target=run, args=(argv, rank, ranks, port, output), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes
