"""Scaling of rotary frequencies for contexts longer than those of the first training.

Frequencies are angles per position. A frequency f makes P f / (2 pi) rotations in the P
positions of the first training.

Shape suffixes: F frequencies, half as many as rotated dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.config.rotary import RotaryConfig


class FrequencyScaling(Protocol):
    """A change of the frequencies."""

    @property
    def amplitude(self) -> float:
        """Number that rotated queries and keys are multiplied by."""

    def scale(self, frequency_F: Tensor, base: float) -> Tensor:
        """Return the changed frequencies, fp32.

        Args:
            frequency_F: base^(-i / F) of dimension pair i, fp32.
            base: base of the frequencies.
        """


def build_scaling(options: RotaryConfig, max_positions: int) -> FrequencyScaling | None:
    """Return the configured change of the frequencies; None: they stay as they are.

    Args:
        max_positions: positions of the model, which are the original ones if no others are set.
    """
    factor = options.rope_scaling_factor
    positions = options.rope_original_max_positions or max_positions
    if options.rope_scaling == "linear":
        return LinearScaling(factor)
    if options.rope_scaling == "llama3":
        low = options.rope_low_freq_factor
        return Llama3Scaling(factor, positions, low, options.rope_high_freq_factor)
    if options.rope_scaling == "yarn":
        return YarnScaling(positions, options)
    return None


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies are divided by a factor: position interpolation (Chen et al. 2023)."""

    factor: float
    amplitude: float = 1.0

    def scale(self, frequency_F: Tensor, base: float) -> Tensor:
        """Divide by the factor."""
        return frequency_F / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are divided by a factor, those in between by less (Llama 3.1)."""

    factor: float
    positions: int
    low: float
    """rotations in the original positions below which a frequency is divided by the factor"""
    high: float
    """rotations in the original positions above which a frequency stays"""
    amplitude: float = 1.0

    def scale(self, frequency_F: Tensor, base: float) -> Tensor:
        """Divide by 1 to `factor`, in proportion to the rotations of each frequency."""
        rotations_F = self.positions * frequency_F / (2 * math.pi)
        kept_share_F = (rotations_F - self.low) / (self.high - self.low)
        return _interpolate(frequency_F, self.factor, kept_share_F)


@dataclass(frozen=True)
class YarnScaling:
    """Low frequencies are divided by a factor, and scores are multiplied (Peng et al. 2023).

    Dimension pairs between the one with `yarn_beta_fast` rotations in the original positions
    and the one with `yarn_beta_slow` are interpolated linearly in the number of the pair.
    """

    positions: int
    options: RotaryConfig

    @property
    def amplitude(self) -> float:
        """Number that rotated queries and keys are multiplied by; scores by its square."""
        options = self.options
        factor = options.rope_scaling_factor
        if options.yarn_attention_factor:
            return options.yarn_attention_factor
        if options.yarn_mscale and options.yarn_mscale_all_dim:
            numerator = yarn_mscale(factor, options.yarn_mscale)
            return numerator / yarn_mscale(factor, options.yarn_mscale_all_dim)
        return yarn_mscale(factor, 1.0)

    def scale(self, frequency_F: Tensor, base: float) -> Tensor:
        """Divide by 1 to `factor`, in proportion to the number of the pair."""
        size = 2 * len(frequency_F)
        first = self._pair_with_rotations(self.options.yarn_beta_fast, size, base)
        last = self._pair_with_rotations(self.options.yarn_beta_slow, size, base)
        if self.options.yarn_truncate:
            first = math.floor(first)
            last = math.ceil(last)
        first = max(first, 0)
        last = min(last, size - 1)
        if first == last:
            last += 0.001
        pair_F = torch.arange(len(frequency_F), device=frequency_F.device).float()
        kept_share_F = 1 - ((pair_F - first) / (last - first)).clamp(0, 1)
        return _interpolate(frequency_F, self.options.rope_scaling_factor, kept_share_F)

    def _pair_with_rotations(self, rotations: float, size: int, base: float) -> float:
        """Return the (fractional) dimension pair that makes so many rotations."""
        positions_per_rotation = self.positions / (rotations * 2 * math.pi)
        return size * math.log(positions_per_rotation) / (2 * math.log(base))


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's scale 0.1 mscale ln(factor) + 1 of queries and keys."""
    if factor <= 1:
        return 1.0
    return 0.1 * mscale * math.log(factor) + 1.0


def latent_score_factor(options: RotaryConfig) -> float:
    """Return the number that latent attention multiplies scores by, as DeepSeek-V2 does."""
    if options.rope_scaling != "yarn" or not options.yarn_mscale_all_dim:
        return 1.0
    return yarn_mscale(options.rope_scaling_factor, options.yarn_mscale_all_dim) ** 2


def _interpolate(frequency_F: Tensor, factor: float, kept_share_F: Tensor) -> Tensor:
    kept_share_F = kept_share_F.clamp(0, 1)
    return frequency_F / factor * (1 - kept_share_F) + frequency_F * kept_share_F
