"""Triton kernels for grouped matrix products over rows sorted by expert.

`expert_offsets_E` (int64) holds the end of each expert's rows. The last one may be less
than S: entries past it are padding. They are not read, and they are left uninitialised
in results of S rows.

No kernel needs a number from the device. A grid has room for every split of S rows
among E experts, and each program finds its own expert and rows, or that there is no
work for it. Sums are computed in fp32 and in a fixed order, without atomics, so results
are repeatable bit for bit. Row numbers are converted to int64 before they are
multiplied with a stride.

Source: grouped products with a fused gather are ScatterMoE's (Tan et al. 2024);
MegaBlocks (Gale et al. 2022) computes the weight gradient without padded rows.

Shape suffixes: E experts, H and D output and input features of an expert's matrix [H,
D] (N and K in any product), S rows sorted by expert, M rows to gather from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.moe.experts.triton_operands import check_operands, unit_stride_rows

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TILES_PER_GROUP = 8
"""Row tiles that share columns of the weights, see `_product_kernel`."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Part of a matrix product that one program computes, and its launch options."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """Number of pipeline stages for prefetched operands."""

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


_PLAIN_TILE = Tile(64, 64, 32, 4, 2)
"""Tile for products without tensor cores: exact fp32, and fp16 before Ampere."""
_TILES = (
    (200 * 2**10, Tile(128, 256, 64, 8, 3)),
    (96 * 2**10, Tile(128, 128, 64, 8, 3)),
    (0, _PLAIN_TILE),
)
"""(minimum bytes of shared memory, tile) for 16-bit numbers: Hopper and later, Ampere,
older. The first two spill no registers according to ptxas for sm_90, sm_80 and sm_86;
they were not timed."""


def choose_tile(
    dtype: torch.dtype, rows: int, columns: int, depth: int, shared_bytes: int
) -> Tile:
    """Return the tile for a product of rows x columns x depth.

    It is the largest one that fits the device's shared memory, reduced for small sizes.
    This is a table and not `triton.autotune`: the fastest configuration can differ from
    run to run, and with it the order of a sum and the last bits, whereas a resumed run
    must repeat the uninterrupted one.

    Args:
        rows: average number of rows that share one matrix.
        shared_bytes: shared memory available to a program.
    """
    if dtype == torch.float32:
        tile = _PLAIN_TILE
    else:
        tile = next(tile for minimum, tile in _TILES if shared_bytes >= minimum)
    tile_rows = _clipped(tile.rows, rows)
    tile_columns = _clipped(tile.columns, columns)
    warps = 8 if tile_rows * tile_columns >= 128 * 128 else 4
    return replace(
        tile,
        rows=tile_rows,
        columns=tile_columns,
        depth=_clipped(tile.depth, depth),
        warps=warps,
    )


def _clipped(block: int, size: int) -> int:
    """Reduce a block size to the power of two that covers `size`, at least 16."""
    return min(block, max(16, triton.next_power_of_2(size)))


@cache
def _shared_bytes(device: torch.device) -> int:
    """Return the shared memory that one program can use, 0 on the CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@triton.jit
def _accumulate(
    acc, x_ptrs, weight_ptrs, weight_stride_k, depth, BLOCK_K: tl.constexpr, EVEN: tl.constexpr
):
    """Return acc + x @ weight, computed BLOCK_K of the depth at a time."""
    k = tl.arange(0, BLOCK_K)
    for first in range(0, depth, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(first + k < depth)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(first + k < depth)[:, None], other=0.0)
        # The interpreter multiplies bf16 bit patterns as integers (triton issue 11584).
        # In fp32 these products are exact.
        if _INTERPRETED:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * weight_stride_k
    return acc


@triton.jit
def _locate_tile(row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return the row tile and the column tile of this program.

    Adjacent programs share rows and columns in the L2 cache: GROUP row tiles visit all
    columns before the next row tiles.
    """
    program = tl.program_id(0)
    first_tile = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first_tile, GROUP)
    within = program % (GROUP * column_tiles)
    return first_tile + within % height, within // height


@triton.jit
def _locate_rows(
    row_tile, offsets_ptr, num_experts, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Return the expert of a row tile, the tile's first row, and the end of the expert.

    Tiles of expert e are numbered from start_e // BLOCK_S + e. Each expert then has at
    least the tiles it needs, the numbers increase with e, and S // BLOCK_S + E tiles
    suffice for any split of the rows. A superfluous tile starts at or past the end.
    """
    expert_E = tl.arange(0, BLOCK_E)
    known_E = expert_E < num_experts
    start_E = tl.load(offsets_ptr + expert_E - 1, mask=known_E & (expert_E > 0), other=0)
    expert = tl.sum((known_E & (start_E // BLOCK_S + expert_E <= row_tile)).to(tl.int32), 0) - 1
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    first = start + (row_tile - expert - start // BLOCK_S) * BLOCK_S
    return expert, first, tl.load(offsets_ptr + expert)


@triton.jit(do_not_specialize=["row_tiles"])
def _product_kernel(
    x_ptr,
    weight_ptr,
    x2_ptr,
    weight2_ptr,
    out_ptr,
    gather_ptr,
    offsets_ptr,
    num_experts,
    row_tiles,
    columns,
    depth,
    x_stride,
    x2_stride,
    weight_stride_e,
    weight_stride_n,
    weight_stride_k,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """out[s, n] = sum_k x[gather[s], k] weight[e, n, k] [+ x2 weight2]."""
    column_tiles = (columns + BLOCK_N - 1) // BLOCK_N
    row_tile, column_tile = _locate_tile(row_tiles, column_tiles, GROUP)
    expert, first, end = _locate_rows(row_tile, offsets_ptr, num_experts, BLOCK_S, BLOCK_E)
    if first >= end:
        return
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)

    # Past the end, the last row or the first columns are computed again and not stored,
    # so loads need no mask. Unlike a minimum, a remainder lets the compiler see which
    # columns are adjacent and load 16 bytes at a time.
    row = first + tl.arange(0, BLOCK_S)
    source = tl.minimum(row, end - 1)
    if gather_ptr is not None:
        source = tl.load(gather_ptr + source)
    k = tl.arange(0, BLOCK_K)
    offset = (
        expert.to(tl.int64) * weight_stride_e
        + k.to(tl.int64)[:, None] * weight_stride_k
        + (column % columns).to(tl.int64)[None, :] * weight_stride_n
    )
    acc = tl.full((BLOCK_S, BLOCK_N), 0.0, tl.float32)
    x_ptrs = x_ptr + source[:, None] * x_stride + k[None, :]
    weight_ptrs = weight_ptr + offset
    acc = _accumulate(acc, x_ptrs, weight_ptrs, weight_stride_k, depth, BLOCK_K, EVEN)
    if x2_ptr is not None:
        x_ptrs = x2_ptr + source[:, None] * x2_stride + k[None, :]
        weight_ptrs = weight2_ptr + offset
        acc = _accumulate(acc, x_ptrs, weight_ptrs, weight_stride_k, depth, BLOCK_K, EVEN)
    tl.store(
        out_ptr + row[:, None] * columns + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(row < end)[:, None] & (column < columns)[None, :],
    )


def _check_pair(x: Tensor, weight: Tensor, x_MK: Tensor, weight_ENK: Tensor) -> None:
    """Check that rows and weights match each other and the first pair of a product."""
    assert x.dtype == weight.dtype, f"rows are {x.dtype}, weights {weight.dtype}"
    matches = x.shape == x_MK.shape and x.shape[1] == weight.shape[2]
    assert matches, f"rows {x.shape}, weights {weight.shape}"
    assert weight.shape == weight_ENK.shape, f"weights {weight.shape} and {weight_ENK.shape}"


def _product(
    x_MK: Tensor,
    weight_ENK: Tensor,
    expert_offsets_E: Tensor,
    gather_S: Tensor | None,
    plus: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return y[s] = weight[e(s)] @ x[gather[s]] for weights of any strides.

    Args:
        plus: a second pair (x, weight) of the same sizes, whose product is added.
    """
    x_MK = unit_stride_rows(x_MK)
    _check_pair(x_MK, weight_ENK, x_MK, weight_ENK)
    x2_MK = None
    weight2_ENK = None
    x2_stride = 0
    if plus is not None:
        x2_MK = unit_stride_rows(plus[0])
        weight2_ENK = plus[1]
        x2_stride = x2_MK.stride(0)
        _check_pair(x2_MK, weight2_ENK, x_MK, weight_ENK)
    num_experts, columns, depth = weight_ENK.shape
    num_rows = len(x_MK) if gather_S is None else len(gather_S)
    out_SN = x_MK.new_empty(num_rows, columns)
    rows_per_expert = num_rows // num_experts
    shared_bytes = _shared_bytes(x_MK.device)
    tile = choose_tile(x_MK.dtype, rows_per_expert, columns, depth, shared_bytes)
    row_tiles = num_rows // tile.rows + num_experts
    _product_kernel[(row_tiles * triton.cdiv(columns, tile.columns),)](
        x_MK,
        weight_ENK,
        x2_MK,
        weight2_ENK,
        out_SN,
        gather_S,
        expert_offsets_E,
        num_experts,
        row_tiles,
        columns,
        depth,
        x_MK.stride(0),
        x2_stride,
        *weight_ENK.stride(),
        BLOCK_S=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        BLOCK_E=triton.next_power_of_2(num_experts),
        GROUP=_TILES_PER_GROUP,
        EVEN=depth % tile.depth == 0,
        **tile.options,
    )
    return out_SN


def triton_grouped_gemm(
    x_MD: Tensor, weight_EHD: Tensor, expert_offsets_E: Tensor, gather_S: Tensor | None = None
) -> Tensor:
    """Return y[s] = weight[e(s)] @ x[gather[s]], accumulated in fp32.

    Args:
        x_MD: bf16, fp16 or fp32, in any strides; without `gather_S`, the S rows
            themselves.
        weight_EHD: each matrix contiguous, in the dtype of x.
        gather_S: int64, the row of x for each of the S rows.
    Returns:
        [S, H] in the dtype of x; contiguous.
    Raises:
        ValueError: fp64.
    """
    check_operands(x_MD, (expert_offsets_E, gather_S), (weight_EHD,))
    return _product(x_MD, weight_EHD, expert_offsets_E, gather_S)


def grouped_data_grad(
    grad_MH: Tensor,
    weight_EHD: Tensor,
    expert_offsets_E: Tensor,
    gather_S: Tensor | None = None,
    plus: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the gradient of a product's rows: weight[e(s)]^T @ grad[gather[s]].

    Args:
        grad_MH: gradient of y; without `gather_S`, the S rows themselves.
        gather_S: int64, the row of `grad_MH` for each of the S rows.
        plus: (gradient, weight) of a second product of the same rows; both are summed
            before rounding.
    Returns:
        [S, D] in the dtype of the gradient.
    Raises:
        ValueError: fp64.
    """
    weights = (weight_EHD,)
    transposed_plus = None
    if plus is not None:
        weights = (weight_EHD, plus[1])
        transposed_plus = (plus[0], plus[1].transpose(1, 2))
    check_operands(grad_MH, (expert_offsets_E, gather_S), weights)
    weight_EDH = weight_EHD.transpose(1, 2)
    return _product(grad_MH, weight_EDH, expert_offsets_E, gather_S, transposed_plus)


@triton.jit
def _weight_grad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    grad_gather_ptr,
    gather_ptr,
    offsets_ptr,
    height,
    columns,
    grad_stride,
    x_stride,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[e, h, d] = sum over rows s of grad[grad_gather[s], h] x[gather[s], d].

    One program computes the full sum of a tile.
    """
    column_tiles = (columns + BLOCK_D - 1) // BLOCK_D
    tiles = (height + BLOCK_H - 1) // BLOCK_H * column_tiles
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    h = tile // column_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tile % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    # Remainders instead of masks, as in _product_kernel.
    h_inside = h % height
    d_inside = d % columns
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    acc = tl.full((BLOCK_H, BLOCK_D), 0.0, tl.float32)
    for first in range(start, end, BLOCK_S):
        row = first + tl.arange(0, BLOCK_S).to(tl.int64)
        inside = row < end
        grad_row = row
        if grad_gather_ptr is not None:
            grad_row = tl.load(grad_gather_ptr + row, mask=inside, other=0)
        x_row = row
        if gather_ptr is not None:
            x_row = tl.load(gather_ptr + row, mask=inside, other=0)
        grad = tl.load(
            grad_ptr + grad_row[None, :] * grad_stride + h_inside[:, None],
            mask=inside[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + x_row[:, None] * x_stride + d_inside[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        if _INTERPRETED:  # as in _accumulate
            grad = grad.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(grad, x, acc, input_precision="ieee")
    tl.store(
        out_ptr + (expert.to(tl.int64) * height + h)[:, None] * columns + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(h < height)[:, None] & (d < columns)[None, :],
    )


def grouped_weight_grad(
    grad_MH: Tensor,
    x_MD: Tensor,
    expert_offsets_E: Tensor,
    gather_S: Tensor | None = None,
    grad_gather_S: Tensor | None = None,
) -> Tensor:
    """Return the gradient of a grouped product's weights.

    Per expert it is the sum over the expert's rows of grad times x; zeros without rows.

    Args:
        grad_MH: gradient of y; without `grad_gather_S`, the S rows themselves.
        x_MD: the product's input, in the dtype of the gradient; without `gather_S`, the
            S rows themselves.
        gather_S: int64, the row of `x_MD` for each of the S rows.
        grad_gather_S: int64, the row of `grad_MH` for each of the S rows.
    Returns:
        [E, H, D] in the dtype of the gradient.
    Raises:
        ValueError: fp64.
    """
    check_operands(grad_MH, (expert_offsets_E, gather_S, grad_gather_S))
    assert x_MD.dtype == grad_MH.dtype, (
        f"the gradient is {grad_MH.dtype}, the rows are {x_MD.dtype}"
    )
    grad_MH = unit_stride_rows(grad_MH)
    x_MD = unit_stride_rows(x_MD)
    num_experts = len(expert_offsets_E)
    num_rows = len(x_MD if gather_S is None else gather_S)
    num_grad_rows = len(grad_MH if grad_gather_S is None else grad_gather_S)
    assert num_rows == num_grad_rows, "gradient and x differ in rows"
    height = grad_MH.shape[1]
    columns = x_MD.shape[1]
    out_EHD = x_MD.new_empty(num_experts, height, columns)
    rows_per_expert = num_rows // num_experts
    shared_bytes = _shared_bytes(x_MD.device)
    tile = choose_tile(x_MD.dtype, height, columns, rows_per_expert, shared_bytes)
    row_tiles = triton.cdiv(height, tile.rows)
    column_tiles = triton.cdiv(columns, tile.columns)
    _weight_grad_kernel[(num_experts * row_tiles * column_tiles,)](
        grad_MH,
        x_MD,
        out_EHD,
        grad_gather_S,
        gather_S,
        expert_offsets_E,
        height,
        columns,
        grad_MH.stride(0),
        x_MD.stride(0),
        BLOCK_H=tile.rows,
        BLOCK_D=tile.columns,
        BLOCK_S=tile.depth,
        **tile.options,
    )
    return out_EHD
