"""Ranks on GPUs. Without a GPU the same tests run on CPU ranks, with fewer gates."""

from __future__ import annotations

import pytest
import torch

from helpers.spawn import Ranks

GPUS = torch.cuda.device_count()


def _pool(request, num_gpus: int, on_cpu: str):
    """Yield a pool of one rank per GPU, or a pool of CPU ranks that exists anyway."""
    if GPUS == 0:
        yield request.getfixturevalue(on_cpu)
        return
    if num_gpus > GPUS:
        pytest.skip(f"needs {num_gpus} GPUs, there is {GPUS}")
    pool = Ranks(num_gpus, "nccl")
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def gpu_ranks1(request):
    """One rank."""
    yield from _pool(request, 1, "ranks1")


@pytest.fixture(scope="session")
def gpu_ranks2(request):
    """Two ranks."""
    yield from _pool(request, 2, "ranks2")


@pytest.fixture(scope="session")
def gpu_ranks_all(request):
    """As many ranks as there are GPUs, at least two."""
    yield from _pool(request, max(2, GPUS), "ranks2")
