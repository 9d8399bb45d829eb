"""The weights of one dense feed-forward layer, and what a sample of text says about its neurons.

Shape suffixes: D hidden, W width of the dense layer (neurons), E experts, T sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.interop.hf.weights import ReadRange


@dataclass(frozen=True, eq=False)
class DenseFFN:
    """Weights of a dense layer, fp32: y = down act(first x) or down (act(first x) * up x)."""

    first_WD: Tensor
    """the projection that is activated: the gate projection, or the only one without a gate"""
    up_WD: Tensor | None
    """the up projection of a gated activation"""
    down_DW: Tensor

    @staticmethod
    def read(
        read: ReadRange, layer: int, hidden_size: int, width: int, gated: bool
    ) -> DenseFFN:
        """Read the weights of block `layer`."""

        def matrix(name: str, rows: int, columns: int) -> Tensor:
            full_name = f"layers.{layer}.mlp.{name}_proj.weight"
            return read(full_name, 0, rows * columns).float().view(rows, columns)

        up_WD = matrix("up", width, hidden_size)
        down_DW = matrix("down", hidden_size, width)
        if not gated:
            return DenseFFN(up_WD, None, down_DW)
        return DenseFFN(matrix("gate", width, hidden_size), up_WD, down_DW)

    @property
    def width(self) -> int:
        """Number of neurons."""
        return len(self.first_WD)

    def take(self, neurons: Tensor) -> DenseFFN:
        """Return the layer of some of the neurons, in the given order."""
        up_WD = None
        if self.up_WD is not None:
            up_WD = self.up_WD[neurons]
        return DenseFFN(self.first_WD[neurons], up_WD, self.down_DW[:, neurons].contiguous())


@dataclass(frozen=True, eq=False)
class FFNStatistics:
    """What the tokens of a sample do in one dense layer."""

    x_TD: Tensor
    """inputs of the layer"""
    packed_active_TW: Tensor | None = None
    """uint8, 8 neurons in a byte: whether |h| of a neuron is among the largest of the token"""
    importance_EW: Tensor | None = None
    """mean |h dL/dh| of each neuron over the tokens of each cluster"""
    cluster_T: Tensor | None = None
    """cluster of each token, of as many as there will be experts"""

    def active(self, width: int) -> Tensor:
        """Return whether each neuron is active for each token, bool [T, W]."""
        bit_8 = torch.arange(8, dtype=torch.uint8)
        bits = (self.packed_active_TW[:, :, None] >> bit_8) & 1
        return bits.flatten(1)[:, :width].bool()


def pack_bits(bits_TW: Tensor) -> Tensor:
    """Pack bools [T, W] into bytes [T, ceil(W / 8)]."""
    num_tokens, width = bits_TW.shape
    padded = torch.zeros(num_tokens, -(-width // 8) * 8, dtype=torch.uint8)
    padded[:, :width] = bits_TW
    weight_8 = 2 ** torch.arange(8)
    return (padded.unflatten(1, (-1, 8)) * weight_8).sum(-1).to(torch.uint8)
