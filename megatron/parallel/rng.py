"""Random streams: the same weights on all ranks, different dropout on each rank."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_rank(seed: int, rank: int) -> None:
    """Seed this rank's stream for dropout and jitter.

    Initial weights do not depend on it: they are drawn from generators of their own.
    """
    torch.manual_seed(seed + 1_000_003 * (rank + 1))


def get_state() -> dict[str, torch.Tensor]:
    """Return the state of the CPU and, if in use, CUDA generator as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_state(state: dict[str, torch.Tensor]) -> None:
    """Restore a state of `get_state`; without CUDA, a CUDA state is ignored."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Restore the random streams of torch, NumPy and Python's random module at the end."""
    torch_state = get_state()
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    try:
        yield
    finally:
        set_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
