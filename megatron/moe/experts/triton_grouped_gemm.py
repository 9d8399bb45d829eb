"""Triton kernels for grouped experts: matrix products over rows sorted by expert, activation, segment sum.

Shape suffixes: E experts, H and D output and input features of an expert's matrix [H, D] (N and K of any product), S rows
sorted by expert, M rows to gather from, T tokens.

`expert_offsets_E` int64 says where each expert's rows end. The last may be less than S: what lies beyond is no row, is not read,
and is left as it was allocated where results have S rows.

No kernel needs a number from the device. A grid has room for every split of S rows among E experts, and each program
finds its own expert and rows, or that there is nothing for it to do. Sums are taken in fp32 and in a fixed order,
without atomics, so a result is repeatable bit for bit. Row numbers are int64 before they meet a stride.

Source: grouped products with a fused gather are ScatterMoE's (Tan et al. 2024); MegaBlocks (Gale et al. 2022) has the
gradient without padded rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.config.schema import require

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
RSQRT_2 = tl.constexpr(0.5**0.5)
RSQRT_2_PI = tl.constexpr(0.3989422804014327)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes of a matrix product, and with how many warps and stages of prefetched operands."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


PLAIN_TILE = Tile(64, 64, 32, 4, 2)
"""for products without matrix units: exact ones of fp32, and what Triton makes of fp16 before Ampere"""
TILES = (
    (200 * 2**10, Tile(128, 256, 64, 8, 3)),
    (96 * 2**10, Tile(128, 128, 64, 8, 3)),
    (0, PLAIN_TILE),
)
"""(bytes of shared memory at least, tile) for 16-bit numbers: Hopper and later, Ampere, older. The first two spill
no registers, by what ptxas says of sm_90, sm_80 and sm_86; they were not timed"""


def choose_tile(
    dtype: torch.dtype, rows: int, columns: int, depth: int, shared_bytes: int
) -> Tile:
    """The tile for a product of rows x columns x depth: what the device has room for, smaller for small sizes.

    A table and not `triton.autotune`: the winner of a timing can differ from run to run, and with it the order of a sum
    and the last bits, whereas a resumed run must repeat the uninterrupted one.

    Args:
        rows: those that share one matrix, on average.
        shared_bytes: shared memory that a program can have.
    """
    tile = (
        PLAIN_TILE
        if dtype == torch.float32
        else next(tile for least, tile in TILES if shared_bytes >= least)
    )
    sizes = {
        name: min(getattr(tile, name), max(16, triton.next_power_of_2(size)))
        for name, size in (("rows", rows), ("columns", columns), ("depth", depth))
    }
    return replace(
        tile, **sizes, warps=8 if sizes["rows"] * sizes["columns"] >= 128 * 128 else 4
    )


@cache
def _shared_bytes(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if device.type == "cuda"
        else 0
    )


@triton.jit
def _accumulate(
    acc, x_ptrs, weight_ptrs, weight_stride_k, depth, BLOCK_K: tl.constexpr, EVEN: tl.constexpr
):
    """acc + x @ weight, BLOCK_K of the depth at a time."""
    k = tl.arange(0, BLOCK_K)
    for first in range(0, depth, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(first + k < depth)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(first + k < depth)[:, None], other=0.0)
        if INTERPRETED:  # it takes the bits of bf16 for integers (triton issue 11584); in fp32 these products are exact
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * weight_stride_k
    return acc


@triton.jit(do_not_specialize=["row_tiles"])
def _product_kernel(
    x_ptr,
    weight_ptr,
    x2_ptr,
    weight2_ptr,
    out_ptr,
    gather_ptr,
    ends_ptr,
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
    """out[s, n] = sum_k x[gather[s], k] weight[e, n, k], plus the same of x2 and weight2 where they are given."""
    # Neighbouring programs share rows and columns: GROUP row tiles go through all columns before the next rows.
    column_tiles = (columns + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first_tile = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first_tile, GROUP)
    within = program % (GROUP * column_tiles)
    row_tile = first_tile + within % height
    column = within // height * BLOCK_N + tl.arange(0, BLOCK_N)

    # Tiles of expert e are numbered from start_e // BLOCK_S + e. That leaves each expert at least the tiles it needs,
    # so the numbers rise with e, and S // BLOCK_S + E tiles are enough however the rows are split.
    expert_E = tl.arange(0, BLOCK_E)
    known_E = expert_E < num_experts
    start_E = tl.load(ends_ptr + expert_E - 1, mask=known_E & (expert_E > 0), other=0)
    expert = tl.sum((known_E & (start_E // BLOCK_S + expert_E <= row_tile)).to(tl.int32), 0) - 1
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    first = start + (row_tile - expert - start // BLOCK_S) * BLOCK_S
    if first >= end:
        return

    # Past the end the last row, or the first columns, are computed again and not stored: loads need no mask. Unlike a
    # minimum, a remainder lets the compiler see which columns are neighbours, and load 16 bytes at a time.
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
    acc = _accumulate(
        acc,
        x_ptr + source[:, None] * x_stride + k[None, :],
        weight_ptr + offset,
        weight_stride_k,
        depth,
        BLOCK_K,
        EVEN,
    )
    if x2_ptr is not None:
        acc = _accumulate(
            acc,
            x2_ptr + source[:, None] * x2_stride + k[None, :],
            weight2_ptr + offset,
            weight_stride_k,
            depth,
            BLOCK_K,
            EVEN,
        )
    tl.store(
        out_ptr + row[:, None] * columns + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(row < end)[:, None] & (column < columns)[None, :],
    )


def _product(
    x_MK: Tensor,
    weight_ENK: Tensor,
    expert_offsets_E: Tensor,
    gather_S: Tensor | None,
    plus: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y[s] = weight[e(s)] @ x[gather[s]] for weights of any strides; `plus` is a second such pair of the same sizes."""
    x_MK = _rows(x_MK)
    x2_MK, weight2_ENK = (None, None) if plus is None else (_rows(plus[0]), plus[1])
    for x, weight in ((x_MK, weight_ENK), (x2_MK, weight2_ENK)):
        if x is not None:
            assert x.dtype == weight.dtype, f"rows are {x.dtype}, weights {weight.dtype}"
            assert x.shape == x_MK.shape and x.shape[1] == weight.shape[2], (
                f"rows {x.shape}, weights {weight.shape}"
            )
            assert weight.shape == weight_ENK.shape, (
                f"weights {weight.shape} and {weight_ENK.shape}"
            )
    num_experts, columns, depth = weight_ENK.shape
    num_rows = len(x_MK) if gather_S is None else len(gather_S)
    out_SN = x_MK.new_empty(num_rows, columns)
    tile = choose_tile(
        x_MK.dtype, num_rows // num_experts, columns, depth, _shared_bytes(x_MK.device)
    )
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
        0 if x2_MK is None else x2_MK.stride(0),
        *weight_ENK.stride(),
        BLOCK_S=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        BLOCK_E=triton.next_power_of_2(num_experts),
        GROUP=8,
        EVEN=depth % tile.depth == 0,
        **tile.options,
    )
    return out_SN


def triton_grouped_gemm(
    x_MD: Tensor, weight_EHD: Tensor, expert_offsets_E: Tensor, gather_S: Tensor | None = None
) -> Tensor:
    """y[s] = weight[e(s)] @ x[gather[s]], accumulated in fp32; without `gather`, of x[s].

    Args:
        x_MD: bf16, fp16 or fp32, in any strides; without `gather`, the S rows themselves.
        weight_EHD: contiguous, in the dtype of x.
        gather_S: int64, the row of x of each of the S rows.
    Returns:
        [S, H] in the dtype of x; contiguous.
    Raises:
        ValueError: fp64.
    """
    _check(x_MD, (expert_offsets_E, gather_S), (weight_EHD,))
    return _product(x_MD, weight_EHD, expert_offsets_E, gather_S)


def grouped_data_grad(
    grad_MH: Tensor,
    weight_EHD: Tensor,
    expert_offsets_E: Tensor,
    gather_S: Tensor | None = None,
    plus: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient of `grouped_linear`'s gathered rows: weight[e(s)]^T @ grad[gather[s]].

    Args:
        grad_MH: gradient of y, and `gather_S` the row of it of each of the S rows; without `gather`, S long.
        plus: another (gradient, weight), of a second product of the same rows; both are summed before rounding.
    Returns:
        [S, D] in the dtype of the gradient.
    Raises:
        ValueError: fp64.
    """
    _check(
        grad_MH,
        (expert_offsets_E, gather_S),
        (weight_EHD,) if plus is None else (weight_EHD, plus[1]),
    )
    plus = plus and (plus[0], plus[1].transpose(1, 2))
    return _product(grad_MH, weight_EHD.transpose(1, 2), expert_offsets_E, gather_S, plus)


@triton.jit
def _weight_grad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    grad_gather_ptr,
    gather_ptr,
    ends_ptr,
    height,
    columns,
    grad_stride,
    x_stride,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[e, h, d] = sum over the rows s of e of grad[grad_gather[s], h] x[gather[s], d], all by one program."""
    column_tiles = (columns + BLOCK_D - 1) // BLOCK_D
    tiles = (height + BLOCK_H - 1) // BLOCK_H * column_tiles
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    h = tile // column_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tile % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    h_inside = h % height  # as above
    d_inside = d % columns
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
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
        if INTERPRETED:  # as above
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
    """The gradient of `grouped_linear`'s weight: per expert, the sum over its rows of grad times x; zeros without rows.

    Args:
        grad_MH: gradient of y, and `grad_gather_S` the row of it of each of the S rows; without it, S long.
        x_MD: as `grouped_linear` had it, and `gather_S` with it; the dtype of the gradient.
    Returns:
        [E, H, D] in the dtype of the gradient.
    Raises:
        ValueError: fp64.
    """
    _check(grad_MH, (expert_offsets_E, gather_S, grad_gather_S))
    assert x_MD.dtype == grad_MH.dtype, (
        f"the gradient is {grad_MH.dtype}, the rows are {x_MD.dtype}"
    )
    grad_MH, x_MD = _rows(grad_MH), _rows(x_MD)
    num_rows, num_experts = (
        len(x_MD) if gather_S is None else len(gather_S),
        len(expert_offsets_E),
    )
    assert num_rows == len(grad_MH if grad_gather_S is None else grad_gather_S), (
        "gradient and x differ in rows"
    )
    height, columns = grad_MH.shape[1], x_MD.shape[1]
    out_EHD = x_MD.new_empty(num_experts, height, columns)
    tile = choose_tile(
        x_MD.dtype, height, columns, num_rows // num_experts, _shared_bytes(x_MD.device)
    )
    grid = (num_experts * triton.cdiv(height, tile.rows) * triton.cdiv(columns, tile.columns),)
    _weight_grad_kernel[grid](
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


@triton.jit
def _combine_kernel(
    rows_ptr,
    order_ptr,
    bags_ptr,
    weight_ptr,
    out_ptr,
    columns,
    rows_stride,
    BLOCK: tl.constexpr,
):
    """out[t] = sum over the bag of t of weight[i] rows[order[i]]: one program per token and tile of columns."""
    column_tiles = (columns + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // column_tiles).to(tl.int64)
    column = tl.program_id(0) % column_tiles * BLOCK + tl.arange(0, BLOCK)
    acc = tl.full((BLOCK,), 0.0, tl.float32)
    for i in range(tl.load(bags_ptr + token), tl.load(bags_ptr + token + 1)):
        row = tl.load(order_ptr + i)
        value = tl.load(
            rows_ptr + row * rows_stride + column, mask=column < columns, other=0.0
        ).to(tl.float32)
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + i).to(tl.float32)
        acc += value
    tl.store(
        out_ptr + token * columns + column,
        acc.to(out_ptr.dtype.element_ty),
        mask=column < columns,
    )


def weighted_combine(
    rows_SD: Tensor, order_S: Tensor, token_offsets_T1: Tensor, weight_S: Tensor | None = None
) -> Tensor:
    """y_t = sum over i in bag t of weight_i * rows[order_i], accumulated in fp32: `dispatch.bag_sum` as a kernel.

    Args:
        rows_SD: bf16, fp16 or fp32; `order_S` may visit fewer or more than all of them.
        order_S: int64, which row each entry of the bags is.
        token_offsets_T1: int64, where each bag starts in `order_S`; the last entry is where the last one ends.
        weight_S: in the order of `order_S`, any of the dtypes; None: ones.
    Returns:
        [T, D] in the dtype of the rows.
    Raises:
        ValueError: fp64.
    """
    _check(rows_SD, (order_S, token_offsets_T1))
    assert weight_S is None or weight_S.is_contiguous() and len(weight_S) == len(order_S), (
        "one weight per entry"
    )
    rows_SD = _rows(rows_SD)
    num_tokens, columns = len(token_offsets_T1) - 1, rows_SD.shape[1]
    out_TD = rows_SD.new_empty(num_tokens, columns)
    block = min(1024, triton.next_power_of_2(columns))
    _combine_kernel[(num_tokens * triton.cdiv(columns, block),)](
        rows_SD,
        order_S,
        token_offsets_T1,
        weight_S,
        out_TD,
        columns,
        rows_SD.stride(0),
        BLOCK=block,
    )
    return out_TD


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        act = tl.where(gate < 0, 0.0, gate)  # a NaN stays one
    elif ACTIVATION == "gelu":
        act = 0.5 * gate * (1 + tl.erf(gate * RSQRT_2))
    else:
        act = gate / (1 + tl.exp(-gate))
    return act


@triton.jit
def _slope(gate, ACTIVATION: tl.constexpr):
    """The derivative of `_activate`."""
    if ACTIVATION == "relu":
        slope = tl.where(gate <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        slope = (
            0.5 * (1 + tl.erf(gate * RSQRT_2)) + gate * tl.exp(-0.5 * gate * gate) * RSQRT_2_PI
        )
    else:
        sigmoid = 1 / (1 + tl.exp(-gate))
        slope = sigmoid * (1 + gate * (1 - sigmoid))
    return slope


@triton.jit
def _activation_kernel(
    gate_ptr,
    up_ptr,
    weight_ptr,
    out_ptr,
    ends_ptr,
    num_experts,
    columns,
    ACTIVATION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out = weight act(gate) [up], for the rows before the last end."""
    num_rows = tl.load(ends_ptr + num_experts - 1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    weight = tl.load(weight_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    for first in range(0, columns, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        at = row[:, None] * columns + column[None, :]
        mask = (row < num_rows)[:, None] & (column < columns)[None, :]
        hidden = _activate(
            tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION
        )
        if up_ptr is not None:
            hidden *= tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (hidden * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activation_grad_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    weight_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    grad_weight_ptr,
    ends_ptr,
    num_experts,
    space,
    columns,
    ACTIVATION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Its gradients. `space` is the length of the arrays: beyond the last end the weight's gradient is 0."""
    num_rows = tl.load(ends_ptr + num_experts - 1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    weight = tl.load(weight_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    grad_weight = tl.full((BLOCK_S, BLOCK_H), 0.0, tl.float32)
    for first in range(0, columns, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        at = row[:, None] * columns + column[None, :]
        mask = (row < num_rows)[:, None] & (column < columns)[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
        hidden = _activate(gate, ACTIVATION)
        grad_gate = grad * weight * _slope(gate, ACTIVATION)
        if up_ptr is not None:
            up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
            grad_up = grad * weight * hidden
            tl.store(grad_up_ptr + at, grad_up.to(grad_up_ptr.dtype.element_ty), mask=mask)
            hidden *= up
            grad_gate *= up
        grad_weight += grad * hidden
        tl.store(grad_gate_ptr + at, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_weight_ptr + row, tl.sum(grad_weight, 1), mask=row < space)


def _activation_grid(
    gate_SH: Tensor, activation: str
) -> tuple[tuple[int], dict[str, int | str]]:
    """(grid, constants): a program takes 16 rows, 128 columns at a time."""
    base = {"swiglu": "silu", "geglu": "gelu"}.get(activation, activation)
    block = min(128, triton.next_power_of_2(gate_SH.shape[1]))
    return (triton.cdiv(len(gate_SH), 16),), {
        "ACTIVATION": base,
        "BLOCK_S": 16,
        "BLOCK_H": block,
    }


def weighted_activation(
    gate_SH: Tensor,
    up_SH: Tensor | None,
    weight_S: Tensor,
    expert_offsets_E: Tensor,
    activation: str,
) -> Tensor:
    """weight_s * act(gate_s), times up_s where given: computed in fp32, returned in the dtype of the gate.

    Args:
        gate_SH, up_SH: contiguous.
        weight_S: fp32, contiguous.
        activation: its gated kinds mean what is applied to the gate.
    """
    assert all(t is None or t.is_contiguous() for t in (gate_SH, up_SH, weight_S)), (
        "rows must be contiguous"
    )
    out_SH = torch.empty_like(gate_SH)
    grid, constants = _activation_grid(gate_SH, activation)
    _activation_kernel[grid](
        gate_SH,
        up_SH,
        weight_S,
        out_SH,
        expert_offsets_E,
        len(expert_offsets_E),
        gate_SH.shape[1],
        **constants,
    )
    return out_SH


def weighted_activation_grad(
    grad_SH: Tensor,
    gate_SH: Tensor,
    up_SH: Tensor | None,
    weight_S: Tensor,
    expert_offsets_E: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of `weighted_activation`'s gate, up (None without one) and weight: fp32 [S], 0 beyond the last end."""
    assert all(t is None or t.is_contiguous() for t in (grad_SH, gate_SH, up_SH, weight_S)), (
        "rows must be contiguous"
    )
    grad_gate_SH = torch.empty_like(gate_SH)
    grad_up_SH = None if up_SH is None else torch.empty_like(up_SH)
    grad_weight_S = torch.empty_like(weight_S)
    grid, constants = _activation_grid(gate_SH, activation)
    _activation_grad_kernel[grid](
        grad_SH,
        gate_SH,
        up_SH,
        weight_S,
        grad_gate_SH,
        grad_up_SH,
        grad_weight_S,
        expert_offsets_E,
        len(expert_offsets_E),
        *gate_SH.shape,
        **constants,
    )
    return grad_gate_SH, grad_up_SH, grad_weight_S


def _rows(rows: Tensor) -> Tensor:
    """Rows may be anywhere, the numbers of a row must be neighbours."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check(
    rows: Tensor, indices: tuple[Tensor | None, ...], weights: tuple[Tensor, ...] = ()
) -> None:
    require(
        rows.dtype in TRITON_DTYPES,
        "the dtype of Triton's expert kernels",
        rows.dtype,
        " ".join(map(str, TRITON_DTYPES)),
    )
    for index in indices:
        assert index is None or index.dtype == torch.int64, (
            f"indices are int64, not {index.dtype}"
        )
        assert index is None or index.is_contiguous(), "indices must be contiguous"
    for weight in weights:
        assert weight.is_contiguous(), "stacked weights must be contiguous"
        assert len(weight) == len(indices[0]), f"{len(weight)} experts, {len(indices[0])} ends"
