"""Scaled dot-product attention with sliding windows and sinks, on torch's fused kernels.

Those have neither. Both are expressed as attention that they do have:

A window of W keys lets a query see its own key and the W - 1 before. Queries are cut into blocks
of at least W, each of which attends to the keys of its own block and of the one before under a
mask, so that time and memory are linear in the sequence.

A sink is a learned logit of each query head in the denominator of the softmax,

    weight of key j = exp(score_j) / (exp(sink) + sum_i exp(score_i))

It is the score of one more key, whose value is 0: queries get features that hold the sink, keys
have 0 there, and the additional key has 1 there and 0 elsewhere. Without a mask it is the first
key of causal attention, before which a query is added whose output is dropped. With heads of 64
features that took 1.04 to 1.4 of the time without sinks on a CPU core, and a mask of floats 1.5
to 4.8 (S 1024; bf16, fp32).

Shape suffixes: B batch, S queries, L keys, H query heads, G key/value heads, K head dimension,
N blocks, C queries of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST_BLOCK = 64
"""Smallest number of queries of a block: smaller ones have more overhead than arithmetic"""


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """How attention weights are computed from queries and keys."""

    dropout: float = 0.0
    """probability with which attention weights are dropped"""
    scale: float | None = None
    """factor of the scores; None: K^-0.5"""
    window: int = 0
    """number of last keys that a query sees, its own included; 0: all"""
    sinks_H: Tensor | None = None
    """logit of each head in the denominator of the softmax; None: no such term"""


def attend(
    q_BHSK: Tensor,
    k_BGLK: Tensor,
    v_BGLK: Tensor,
    options: ScoreOptions,
    mask_B1SL: Tensor | None = None,
) -> Tensor:
    """Compute attention under a mask; without one, causal attention in the window.

    Args:
        options: its window is for causal attention; a mask has its own.
        mask_B1SL: bool, True where a query sees a key; some sizes may be 1.
    Returns:
        [B, H, S, K].
    """
    if mask_B1SL is None and 0 < options.window < q_BHSK.shape[2]:
        return _attend_in_window(q_BHSK, k_BGLK, v_BGLK, options)
    if options.sinks_H is not None:
        return _attend_with_sinks(q_BHSK, k_BGLK, v_BGLK, options, mask_B1SL)
    return _attend(q_BHSK, k_BGLK, v_BGLK, options, mask_B1SL)


def window_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """Return which keys are in the windows of the last queries.

    Returns:
        Bool [num_queries, num_keys].
    """
    first = num_keys - num_queries
    query_S1 = torch.arange(first, num_keys, device=device)[:, None]
    distance_SL = query_S1 - torch.arange(num_keys, device=device)
    return (distance_SL >= 0) & (distance_SL < window)


def visible_pairs(length: int, window: int = 0) -> int:
    """Return how many pairs of a query and a key causal attention of a sequence has.

    Args:
        window: as in `ScoreOptions`.
    """
    window = min(window or length, length)
    return window * (window + 1) // 2 + (length - window) * window


def computed_pairs(length: int, window: int = 0, has_sinks: bool = False) -> int:
    """Return the pairs of the rectangles in which `attend` computes causal attention.

    Kernels may skip those parts of a rectangle that no query sees.

    Args:
        window: as in `ScoreOptions`.
        has_sinks: whether there is one more key, and without a mask one more query.
    """
    if not 0 < window < length:
        return (length + has_sinks) ** 2
    size = _block_size(window)
    first = min(length, size)
    is_masked = window < first
    pairs = (first + (has_sinks and not is_masked)) * (first + has_sinks)
    return pairs + _num_later_blocks(length, size) * size * (2 * size + has_sinks)


def padded_head_size(head_size: int) -> int:
    """Return the features of a head with those that hold the sink."""
    # Fused kernels on GPUs need a multiple of 8, and heads of one size for keys and values.
    return -(-(head_size + 2) // 8) * 8


def _block_size(window: int) -> int:
    return max(window, _SMALLEST_BLOCK)


def _num_later_blocks(length: int, size: int) -> int:
    """Return the number of blocks of queries after the first one."""
    return -(-(length - min(length, size)) // size)


def _attend(
    q_BHSK: Tensor,
    k_BGLK: Tensor,
    v_BGLK: Tensor,
    options: ScoreOptions,
    mask_B1SL: Tensor | None,
) -> Tensor:
    is_grouped = k_BGLK.shape[1] != q_BHSK.shape[1]
    if is_grouped and mask_B1SL is not None and q_BHSK.is_cuda:
        # The fused kernel for masks has no grouped queries.
        repeats = q_BHSK.shape[1] // k_BGLK.shape[1]
        k_BGLK = k_BGLK.repeat_interleave(repeats, 1)
        v_BGLK = v_BGLK.repeat_interleave(repeats, 1)
        is_grouped = False
    # enable_gqa reads the shared heads in place. Compared with expanded copies of k and v,
    # forward + backward on one CPU core took 0.92-1.01 of the time in bf16 and 0.87-0.99
    # in fp32 (H/G 3 and 4, S 256-1024, K 64).
    return F.scaled_dot_product_attention(
        q_BHSK,
        k_BGLK,
        v_BGLK,
        attn_mask=mask_B1SL,
        is_causal=mask_B1SL is None,
        dropout_p=options.dropout,
        scale=options.scale,
        enable_gqa=is_grouped,
    )


def _attend_in_window(
    q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, options: ScoreOptions
) -> Tensor:
    """Attend block by block: the first one alone, the others with the block before."""
    length = q_BHSK.shape[2]
    window = options.window
    size = _block_size(window)
    options = replace(options, window=0)
    first = min(length, size)
    mask_SS = None
    if window < first:
        mask_SS = window_mask(first, first, window, q_BHSK.device)
        mask_SS = mask_SS[None, None]
    heads = (x[:, :, :first] for x in (q_BHSK, k_BGSK, v_BGSK))
    y_BHSK = attend(*heads, options, mask_SS)
    if length <= size:
        return y_BHSK
    num_blocks = _num_later_blocks(length, size)
    missing = (num_blocks + 1) * size - length
    q_XHCK = _blocks(F.pad(q_BHSK[:, :, size:], (0, 0, 0, missing)), size, size)
    k_XGLK = _blocks(F.pad(k_BGSK, (0, 0, 0, missing)), 2 * size, size)
    v_XGLK = _blocks(F.pad(v_BGSK, (0, 0, 0, missing)), 2 * size, size)
    mask_CL = window_mask(size, 2 * size, window, q_BHSK.device)
    y_XHCK = attend(q_XHCK, k_XGLK, v_XGLK, options, mask_CL[None, None])
    y_BNHCK = y_XHCK.unflatten(0, (-1, num_blocks))
    rest_BHSK = y_BNHCK.transpose(1, 2).flatten(2, 3)
    return torch.cat((y_BHSK, rest_BHSK[:, :, : length - size]), 2)


def _blocks(x_BHSK: Tensor, size: int, step: int) -> Tensor:
    """Return blocks of `size` positions, one each `step`: [B * N, H, size, K]."""
    blocks_BHNKC = x_BHSK.unfold(2, size, step)
    return blocks_BHNKC.permute(0, 2, 1, 4, 3).flatten(0, 1)


def _attend_with_sinks(
    q_BHSK: Tensor,
    k_BGLK: Tensor,
    v_BGLK: Tensor,
    options: ScoreOptions,
    mask_B1SL: Tensor | None,
) -> Tensor:
    size = q_BHSK.shape[3]
    scale = options.scale or size**-0.5
    added = padded_head_size(size) - size
    sinks_H2 = _in_two_parts(options.sinks_H, scale, q_BHSK.dtype)
    sinks_BHS2 = sinks_H2[None, :, None].expand(*q_BHSK.shape[:3], 2)
    q_BHSK = F.pad(torch.cat((q_BHSK, sinks_BHS2), -1), (0, added - 2))
    sink_key_K = k_BGLK.new_zeros(size + added)
    sink_key_K[size : size + 2] = 1
    sink_key_BG1K = sink_key_K.expand(*k_BGLK.shape[:2], 1, -1)
    k_BGLK = torch.cat((sink_key_BG1K, F.pad(k_BGLK, (0, added))), 2)
    v_BGLK = F.pad(v_BGLK, (0, added, 1, 0))
    options = replace(options, scale=scale, sinks_H=None)
    if mask_B1SL is not None:
        mask_B1SL = F.pad(mask_B1SL, (1, 0), value=True)
        return _attend(q_BHSK, k_BGLK, v_BGLK, options, mask_B1SL)[..., :size]
    q_BHSK = F.pad(q_BHSK, (0, 0, 1, 0))
    return _attend(q_BHSK, k_BGLK, v_BGLK, options, None)[:, :, 1:, :size]


def _in_two_parts(sinks_H: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return features of queries [H, 2] in `dtype` whose sum, times the scale, is the sink.

    The second part is what the first one loses by rounding to 16 bits.
    """
    exact_H = sinks_H.to(torch.promote_types(dtype, torch.float32)) / scale
    rounded_H = exact_H.to(dtype)
    rest_H = (exact_H - rounded_H).detach().to(dtype)
    return torch.stack((rounded_H, rest_H), -1)
