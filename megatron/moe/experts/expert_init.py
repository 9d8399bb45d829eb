"""Initial weights of experts, independent of how experts are sharded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ExpertInit:
    """Distribution and seed of the initial weights of one rank's experts."""

    seed: int = 0
    layer: int = 0
    """Number of the transformer block."""
    first_expert: int = 0
    """Global number of this rank's first expert."""
    init_std: float = 0.02
    """Standard deviation of gate and up projections."""
    output_std: float = 0.02
    """Standard deviation of down projections."""

    def generator(self, local: int) -> torch.Generator:
        """Return an expert's generator, seeded by (seed, layer, global number)."""
        expert = self.first_expert + local
        mixed = self.seed * 1_000_003 + self.layer * 65_537 + expert + 1
        return torch.Generator().manual_seed(mixed * 2_654_435_761 % 2**63)


def expert_output_std(init_std: float, num_layers: int) -> float:
    """Return init_std / sqrt(2 x layers), the standard deviation of down projections.

    Each of the 2 x layers residual branches then adds an equal share of the variance.
    """
    return init_std / math.sqrt(2 * num_layers)
