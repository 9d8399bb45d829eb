"""Random state: the same seed for weights everywhere, another stream per rank for dropout."""

from __future__ import annotations

import torch


def seed_rank(seed: int, rank: int) -> None:
    """Seed this rank's dropout and jitter stream; weights are drawn from generators of their own."""
    torch.manual_seed(seed + 1_000_003 * (rank + 1))


def get_state() -> dict[str, torch.Tensor]:
    """State of the CPU and (if in use) CUDA generators of this process, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what `get_state` returned; a CUDA state is left alone on a machine without CUDA."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
