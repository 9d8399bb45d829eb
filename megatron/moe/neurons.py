"""Tiny experts as tables that are looked up: PEER's single neurons, and small MLPs of a few hidden units.

Letters: T tokens, D hidden, A assignments of a token to an expert, N_local experts on this rank, W hidden units of one
expert, R = N_local x W rows of a table, P = A x W pairs of an assignment and a hidden unit.

    y_t = sum over the assignments a of token t:  weight_a * sum_j act(w_in[e_a, j] . x_t) * w_out[e_a, j]

Grouped matrix products are no use when an expert sees a token or two, and A rows of width D are the memory to avoid: A
is over a hundred times T. So dot products are computed a slice at a time, and sums of rows are segment sums straight
from the table or from the tokens' rows, which never lay the rows side by side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.config.schema import ACTIVATIONS, require
from megatron.moe.dispatch import bag_sum, count
from megatron.moe.experts import activate, is_gated

MOST_BLOCKS = 192
"""blocks of a larger number of experts; as 64 x 3 it can be shared out to 2, 3, 4, 6, 8, ... ranks"""


def number_of_blocks(num_experts: int) -> int:
    """How many stacked blocks experts are kept in, whatever the sharding: each is a file in a checkpoint."""
    return num_experts if num_experts <= MOST_BLOCKS else math.gcd(num_experts, MOST_BLOCKS)


class NeuronExperts(nn.Module):
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
        budget_bytes: the most that gathered rows and their products may take at a time (at least one assignment's).
    Raises:
        ValueError: unknown activation, or blocks that cannot be shared out to so many ranks.
    """

    initialises_itself = True

    def __init__(self, num_experts: int, num_local: int, hidden_size: int, width: int, activation: str, *,
                 first: int = 0, seed: int = 0, layer: int = 0, init_std: float = 0.02, output_std: float = 0.02,
                 budget_bytes: int = 16 * 2**20):
        super().__init__()
        require(activation in ACTIVATIONS, "activation", activation, " ".join(ACTIVATIONS))
        self.num_local, self.width, self.activation = num_local, width, activation
        self.num_blocks, ranks = number_of_blocks(num_experts), num_experts // num_local
        require(self.num_blocks % ranks == 0, "--moe-expert-parallel-size", ranks,
                f"a divisor of {self.num_blocks}, the blocks that {num_experts} experts are kept in")
        self.budget_bytes = budget_bytes
        per_block = num_experts // self.num_blocks
        stds = {"w1": init_std, "w2": output_std, **({"w3": init_std} if is_gated(activation) else {})}
        for table, (name, std) in enumerate(stds.items()):
            stack = nn.Parameter(torch.empty(num_local // per_block, per_block * width, hidden_size))
            self.register_parameter(name, stack)
            for block, rows in enumerate(() if stack.is_meta else stack.data, first // per_block):
                rows.normal_(0, std, generator=torch.Generator().manual_seed(_block_seed(seed, layer, table, block)))

    @property
    def w_in(self) -> Tensor:
        return self.w1.view(self.num_local, self.width, -1)

    @property
    def w_out(self) -> Tensor:
        return self.w2.view(self.num_local, self.width, -1)

    @property
    def w_up(self) -> Tensor | None:
        return self.w3.view(self.num_local, self.width, -1) if is_gated(self.activation) else None

    def forward(self, x_TD: Tensor, token_A: Tensor, expert_A: Tensor, weight_A: Tensor) -> Tensor:
        """Weighted sum of each token's experts; the list may be empty, in any order, and repeats add up.

        Args:
            x_TD: token rows.
            token_A: int64 in [0, T).
            expert_A: int64 in [0, num_local).
            weight_A: fp32.
        Returns:
            [T, D] in x's dtype, repeatable bit for bit.
        """
        return _Neurons.apply(x_TD, weight_A, self.w_in, self.w_out, self.w_up, token_A, expert_A, self.activation,
                              self.budget_bytes)


class _Neurons(torch.autograd.Function):
    """The formula above. Between forward and backward it keeps two numbers per pair at most, and no rows."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_A: Tensor, w_in: Tensor, w_out: Tensor, w_up: Tensor | None, token_A: Tensor,
                expert_A: Tensor, activation: str, budget: int) -> Tensor:
        x_TD = x_TD.contiguous()
        gate_AW = _dots(x_TD, token_A, w_in, expert_A, budget)
        up_AW = None if w_up is None else _dots(x_TD, token_A, w_up, expert_A, budget)
        ctx.save_for_backward(x_TD, weight_A, w_in, w_out, w_up, token_A, expert_A, gate_AW, up_AW)
        ctx.activation, ctx.budget = activation, budget
        scale_AW = activate(activation, gate_AW, up_AW) * weight_A.unsqueeze(1)
        return _sum_by_token(w_out, scale_AW, token_A, expert_A, len(x_TD)).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor) -> tuple:
        x_TD, weight_A, w_in, w_out, w_up, token_A, expert_A, gate_AW, up_AW = ctx.saved_tensors
        need_x, need_weight, need_in, need_out, need_up = ctx.needs_input_grad[:5]
        grad_TD = grad_TD.contiguous()
        inner = [t.detach().requires_grad_() for t in (gate_AW, up_AW) if t is not None]
        with torch.enable_grad():
            hidden_AW = activate(ctx.activation, *inner)
        grad_x = grad_weight = grad_in = grad_out = grad_up = None
        pairs = _pairs_by_row(token_A, expert_A, w_in) if need_in or need_out or need_up else None
        if need_out:
            grad_out = _sum_by_row(grad_TD, hidden_AW.detach() * weight_A.unsqueeze(1), pairs, w_out)
        if need_x or need_weight or need_in or need_up:
            dots_AW = _dots(grad_TD, token_A, w_out, expert_A, ctx.budget)
            if need_weight:
                grad_weight = (dots_AW * hidden_AW.detach()).sum(1)
            grad_gate_AW, *rest = torch.autograd.grad(hidden_AW, inner, dots_AW * weight_A.unsqueeze(1))
            if need_in:
                grad_in = _sum_by_row(x_TD, grad_gate_AW, pairs, w_in)
            if need_up:
                grad_up = _sum_by_row(x_TD, rest[0], pairs, w_up)
            if need_x:
                grad_x = _sum_by_token(w_in, grad_gate_AW, token_A, expert_A, len(x_TD))
                if rest:
                    grad_x += _sum_by_token(w_up, rest[0], token_A, expert_A, len(x_TD))
        return grad_x, grad_weight, grad_in, grad_out, grad_up, None, None, None, None


def _dots(rows_TD: Tensor, token_A: Tensor, table: Tensor, expert_A: Tensor, budget: int) -> Tensor:
    """table[expert_a, j] . rows[token_a] as [A, W], accumulated in fp32 (fp64 for fp64), `budget` bytes at a time."""
    dtype = torch.promote_types(torch.promote_types(rows_TD.dtype, table.dtype), torch.float32)
    _, width, hidden_size = table.shape
    # The table's rows with their product, and the tokens' rows, take at most twice the product.
    step = max(1, budget // (2 * width * hidden_size * dtype.itemsize))
    dots_AW = torch.empty(len(token_A), width, dtype=dtype, device=table.device)
    for out, token, expert in zip(dots_AW.split(step), token_A.split(step), expert_A.split(step), strict=True):
        product = table.index_select(0, expert).to(dtype).mul_(rows_TD.index_select(0, token).unsqueeze(1))
        torch.sum(product, -1, out=out)
    return dots_AW


def _sum_by_token(table: Tensor, scale_AW: Tensor, token_A: Tensor, expert_A: Tensor, num_tokens: int) -> Tensor:
    """sum over the token's assignments and units j of scale[a, j] * table[expert_a, j]: [T, D]."""
    width = table.shape[1]
    by_token_A = token_A.argsort(stable=True)
    row_AW = expert_A[by_token_A].unsqueeze(1) * width + torch.arange(width, device=table.device)
    bags_T1 = _bags(token_A, num_tokens) * width
    return bag_sum(table.flatten(0, 1), row_AW.flatten(), bags_T1, scale_AW[by_token_A].flatten().to(table.dtype))


def _pairs_by_row(token_A: Tensor, expert_A: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs sorted by row of the table, the token of each, where each row's pairs start)."""
    num_local, width, _ = table.shape
    row_P = (expert_A.unsqueeze(1) * width + torch.arange(width, device=table.device)).flatten()
    by_row_P = row_P.argsort(stable=True)
    return by_row_P, token_A[by_row_P // width], _bags(row_P, num_local * width)


def _sum_by_row(rows_TD: Tensor, scale_AW: Tensor, pairs: tuple[Tensor, Tensor, Tensor], table: Tensor) -> Tensor:
    """sum over the pairs of each row of the table of scale * rows[token]: the table's gradient, in its shape."""
    by_row_P, token_P, bags_R1 = pairs
    return bag_sum(rows_TD, token_P, bags_R1, scale_AW.flatten()[by_row_P].to(rows_TD.dtype)).view_as(table)


def _bags(index: Tensor, size: int) -> Tensor:
    """Where each of 0 .. size - 1 starts in the sorted index; the last entry is the index's length."""
    return F.pad(count(index, size).cumsum(0), (1, 0))


def _block_seed(seed: int, layer: int, table: int, block: int) -> int:
    """Of all blocks of a model no two agree in the low 32 bits, which are all that torch's CPU generator uses."""
    return (((seed * 1_000_003 + layer) * 65_537 + block) * 3 + table + 1) * 2_654_435_761 % 2**63
