"""Causal attention within the documents of packed samples, in memory linear in their length.

No mask over pairs of tokens is built, except for short samples on a CPU. On a GPU, flash attention
takes the offsets of documents. Elsewhere the documents of a micro-batch are sorted by length, short
ones are padded to one of a few lengths, and documents of equal length run as one batch of plain
causal attention. Padding comes after a document, where causal attention does not look.

Shape suffixes: B batch, S sequence, T = B x S tokens, N documents, P rows with padding, H query
heads, G key/value heads, K head dimension, D any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.first_order import first_order_only
from megatron.model.attend import ScoreOptions, attend, window_mask
from megatron.moe.dispatch.permute import gather_rows

_PADDED_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Lengths to which shorter documents are padded: a third of the rows at most is padding. Longer
documents are not padded: their attention takes much longer than starting it"""
_LONGEST_MASKED = {torch.bfloat16: 256, torch.float16: 256}
_LONGEST_MASKED_OTHERS = 64
"""Longest samples for which one call with a mask is faster than several without one: measured by
benchmarks/document_attention.py on a CPU"""


class DocumentBatches(NamedTuple):
    """Rows of a micro-batch, sorted into batches of documents of equal padded length."""

    token_P: Tensor
    """Token of each row, int64; padding repeats the last token of its document"""
    row_T: Tensor
    """Row of each token, int64"""
    shapes: tuple[tuple[int, int], ...]
    """(documents, padded length) of consecutive batches"""


@dataclass(frozen=True, eq=False)
class DocumentLayout:
    """Positions of the documents of a micro-batch. Made once for all layers."""

    segments_BS: Tensor
    """Number of each token's document: neighbours of a sample with equal numbers are in the same
    document"""
    _window_masks: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def starts_N(self) -> Tensor:
        """First token of each document among all T tokens, int64."""
        is_start_BS = torch.ones_like(self.segments_BS, dtype=torch.bool)
        is_start_BS[:, 1:] = self.segments_BS[:, 1:] != self.segments_BS[:, :-1]
        return is_start_BS.flatten().nonzero().flatten()

    @cached_property
    def lengths_N(self) -> Tensor:
        """Length of each document, int64."""
        end = self.starts_N.new_tensor([self.segments_BS.numel()])
        return torch.diff(self.starts_N, append=end)

    @cached_property
    def offsets_N1(self) -> Tensor:
        """Start of each document and the end of the last one, int32."""
        return F.pad(self.starts_N, (0, 1), value=self.segments_BS.numel()).int()

    @cached_property
    def longest(self) -> int:
        """Length of the longest document."""
        return int(self.lengths_N.max())

    @cached_property
    def document_BS(self) -> Tensor:
        """Number of each token's document in the micro-batch, int64 from 0 on."""
        start_T = self.starts_N.new_zeros(self.segments_BS.numel())
        start_T[self.starts_N] = 1
        return start_T.cumsum(0).sub(1).view_as(self.segments_BS)

    @cached_property
    def mask_B1SS(self) -> Tensor:
        """Whether a query may look at a key: in its document and not after it."""
        same_BSS = self.document_BS[:, :, None] == self.document_BS[:, None, :]
        return same_BSS.tril().unsqueeze(1)

    def mask(self, window: int) -> Tensor:
        """Return the mask [B, 1, S, S] with another limit of the distance; 0: none."""
        if not window:
            return self.mask_B1SS
        if window not in self._window_masks:
            length = self.segments_BS.shape[1]
            near_SS = window_mask(length, length, window, self.segments_BS.device)
            self._window_masks[window] = self.mask_B1SS & near_SS
        return self._window_masks[window]

    @cached_property
    def batches(self) -> DocumentBatches | None:
        """Documents in batches of equal padded length; None if every sample is one document."""
        if len(self.starts_N) == len(self.segments_BS):
            return None
        padded_N = _padded_lengths(self.lengths_N)
        order_N = torch.argsort(padded_N, stable=True)
        padded_sorted_N = padded_N[order_N]
        first_row_sorted_N = padded_sorted_N.cumsum(0) - padded_sorted_N
        first_row_N = torch.empty_like(first_row_sorted_N)
        first_row_N[order_N] = first_row_sorted_N
        row_T = _consecutive(first_row_N, self.starts_N, self.lengths_N)
        token_P = _consecutive(self.starts_N[order_N], first_row_sorted_N, padded_sorted_N)
        last_token_N = self.starts_N + self.lengths_N - 1
        last_token_P = last_token_N[order_N].repeat_interleave(padded_sorted_N)
        lengths, counts = torch.unique_consecutive(padded_sorted_N, return_counts=True)
        return DocumentBatches(
            token_P=torch.minimum(token_P, last_token_P),
            row_T=row_T,
            shapes=tuple(zip(counts.tolist(), lengths.tolist(), strict=True)),
        )


def _padded_lengths(lengths_N: Tensor) -> Tensor:
    """Round lengths up to the next padded length; those above the last one stay."""
    table = lengths_N.new_tensor(_PADDED_LENGTHS)
    number_N = torch.bucketize(lengths_N, table)
    padded_N = table[number_N.clamp_max(len(table) - 1)]
    return torch.maximum(padded_N, lengths_N)


def _consecutive(first_N: Tensor, position_N: Tensor, length_N: Tensor) -> Tensor:
    """Concatenate ranges that begin at `first_N`; range n begins at index `position_N[n]`."""
    shift = (first_N - position_N).repeat_interleave(length_N)
    return shift + torch.arange(len(shift), device=shift.device)


def document_attention(
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    documents: DocumentLayout,
    options: ScoreOptions,
) -> Tensor:
    """Attend to earlier tokens of the same document.

    Args:
        options: how weights are computed. The fused kernels of CPUs have no dropout: memory is
            then quadratic in the length of a document.
    Returns:
        [B, H, S, K].
    """
    if can_use_varlen(q_BHSK, options.dropout) and options.sinks_H is None:
        return _attend_varlen(q_BHSK, k_BGSK, v_BGSK, documents, options)
    if q_BHSK.shape[2] <= longest_masked(q_BHSK.dtype):
        mask_B1SS = documents.mask(options.window)
        return attend(q_BHSK, k_BGSK, v_BGSK, options, mask_B1SS)
    if documents.batches is None:
        return attend(q_BHSK, k_BGSK, v_BGSK, options)
    return _attend_in_batches(q_BHSK, k_BGSK, v_BGSK, documents.batches, options)


def longest_masked(dtype: torch.dtype) -> int:
    """Return the length of the longest samples whose documents are separated by a mask."""
    return _LONGEST_MASKED.get(dtype, _LONGEST_MASKED_OTHERS)


def can_use_varlen(q_BHSK: Tensor, dropout: float) -> bool:
    """Return whether flash attention with offsets of documents runs on these queries.

    Its kernel is for 16-bit inputs and GPUs from Ampere on, and has no dropout in torch 2.13.
    """
    head_size = q_BHSK.shape[3]
    return (
        q_BHSK.is_cuda
        and q_BHSK.dtype in (torch.bfloat16, torch.float16)
        and dropout == 0.0
        and head_size % 8 == 0
        and head_size <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q_BHSK.device) >= (8, 0)
    )


def _attend_varlen(
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    documents: DocumentLayout,
    options: ScoreOptions,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets_N1 = documents.offsets_N1
    y_THK = varlen_attn(
        _to_rows(q_BHSK),
        _to_rows(k_BGSK),
        _to_rows(v_BGSK),
        offsets_N1,
        offsets_N1,
        documents.longest,
        documents.longest,
        scale=options.scale,
        # Keys before and after the query's own; -1: all.
        window_size=(options.window - 1, 0),
        enable_gqa=k_BGSK.shape[1] != q_BHSK.shape[1],
    )
    return _from_rows(y_THK, len(q_BHSK))


def _attend_in_batches(
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    batches: DocumentBatches,
    options: ScoreOptions,
) -> Tensor:
    sizes = [count * length for count, length in batches.shapes]
    inputs = []
    for x in (q_BHSK, k_BGSK, v_BGSK):
        rows = _PadDocuments.apply(_to_rows(x).flatten(1), batches)
        # One operation for all batches: its backward pass is one concatenation, while that of
        # slices fills a full gradient for each.
        inputs.append(rows.unflatten(1, (x.shape[1], -1)).split(sizes))
    outputs = []
    for (count, _), q, k, v in zip(batches.shapes, *inputs, strict=True):
        inputs_of_batch = (_from_rows(x, count) for x in (q, k, v))
        y = attend(*inputs_of_batch, options)
        outputs.append(_to_rows(y).flatten(1))
    y_TD = _UnpadDocuments.apply(torch.cat(outputs), batches)
    return _from_rows(y_TD.unflatten(1, (q_BHSK.shape[1], -1)), len(q_BHSK))


def _to_rows(x: Tensor) -> Tensor:
    """Reshape [B, heads, S, K] -> [T, heads, K]."""
    return x.transpose(1, 2).flatten(0, 1)


def _from_rows(rows: Tensor, count: int) -> Tensor:
    """Reshape [count * S, heads, K] -> [count, heads, S, K]."""
    return rows.unflatten(0, (count, -1)).transpose(1, 2)


class _PadDocuments(torch.autograd.Function):
    """rows_P = x_T[token_P]; the gradient of padding, which is 0, is left out."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, batches: DocumentBatches) -> Tensor:
        ctx.batches = batches
        return gather_rows(x_TD, batches.token_P)

    @staticmethod
    @first_order_only
    def backward(ctx, grad_PD: Tensor) -> tuple:
        return gather_rows(grad_PD, ctx.batches.row_T), None


class _UnpadDocuments(torch.autograd.Function):
    """y_T = rows_P[row_T]; the gradient of padding is 0."""

    @staticmethod
    def forward(ctx, rows_PD: Tensor, batches: DocumentBatches) -> Tensor:
        ctx.batches = batches
        return gather_rows(rows_PD, batches.row_T)

    @staticmethod
    @first_order_only
    def backward(ctx, grad_TD: Tensor) -> tuple:
        grad_PD = grad_TD.new_zeros(len(ctx.batches.token_P), grad_TD.shape[1])
        return grad_PD.index_copy_(0, ctx.batches.row_T, grad_TD), None
