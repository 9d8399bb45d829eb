"""Tiny experts as tables that are looked up: PEER's single neurons, and small MLPs of a few hidden units.

Shape suffixes: T tokens, D hidden, A assignments of a token to an expert, N_local experts on this rank, W hidden units of one
expert, R = N_local x W rows of a table, P = A x W pairs of a token and a row, U rows that are in any pair, G bags.

    y_t = sum over the assignments a of token t:  weight_a * sum_j act(w_in[e_a, j] . x_t) * w_out[e_a, j]

Grouped matrix products are no use when an expert sees a token or two, and P rows of width D are the memory to avoid: P
is over a hundred times T. Two operations that read rows where they lie do all the work, and are each other's gradient:

    dot products    d_p = x[token_p] . table[row_p]               grad_x = sums by token of grad_d_p * table[row_p]
    weighted rows   y = sums by token of s_p * table[row_p]       grad_s_p = grad_y[token_p] . table[row_p]

and in both the table's gradient is the sums by row of a number times the token's row. So a pass over the pairs reads
rows of one table or writes those of its gradient; the other side is the tokens' few rows, which stay in the cache.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron import buffers
from megatron.config.schema import ACTIVATIONS, require
from megatron.moe.dispatch import permute
from megatron.moe.dispatch.plan import bincount_static
from megatron.moe.experts import backends
from megatron.moe.experts.activations import activate, is_gated

MOST_BLOCKS = 192
"""blocks of a larger number of experts; as 64 x 3 it can be shared out to 2, 3, 4, 6, 8, ... ranks"""
PEER_BACKENDS = ("auto", "reference", "triton")
"""of `--moe-backend`: there are no grouped products here"""
IN_PLACE_BYTES = 8 * 2**20
"""sums of rows of this size and more are made in memory that is used again"""


def number_of_blocks(num_experts: int) -> int:
    """How many stacked blocks experts are kept in, whatever the sharding: each is a file in a checkpoint."""
    return num_experts if num_experts <= MOST_BLOCKS else math.gcd(num_experts, MOST_BLOCKS)


class PEERExperts(nn.Module):
    """All tiny experts of one rank: one row of D numbers per table, expert and hidden unit.

    `w_in` [N_local, W, D] and, for swiglu and geglu, `w_up` [N_local, W, D] read the token; `w_out` [N_local, W, D]
    writes, a row per hidden unit (a GroupedExperts.w2 transposed). They are views of the parameters w1, w3 and w2,
    [blocks here, experts of a block x W, D]: a million experts would be a million files in a checkpoint. Each block's
    weights are drawn from a generator of its own, so they do not depend on how the experts are sharded.

    Source: PEER (He 2024, "Mixture of A Million Experts"), where w_in is u and w_out v, and width > 1 an MLP.

    Args:
        num_experts, num_local: over all ranks, and on this one.
        first: global number of this rank's first expert.
        init_std: of w_in and w_up.
        output_std: of w_out.
        sparse_gradients: gradients of the tables are sparse tensors of the rows that were used, sorted and each once,
            as torch.optim.SparseAdam takes them. DeepSpeed's ZeRO wants dense ones.
        backend: reference (torch's operations), triton, or auto: see `choose_backend`.
    Raises:
        ValueError: unknown activation or backend, or blocks that cannot be shared out to so many ranks.
    """

    initialises_itself = True

    def __init__(
        self,
        num_experts: int,
        num_local: int,
        hidden_size: int,
        width: int,
        activation: str,
        *,
        first: int = 0,
        seed: int = 0,
        layer: int = 0,
        init_std: float = 0.02,
        output_std: float = 0.02,
        sparse_gradients: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        require(activation in ACTIVATIONS, "activation", activation, " ".join(ACTIVATIONS))
        self.num_local, self.width, self.activation = num_local, width, activation
        self.num_blocks, ranks = number_of_blocks(num_experts), num_experts // num_local
        require(
            self.num_blocks % ranks == 0,
            "--moe-expert-parallel-size",
            ranks,
            f"a divisor of {self.num_blocks}, the blocks that {num_experts} experts are kept in",
        )
        require(
            backend in PEER_BACKENDS,
            "--moe-backend",
            backend,
            f"{' '.join(PEER_BACKENDS)} for tables of neurons",
        )
        self.sparse_gradients, self.backend = sparse_gradients, backend
        per_block = num_experts // self.num_blocks
        stds = {
            "w1": init_std,
            "w2": output_std,
            **({"w3": init_std} if is_gated(activation) else {}),
        }
        for table, (name, std) in enumerate(stds.items()):
            stack = nn.Parameter(
                torch.empty(num_local // per_block, per_block * width, hidden_size)
            )
            self.register_parameter(name, stack)
            for block, rows in enumerate(
                () if stack.is_meta else stack.data, first // per_block
            ):
                rows.normal_(
                    0,
                    std,
                    generator=torch.Generator().manual_seed(
                        _block_seed(seed, layer, table, block)
                    ),
                )

    @property
    def w_in(self) -> Tensor:
        return self.w1.view(self.num_local, self.width, -1)

    @property
    def w_out(self) -> Tensor:
        return self.w2.view(self.num_local, self.width, -1)

    @property
    def w_up(self) -> Tensor | None:
        return (
            self.w3.view(self.num_local, self.width, -1) if is_gated(self.activation) else None
        )

    def forward(
        self, x_TD: Tensor, token_A: Tensor, expert_A: Tensor, weight_A: Tensor
    ) -> Tensor:
        """Weighted sum of each token's experts; the list may be empty, in any order, and repeats add up.

        Args:
            x_TD: token rows; the sums are taken over products in the tables' dtype, accumulated in fp32.
            token_A: int64 in [0, T).
            expert_A: int64 in [0, num_local).
            weight_A: fp32.
        Returns:
            [T, D] in x's dtype, repeatable bit for bit.
        """
        how = _How(
            *(_triton_kernels() if self._on_triton() else (_dots, _bag_sum)),
            self.sparse_gradients,
        )
        rows_TD = x_TD.to(self.w1.dtype).contiguous()
        pairs = TokenExpertPairs.of(token_A, expert_A, len(x_TD), self.num_local, self.width)
        inner = [
            _Dots.apply(rows_TD, stack, how, *pairs).view(-1, self.width)
            for stack in ([self.w1, self.w3] if is_gated(self.activation) else [self.w1])
        ]
        scale_AW = activate(self.activation, *inner) * weight_A.unsqueeze(1)
        return _WeightedRows.apply(self.w2, scale_AW.flatten(), how, *pairs).to(x_TD.dtype)

    def _on_triton(self) -> bool:
        return (
            choose_peer_backend(self.backend, self.w1.device.type, self.w1.dtype)[0] == "triton"
        )


def choose_peer_backend(requested: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """(reference or triton, why) for tables on this device type and of this dtype.

    Raises:
        ValueError: unknown, or not possible here.
    """
    require(
        requested in PEER_BACKENDS,
        "--moe-backend",
        requested,
        f"{' '.join(PEER_BACKENDS)} for tables of neurons",
    )
    name, why = backends.choose_expert_backend(requested, device, dtype)
    return (
        (name, why) if name == "triton" else ("reference", "torch's own operations on tables")
    )


class TokenExpertPairs(NamedTuple):
    """Which token's row meets which row of a table, sorted by row and sorted by token."""

    by_row_P: Tensor
    """positions in the list, sorted by row"""
    row_P: Tensor
    """row of each, rising"""
    token_P: Tensor
    """token of each"""
    by_token_P: Tensor | None
    """positions in the list, sorted by token; None: the list is, as from most gates"""
    row_by_token_P: Tensor
    """row of each"""
    token_offsets_T1: Tensor
    """where each token's pairs start in by_token_P; the last entry is P"""

    @staticmethod
    def of(
        token_A: Tensor, expert_A: Tensor, num_tokens: int, num_local: int, width: int
    ) -> TokenExpertPairs:
        token_P, row_P = token_A, expert_A
        if width > 1:
            token_P = token_A.repeat_interleave(width, output_size=len(token_A) * width)
            row_P = (
                expert_A.unsqueeze(1) * width + torch.arange(width, device=expert_A.device)
            ).flatten()
        sorted_row_P, by_row_P = _sort(row_P)
        sorted_token_P, by_token_P = (token_P, None) if _is_sorted(token_P) else _sort(token_P)
        if (
            len(token_P) and not token_P.is_cuda
        ):  # here it costs nothing, and the dot products do not look
            for numbers, size in (
                (sorted_token_P, num_tokens),
                (sorted_row_P, num_local * width),
            ):
                low, high = numbers[[0, -1]].tolist()
                assert low >= 0 and high < size, (
                    f"token or row numbers span [{low}, {high}], allowed [0, {size})"
                )
        token_offsets_T1 = torch.searchsorted(
            sorted_token_P, torch.arange(num_tokens + 1, device=token_P.device)
        )
        return TokenExpertPairs(
            by_row_P,
            sorted_row_P,
            token_P[by_row_P],
            by_token_P,
            _take(row_P, by_token_P),
            token_offsets_T1,
        )


@dataclass(frozen=True, slots=True)
class _How:
    """With what the two operations are computed, and how gradients of tables are stored."""

    dots: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(rows [T, D], table [R, D], token_P, row_P) -> [P]"""
    bag_sum: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(rows, order_P, bags_G1, weight_P) -> [G, D] in the dtype of the rows: as dispatch.bag_sum"""
    sparse: bool

    def pair_dots(self, rows_TD: Tensor, stack: Tensor, pairs: TokenExpertPairs) -> Tensor:
        """rows[token_p] . table[row_p]: [P] in the order of the list, fp32 or wider.

        Computed row by row of the table: the second pair of a row finds it in the cache, and rows that lie near each
        other are read one after the other.
        """
        sorted_P = self.dots(rows_TD, stack.flatten(0, -2), pairs.token_P, pairs.row_P)
        sorted_P = sorted_P.to(torch.promote_types(sorted_P.dtype, torch.float32))
        return torch.empty_like(sorted_P).index_copy_(0, pairs.by_row_P, sorted_P)

    def token_sums(self, stack: Tensor, scale_P: Tensor, pairs: TokenExpertPairs) -> Tensor:
        """sum over the token's pairs of scale * table[row]: [T, D]."""
        return self.bag_sum(
            stack.flatten(0, -2),
            pairs.row_by_token_P,
            pairs.token_offsets_T1,
            _take(scale_P, pairs.by_token_P),
        )

    def row_sums(
        self, rows_TD: Tensor, scale_P: Tensor, pairs: TokenExpertPairs, shape: torch.Size
    ) -> Tensor:
        """sum over the row's pairs of scale * rows[token]: the gradient of a table of this shape."""
        blocks, per_block, _ = shape
        scale_P = scale_P[pairs.by_row_P]
        if not self.sparse:
            bags_R1 = _bags(bincount_static(pairs.row_P, blocks * per_block))
            return self.bag_sum(rows_TD, pairs.token_P, bags_R1, scale_P).view(shape)
        row_U, count_U = pairs.row_P.unique_consecutive(return_counts=True)
        values_UD = self.bag_sum(rows_TD, pairs.token_P, _bags(count_U), scale_P)
        index_2U = row_U.new_empty(2, len(row_U))
        torch.div(row_U, per_block, rounding_mode="floor", out=index_2U[0])
        torch.remainder(row_U, per_block, out=index_2U[1])
        return torch.sparse_coo_tensor(
            index_2U, values_UD, shape, is_coalesced=True, check_invariants=False
        )


class _Dots(torch.autograd.Function):
    """rows[token_p] . table[row_p] of all pairs: [P]. It keeps no rows but the tokens'.

    One function for each table and not one for all: a gradient that a hook takes away is gone before the next is made.
    """

    @staticmethod
    def forward(ctx, rows_TD: Tensor, stack: Tensor, how: _How, *pairs: Tensor) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(rows_TD, stack, *pairs)
        return how.pair_dots(rows_TD, stack, TokenExpertPairs(*pairs))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_P: Tensor) -> tuple:
        rows_TD, stack, *pairs = ctx.saved_tensors
        pairs, (need_rows, need_stack, *_) = TokenExpertPairs(*pairs), ctx.needs_input_grad
        grad_rows = ctx.how.token_sums(stack, grad_P, pairs) if need_rows else None
        grad_stack = (
            ctx.how.row_sums(rows_TD, grad_P, pairs, stack.shape) if need_stack else None
        )
        return grad_rows, grad_stack, *(None,) * (1 + len(pairs))


class _WeightedRows(torch.autograd.Function):
    """sum over the token's pairs of scale_p * table[row_p]: [T, D] in the table's dtype."""

    @staticmethod
    def forward(ctx, stack: Tensor, scale_P: Tensor, how: _How, *pairs: Tensor) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(stack, scale_P, *pairs)
        return how.token_sums(stack, scale_P, TokenExpertPairs(*pairs))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor) -> tuple:
        stack, scale_P, *pairs = ctx.saved_tensors
        pairs, (need_stack, need_scale, *_) = TokenExpertPairs(*pairs), ctx.needs_input_grad
        grad_TD = grad_TD.contiguous()
        grad_scale = (
            ctx.how.pair_dots(grad_TD, stack, pairs).to(scale_P.dtype) if need_scale else None
        )
        grad_stack = (
            ctx.how.row_sums(grad_TD, scale_P, pairs, stack.shape) if need_stack else None
        )
        return grad_stack, grad_scale, *(None,) * (1 + len(pairs))


def _dots(rows_TD: Tensor, table_RD: Tensor, token_P: Tensor, row_P: Tensor) -> Tensor:
    """[P] in the dtype of both, accumulated in fp32. This is what torch has for the gradient of a bag's weights, and it
    reads both rows where they lie. The public sampled_addmm takes nearly twice its time, and no bf16."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_TD, table_RD, row_P, row_P, token_P, mode=0
    )


def _bag_sum(rows: Tensor, order_P: Tensor, bags_G1: Tensor, weight_P: Tensor) -> Tensor:
    """dispatch.bag_sum, but that large results go to memory that may have been used before: [G, D].

    173 MB of sums took 58 ms in fresh pages and 8 ms without. There is no such product for bf16, and to sum slices and
    copy each to its place costs as much as the pages, or more when other programs have the cores: threads meet twice
    for each slice.
    """
    num_bags, size, weight_P = len(bags_G1) - 1, rows.shape[1], weight_P.to(rows.dtype)
    exact = rows.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available()
    if rows.is_cuda or not exact or num_bags * size * rows.itemsize < IN_PLACE_BYTES:
        return permute.segment_sum(rows, order_P, bags_G1, weight_P)
    out_GD = buffers.empty((num_bags, size), rows.dtype, rows.device)
    return torch.addmm(
        out_GD, _csr(bags_G1, order_P, weight_P, len(rows)), rows, beta=0, out=out_GD
    )


def _csr(bags_G1: Tensor, order_P: Tensor, weight_P: Tensor, num_rows: int) -> Tensor:
    """The bags as a sparse matrix [G, rows]."""
    _announce_csr()
    return torch.sparse_csr_tensor(
        bags_G1, order_P, weight_P, (len(bags_G1) - 1, num_rows), check_invariants=False
    )


@cache
def _announce_csr() -> None:
    """Torch says once in a process that such tensors are new. All that is done with them here is one product, which the
    tests compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)


def _sort(index: Tensor) -> tuple[Tensor, Tensor]:
    """(sorted, positions), equal ones in their order.

    On a CPU by NumPy, on one thread. That takes as long as torch.sort on two, whose threads wait for each other dozens
    of times: when another program had the cores, it took longer than all the rest of a layer.
    """
    if index.is_cuda:
        return index.sort(stable=True)
    bits = len(index).bit_length()
    keys = index.numpy() << bits | np.arange(len(index))
    keys.sort()
    return torch.from_numpy(keys >> bits), torch.from_numpy(keys & (1 << bits) - 1)


def _is_sorted(index: Tensor) -> bool:
    """On CUDA False, unasked: a sort is cheaper than waiting for the device."""
    return not index.is_cuda and bool(np.all(index.numpy()[1:] >= index.numpy()[:-1]))


def _take(values: Tensor, order: Tensor | None) -> Tensor:
    return values if order is None else values[order]


def _bags(counts: Tensor) -> Tensor:
    """[G + 1]: where bags of these sizes start; the last entry is where the last one ends."""
    bags_G1 = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=bags_G1[1:])
    return bags_G1


def _triton_kernels() -> tuple[Callable, Callable]:
    from megatron.moe.experts.triton_grouped_gemm import weighted_combine
    from megatron.moe.peer.triton_lookup import triton_dots

    return triton_dots, weighted_combine


def _block_seed(seed: int, layer: int, table: int, block: int) -> int:
    """Of all blocks of a model no two agree in the low 32 bits, which are all that torch's CPU generator uses."""
    return (
        (((seed * 1_000_003 + layer) * 65_537 + block) * 3 + table + 1) * 2_654_435_761 % 2**63
    )
