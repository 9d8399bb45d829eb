"""The experts' MLPs from token rows to weighted sums of outputs, in one function with several backends.

Shape suffixes: E experts, T tokens, S rows (tokens, once per expert they visit, sorted by expert), n rows of one expert,
D hidden, H expert width.

    y_t = sum over the rows s of token t:  W2_e (weight_s * act(W1_e x_t) [* W3_e x_t])

The weight is applied between the products: where it costs H numbers a row, not D, and where its gradient needs no
outputs. What moves rows costs more than it seems (a mixture's arithmetic is that of a dense layer, its rows are k times
as many), so on the CPU each expert's rows are gathered into one small buffer that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron import buffers
from megatron.moe.dispatch.permute import PermuteTokens, UnpermuteTokens, segment_sum
from megatron.moe.dispatch.plan import PermutedTokens
from megatron.moe.experts.activations import activate, nonlinearity, nonlinearity_backward
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
    """The formula above: [T, D] in x's dtype, deterministic.

    Args:
        weight_S: fp32 (fp64 with fp64 rows), aligned with the sorted rows.
        w1, w3: [E, H, D]; w3 for the gated activations only.
        w2: [E, D, H].
        backend: see `megatron.moe.experts.grouped_linear`.
    Raises:
        ValueError: a backend that is not possible here.
    """
    name, _ = choose_expert_backend(backend, x_TD.device.type, x_TD.dtype, tuple(w1.shape[1:]))
    if name == "cpu":
        return _CpuMLP.apply(x_TD, weight_S, w1, w3, w2, rows, activation)
    if name == "triton":
        from megatron.moe.experts import triton_mlp

        return triton_mlp.triton_mlp(x_TD, weight_S, w1, w3, w2, rows, activation)
    expert_offsets_E, x_SD = rows.expert_offsets_E, PermuteTokens.apply(x_TD, rows)
    if name == "reference":
        num_rows = int(expert_offsets_E[-1])
        x_SD, weight_S = x_SD[:num_rows], weight_S[:num_rows]
    gate_SH = grouped_linear(x_SD, w1, expert_offsets_E, name)
    up_SH = None if w3 is None else grouped_linear(x_SD, w3, expert_offsets_E, name)
    hidden_SH = activate(activation, gate_SH, up_SH) * weight_S.to(x_TD.dtype).unsqueeze(1)
    return UnpermuteTokens.apply(
        grouped_linear(hidden_SH, w2, expert_offsets_E, name), None, rows
    )


class _CpuMLP(torch.autograd.Function):
    """Expert by expert, with everything between the gather and the last product in the cache.

    Kept for backward are the inputs and the pre-activations [S, H]; rows [S, D] exist one at a time, on the way to the
    segment sum. All large tensors come from memory that is used again.
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
        ctx.rows, ctx.activation, ctx.counts = rows, activation, rows.counts()
        num_rows, (_, width, hidden_size) = sum(ctx.counts), w1.shape
        gate_SH = _empty(x_TD, num_rows, width)
        up_SH = None if w3 is None else _empty(x_TD, num_rows, width)
        y_SD, x_buffer = (
            _empty(x_TD, num_rows, hidden_size),
            _empty(x_TD, max(ctx.counts), hidden_size),
        )
        factor_S1 = weight_S.to(x_TD.dtype).unsqueeze(1)
        for e, s in _experts(ctx.counts):
            x_nD = _gather(x_TD, rows.token_S[s], x_buffer)
            hidden_nH = nonlinearity(activation, torch.mm(x_nD, w1[e].t(), out=gate_SH[s]))
            if up_SH is not None:
                hidden_nH.mul_(torch.mm(x_nD, w3[e].t(), out=up_SH[s]))
            torch.mm(hidden_nH.mul_(factor_S1[s]), w2[e].t(), out=y_SD[s])
        ctx.save_for_backward(x_TD, weight_S, w1, w3, w2, gate_SH, up_SH)
        return segment_sum(y_SD, rows.unpermute_index_S, rows.token_offsets_T1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor) -> tuple:
        x_TD, weight_S, w1, w3, w2, gate_SH, up_SH = ctx.saved_tensors
        need_x, need_weight, *need_stacks = ctx.needs_input_grad[:5]
        grads = [
            buffers.empty(w.shape, w.dtype, w.device) if need else None
            for w, need in zip((w1, w3, w2), need_stacks)
        ]
        grad_x_SD = _empty(x_TD, len(gate_SH), x_TD.shape[1]) if need_x else None
        grad_weight_S = torch.zeros_like(weight_S) if need_weight else None
        x_buffer, grad_buffer = (_empty(x_TD, max(ctx.counts), x_TD.shape[1]) for _ in range(2))
        factor_S1 = weight_S.to(x_TD.dtype).unsqueeze(1)
        for e, s in _experts(ctx.counts):
            token_n, stacks = ctx.rows.token_S[s], [None if g is None else g[e] for g in grads]
            grad_gate_nH, grad_up_nH = _backward_hidden(
                ctx.activation,
                _gather(grad_TD, token_n, grad_buffer),
                w2[e],
                gate_SH[s],
                None if up_SH is None else up_SH[s],
                factor_S1[s],
                stacks[2],
                None if grad_weight_S is None else grad_weight_S[s],
            )
            if need_x:
                torch.mm(grad_gate_nH, w1[e], out=grad_x_SD[s])
                if w3 is not None:
                    grad_x_SD[s].addmm_(grad_up_nH, w3[e])
            if stacks[0] is not None or stacks[1] is not None:
                x_nD = _gather(x_TD, token_n, x_buffer)
                for grad_nH, out in ((grad_gate_nH, stacks[0]), (grad_up_nH, stacks[1])):
                    if out is not None:
                        torch.mm(grad_nH.t(), x_nD, out=out)
        for empty in (e for e, n in enumerate(ctx.counts) if n == 0):
            for grad in grads:
                if grad is not None:
                    grad[empty].zero_()
        grad_x_TD = (
            segment_sum(grad_x_SD, ctx.rows.unpermute_index_S, ctx.rows.token_offsets_T1)
            if need_x
            else None
        )
        return grad_x_TD, grad_weight_S, *grads, None, None


def _backward_hidden(
    activation: str,
    grad_nD: Tensor,
    w2_DH: Tensor,
    gate_nH: Tensor,
    up_nH: Tensor | None,
    factor_n1: Tensor,
    grad_w2_DH: Tensor | None,
    grad_weight_n: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One expert's gradients of the pre-activations (gate, up); those of w2 and of the weights go where they belong."""
    act_nH = nonlinearity(activation, gate_nH)
    hidden_nH = act_nH if up_nH is None else act_nH * up_nH
    grad_nH = torch.mm(grad_nD, w2_DH)
    if grad_weight_n is not None:
        torch.sum(grad_nH * hidden_nH, -1, dtype=grad_weight_n.dtype, out=grad_weight_n)
    if grad_w2_DH is not None:
        torch.mm(grad_nD.t(), hidden_nH * factor_n1, out=grad_w2_DH)
    grad_nH.mul_(factor_n1)
    if up_nH is None:
        return nonlinearity_backward(activation, grad_nH, gate_nH), None
    grad_up_nH = act_nH.mul_(grad_nH)
    return nonlinearity_backward(activation, grad_nH.mul_(up_nH), gate_nH), grad_up_nH


def _experts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of those that have rows."""
    start = 0
    for expert, length in enumerate(counts):
        if length:
            yield expert, slice(start, start + length)
        start += length


def _gather(x_TD: Tensor, token_n: Tensor, buffer: Tensor) -> Tensor:
    return torch.index_select(x_TD, 0, token_n, out=buffer[: len(token_n)])


def _empty(like: Tensor, *shape: int) -> Tensor:
    return buffers.empty(shape, like.dtype, like.device)
