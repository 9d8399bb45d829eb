"""The experts' MLPs, from token rows to weighted sums of outputs, in several backends.

    y_t = sum over the rows s of token t:  W2_e (weight_s * act(W1_e x_t) [* W3_e x_t])

The weight is applied between the matrix products: there it costs H numbers per row
instead of D, and its gradient does not need the outputs. Moving rows is expensive: an
MoE layer has the arithmetic of a dense layer but k times as many rows. The cpu backend
therefore gathers the rows of one expert at a time into a small buffer that stays in the
cache.

Shape suffixes: E experts, T tokens, S rows (one per assignment, sorted by expert), n
rows of one expert, D hidden, H expert width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.first_order import first_order_only
from megatron.host_allocator import empty_cached
from megatron.moe.dispatch.permute import PermuteTokens, UnpermuteTokens, segment_sum
from megatron.moe.dispatch.plan import PermutedTokens
from megatron.moe.experts.activations import Nonlinearity, activate, get_activation
from megatron.moe.experts.backends import choose_expert_backend
from megatron.moe.experts.grouped_linear import grouped_linear


def grouped_mlp(
    x_TD: Tensor,
    weight_S: Tensor,
    w1: Tensor,
    w3: Tensor | None,
    w2: Tensor,
    rows: PermutedTokens,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """Return the formula above: [T, D] in x's dtype, deterministic.

    Args:
        weight_S: fp32 (fp64 with fp64 rows), one per sorted row.
        w1, w3: [E, H, D]; w3 for gated activations only.
        w2: [E, D, H].
        rows: the assignments, sorted by expert.
        activation: a name of `megatron.moe.experts.activations`.
        backend: value of --moe-backend; see `megatron.moe.experts.backends`.
    Raises:
        ValueError: an unknown activation, or a backend that is unavailable here.
    """
    name, _ = choose_expert_backend(backend, x_TD.device.type, x_TD.dtype, tuple(w1.shape[1:]))
    if name == "cpu":
        return _CpuMLP.apply(x_TD, weight_S, w1, w3, w2, rows, activation)
    if name == "triton":
        from megatron.moe.experts.triton_mlp import triton_mlp

        return triton_mlp(x_TD, weight_S, w1, w3, w2, rows, activation)
    expert_offsets_E = rows.expert_offsets_E
    x_SD = PermuteTokens.apply(x_TD, rows)
    if name == "reference":
        num_rows = int(expert_offsets_E[-1])
        x_SD = x_SD[:num_rows]
        weight_S = weight_S[:num_rows]
    gate_SH = grouped_linear(x_SD, w1, expert_offsets_E, name)
    up_SH = None
    if w3 is not None:
        up_SH = grouped_linear(x_SD, w3, expert_offsets_E, name)
    hidden_SH = activate(activation, gate_SH, up_SH) * weight_S.to(x_TD.dtype).unsqueeze(1)
    y_SD = grouped_linear(hidden_SH, w2, expert_offsets_E, name)
    return UnpermuteTokens.apply(y_SD, None, rows)


class _CpuMLP(torch.autograd.Function):
    """One expert at a time, so that its rows stay in the cache between the products.

    Saved for backward are the inputs and the pre-activations [S, H]. Rows [S, D] exist
    only once at any time, on the way to the segment sum. Large tensors reuse memory.
    """

    @staticmethod
    def forward(
        ctx,
        x_TD: Tensor,
        weight_S: Tensor,
        w1: Tensor,
        w3: Tensor | None,
        w2: Tensor,
        rows: PermutedTokens,
        activation: str,
    ) -> Tensor:
        nonlinearity = get_activation(activation).nonlinearity
        counts = rows.counts()
        num_rows = sum(counts)
        _, width, hidden_size = w1.shape
        gate_SH = _empty(x_TD, num_rows, width)
        up_SH = None
        if w3 is not None:
            up_SH = _empty(x_TD, num_rows, width)
        y_SD = _empty(x_TD, num_rows, hidden_size)
        x_buffer = _empty(x_TD, max(counts), hidden_size)
        factor_S1 = weight_S.to(x_TD.dtype).unsqueeze(1)
        for e, s in _expert_slices(counts):
            x_nD = _gather(x_TD, rows.token_S[s], x_buffer)
            hidden_nH = nonlinearity.forward(torch.mm(x_nD, w1[e].t(), out=gate_SH[s]))
            if up_SH is not None:
                hidden_nH.mul_(torch.mm(x_nD, w3[e].t(), out=up_SH[s]))
            torch.mm(hidden_nH.mul_(factor_S1[s]), w2[e].t(), out=y_SD[s])
        ctx.rows = rows
        ctx.nonlinearity = nonlinearity
        ctx.counts = counts
        ctx.save_for_backward(x_TD, weight_S, w1, w3, w2, gate_SH, up_SH)
        return segment_sum(y_SD, rows.unpermute_index_S, rows.token_offsets_T1)

    @staticmethod
    @first_order_only
    def backward(ctx, grad_TD: Tensor) -> tuple:
        x_TD, weight_S, w1, w3, w2, gate_SH, up_SH = ctx.saved_tensors
        need_x, need_weight, need_w1, need_w3, need_w2 = ctx.needs_input_grad[:5]
        rows = ctx.rows
        grad_w1 = _gradient_stack(w1, need_w1, ctx.counts)
        grad_w3 = _gradient_stack(w3, need_w3, ctx.counts)
        grad_w2 = _gradient_stack(w2, need_w2, ctx.counts)
        grad_weight_S = None
        if need_weight:
            grad_weight_S = torch.zeros_like(weight_S)
        grad_x_SD = None
        if need_x:
            grad_x_SD = _empty(x_TD, len(gate_SH), x_TD.shape[1])
        x_buffer = _empty(x_TD, max(ctx.counts), x_TD.shape[1])
        grad_buffer = _empty(x_TD, max(ctx.counts), x_TD.shape[1])
        factor_S1 = weight_S.to(x_TD.dtype).unsqueeze(1)
        for e, s in _expert_slices(ctx.counts):
            grad_gate_nH, grad_up_nH = _hidden_gradients(
                ctx.nonlinearity,
                _gather(grad_TD, rows.token_S[s], grad_buffer),
                w2[e],
                gate_SH[s],
                _at(up_SH, s),
                factor_S1[s],
                _at(grad_w2, e),
                _at(grad_weight_S, s),
            )
            if need_x:
                torch.mm(grad_gate_nH, w1[e], out=grad_x_SD[s])
                if w3 is not None:
                    grad_x_SD[s].addmm_(grad_up_nH, w3[e])
            if need_w1 or need_w3:
                x_nD = _gather(x_TD, rows.token_S[s], x_buffer)
                if need_w1:
                    torch.mm(grad_gate_nH.t(), x_nD, out=grad_w1[e])
                if need_w3:
                    torch.mm(grad_up_nH.t(), x_nD, out=grad_w3[e])
        grad_x_TD = None
        if need_x:
            grad_x_TD = segment_sum(grad_x_SD, rows.unpermute_index_S, rows.token_offsets_T1)
        return grad_x_TD, grad_weight_S, grad_w1, grad_w3, grad_w2, None, None


def _hidden_gradients(
    nonlinearity: Nonlinearity,
    grad_nD: Tensor,
    w2_DH: Tensor,
    gate_nH: Tensor,
    up_nH: Tensor | None,
    factor_n1: Tensor,
    grad_w2_DH: Tensor | None,
    grad_weight_n: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return one expert's gradients of the pre-activations (gate, up).

    The gradients of w2 and of the weights are written to `grad_w2_DH` and
    `grad_weight_n` where these are given.
    """
    act_nH = nonlinearity.forward(gate_nH)
    hidden_nH = act_nH
    if up_nH is not None:
        hidden_nH = act_nH * up_nH
    grad_nH = torch.mm(grad_nD, w2_DH)
    if grad_weight_n is not None:
        torch.sum(grad_nH * hidden_nH, -1, dtype=grad_weight_n.dtype, out=grad_weight_n)
    if grad_w2_DH is not None:
        torch.mm(grad_nD.t(), hidden_nH * factor_n1, out=grad_w2_DH)
    grad_nH.mul_(factor_n1)
    if up_nH is None:
        return nonlinearity.backward(grad_nH, gate_nH), None
    grad_up_nH = act_nH.mul_(grad_nH)
    return nonlinearity.backward(grad_nH.mul_(up_nH), gate_nH), grad_up_nH


def _expert_slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield (expert, slice of its rows) for every expert that has rows."""
    start = 0
    for expert, length in enumerate(counts):
        if length:
            yield expert, slice(start, start + length)
        start += length


def _gradient_stack(stack: Tensor | None, needed: bool, counts: list[int]) -> Tensor | None:
    """Allocate the gradient of stacked weights; zero that of experts without rows."""
    if not needed:
        return None
    grad = empty_cached(stack.shape, stack.dtype, stack.device)
    for expert, length in enumerate(counts):
        if length == 0:
            grad[expert].zero_()
    return grad


def _at(tensor: Tensor | None, index: int | slice) -> Tensor | None:
    """Index a tensor that may be missing."""
    if tensor is None:
        return None
    return tensor[index]


def _gather(x_TD: Tensor, token_n: Tensor, buffer: Tensor) -> Tensor:
    return torch.index_select(x_TD, 0, token_n, out=buffer[: len(token_n)])


def _empty(like: Tensor, *shape: int) -> Tensor:
    return empty_cached(shape, like.dtype, like.device)
