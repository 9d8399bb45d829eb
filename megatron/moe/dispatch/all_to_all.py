"""The all-to-all of expert parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron import buffers
from megatron.moe.dispatch.plan import AllToAllSplits, PermutedTokens, exclusive_cumsum


@dataclass
class AllToAllState:
    """Tensors on their way to other ranks and, in the backward pass, their gradients on the way back."""

    send: list[int]
    """rows to each rank"""
    receive: list[int]
    """rows from each rank"""
    group: dist.ProcessGroup
    pending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)
    """each with what it reads, which must live as long"""
    grads: tuple[Tensor, ...] = ()
    """gradients on their way back"""

    def start(
        self, tensors: tuple[Tensor, ...], send: list[int], receive: list[int]
    ) -> tuple[Tensor, ...]:
        received = []
        for t in tensors:
            out, t = (
                buffers.empty((sum(receive), *t.shape[1:]), t.dtype, t.device),
                t.contiguous(),
            )
            self.pending.append(
                (
                    dist.all_to_all_single(
                        out, t, receive, send, group=self.group, async_op=True
                    ),
                    t,
                )
            )
            received.append(out)
        return tuple(received)

    def wait(self) -> None:
        for work, _ in self.pending:
            work.wait()
        self.pending.clear()


class _Start(torch.autograd.Function):
    """Send rows off. What it returns is not there before `_Finish` has waited for it."""

    @staticmethod
    def forward(ctx, transfer: AllToAllState, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        return transfer.start(tensors, transfer.send, transfer.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple:
        transfer = ctx.transfer
        transfer.wait()
        back, transfer.grads = transfer.grads, ()
        return None, *back


class _Finish(torch.autograd.Function):
    """Wait for what `_Start` sent off. Backward sends the gradients off, for `_Start`'s to wait for."""

    @staticmethod
    def forward(ctx, transfer: AllToAllState, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        transfer.wait()
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple:
        # What autograd hands on must have the shapes of the rows here; those on their way go by the record.
        transfer = ctx.transfer
        transfer.grads = transfer.start(grads, transfer.receive, transfer.send)
        return None, *grads


class AllToAll:
    """An all-to-all of tensors' rows with uneven splits: starts when made, ends with `finish`.

    What is computed in between overlaps with it, and so does its backward pass with the gradients' way back.

    Args:
        tensors: each with sum(send) rows, sorted by rank.
        send, receive: rows to and from each rank.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        send: list[int],
        receive: list[int],
        group: dist.ProcessGroup,
    ):
        self.transfer = AllToAllState(send, receive, group)
        self.unfinished = _Start.apply(self.transfer, *tensors)

    def finish(self) -> tuple[Tensor, ...]:
        """What the other ranks sent, rank by rank."""
        return _Finish.apply(self.transfer, *self.unfinished)


def sort_received_by_expert(sizes: AllToAllSplits) -> PermutedTokens:
    """Rows as they came from the other ranks, as (source rank, expert), to be run through experts."""
    received_PE, num_rows = sizes.received_PE, sum(sizes.receive)
    places_R = torch.arange(num_rows + 1, device=received_PE.device)
    starts_EP = exclusive_cumsum(received_PE.flatten()).view_as(received_PE).t().flatten()
    lengths_EP = received_PE.t().flatten()
    shift_R = torch.repeat_interleave(
        starts_EP - exclusive_cumsum(lengths_EP), lengths_EP, output_size=num_rows
    )
    order_R = shift_R + places_R[:-1]
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, places_R[:-1])
    return PermutedTokens(order_R, order_R, inverse_R, places_R, received_PE.sum(0).cumsum(0))
