"""Input context and output of every feed-forward layer, dense or MoE.

Shape suffixes: B sequences, S positions, R positions of the micro-batch that are not
padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Padding and documents of a micro-batch. Made once for all layers."""

    padding_BS: Tensor | None = None
    """bool, True where a position is padding; None: no padding"""
    document_BS: Tensor | None = None
    """int64 number of each token's document within the micro-batch; None: each sequence
    is one document"""
    num_documents: int | None = None
    """numbers in document_BS are below this one; some may have no tokens"""

    @cached_property
    def unpadded_R(self) -> Tensor | None:
        """Positions that are not padding, int64; None without padding. One device sync."""
        if self.padding_BS is None:
            return None
        return self.padding_BS.flatten().logical_not().nonzero().flatten()


@dataclass(frozen=True, slots=True)
class FFNContext:
    """Inputs of a feed-forward layer in addition to the hidden states."""

    token_ids_BS: Tensor | None = None
    """int64 token ids"""
    carry: Tensor | None = None
    """carry of the previous MoE layer with the same gate, threaded through the layers as in
    jax.lax.scan"""
    progress: float = 0.0
    """consumed / total training samples, in [0, 1]"""
    layout: TokenLayout | None = None
    """padding, which MoE layers do not route, and documents; None: no padding, and each
    sequence is one document"""
    independent_sequences: bool = False
    """no sequence's routing depends on another sequence, as generation needs: no
    capacity limit, and a gate that looks at other tokens sees one sequence at a time"""


@dataclass(frozen=True, slots=True)
class FFNOutput:
    """Output of a feed-forward layer."""

    y: Tensor
    """[B, S, D], to be added to the residual stream"""
    aux_loss: Tensor | None = None
    """0-d fp32 auxiliary loss; None from a dense layer"""
    carry: Tensor | None = None
    """carry for the next MoE layer with the same gate; None if there is none"""
