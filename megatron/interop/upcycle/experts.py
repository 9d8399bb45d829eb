"""Weights of experts: slices of a dense layer, with noise or with neurons drawn again.

Sources: noise, and copies without it: Sparse Upcycling (Komatsuzaki et al. 2022). Neurons whose
weights are drawn from the statistics of those that they replace: Drop-Upcycling (Nakamura et al.
2025), there and here the same neurons in all matrices of an expert, with mean and standard
deviation of each matrix over these neurons.

Shape suffixes: D hidden, M neurons of an expert.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.interop.upcycle.dense_ffn import DenseFFN


@dataclass(frozen=True)
class ExpertChange:
    """How an expert differs from its slice of the dense layer."""

    noise_std: float = 0.0
    """standard deviation of the noise, as a fraction of that of the slice's matrix"""
    drop_ratio: float = 0.0
    """fraction of the neurons that are drawn again"""
    scale: float = 1.0
    """factor of the output"""

    def apply(self, expert: DenseFFN, key: str) -> DenseFFN:
        """Return the changed weights.

        Args:
            key: seeds the random numbers; another one for each expert.
        """
        count = int(self.drop_ratio * expert.width)
        dropped = torch.randperm(expert.width, generator=seeded(f"{key}.neurons"))[:count]

        def changed(name: str, weight: Tensor, axis: int) -> Tensor:
            generator = seeded(f"{key}.{name}")
            result = weight.clone()
            if self.noise_std:
                noise = torch.randn(weight.shape, generator=generator)
                result += noise * (self.noise_std * weight.std())
            if count:
                replaced = weight.index_select(axis, dropped)
                drawn = torch.randn(replaced.shape, generator=generator)
                drawn = drawn * replaced.std() + replaced.mean()
                result.index_copy_(axis, dropped, drawn)
            return result

        up_MD = None
        if expert.up_WD is not None:
            up_MD = changed("up", expert.up_WD, 0)
        return DenseFFN(
            changed("first", expert.first_WD, 0),
            up_MD,
            changed("down", expert.down_DW, 1) * self.scale,
        )


def seeded(key: str) -> torch.Generator:
    """Return a generator that is seeded by a text."""
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))
