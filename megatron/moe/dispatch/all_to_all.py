"""All-to-all of token rows between the ranks that share the experts.

Shape suffixes: R rows received by this rank, E experts on this rank, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.first_order import first_order_only
from megatron.host_allocator import empty_cached
from megatron.moe.dispatch.plan import AllToAllSplits, PermutedTokens, exclusive_cumsum


@dataclass
class AllToAllState:
    """Tensors in flight to other ranks and, in the backward pass, their gradients."""

    input_splits: list[int]
    """rows sent to each rank"""
    output_splits: list[int]
    """rows received from each rank"""
    group: dist.ProcessGroup
    pending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)
    """unfinished communication with the tensor that it reads, which must stay alive"""
    grads: tuple[Tensor, ...] = ()
    """gradients being received"""

    def start(
        self, tensors: tuple[Tensor, ...], input_splits: list[int], output_splits: list[int]
    ) -> tuple[Tensor, ...]:
        """Start sending rows; return the tensors that receive those of other ranks."""
        received = []
        for tensor in tensors:
            shape = (sum(output_splits), *tensor.shape[1:])
            out = empty_cached(shape, tensor.dtype, tensor.device)
            source = tensor.contiguous()
            work = dist.all_to_all_single(
                out, source, output_splits, input_splits, group=self.group, async_op=True
            )
            self.pending.append((work, source))
            received.append(out)
        return tuple(received)

    def wait(self) -> None:
        """Wait for all communication in flight."""
        for work, _ in self.pending:
            work.wait()
        self.pending.clear()


# Autograd runs the backward of `_Finish` first and that of `_Start` last. So `_Finish`
# starts sending the gradients back and `_Start` waits for them: what was computed
# between the two overlaps with communication in the backward pass as well.


class _Start(torch.autograd.Function):
    """Start sending rows. The outputs are undefined until `_Finish` has waited."""

    @staticmethod
    def forward(ctx, state: AllToAllState, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.state = state
        return state.start(tensors, state.input_splits, state.output_splits)

    @staticmethod
    @first_order_only
    def backward(ctx, *grads: Tensor) -> tuple:
        state = ctx.state
        state.wait()
        received = state.grads
        state.grads = ()
        return None, *received


class _Finish(torch.autograd.Function):
    """Wait for the rows that `_Start` sent. Backward starts sending their gradients."""

    @staticmethod
    def forward(ctx, state: AllToAllState, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.state = state
        state.wait()
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @first_order_only
    def backward(ctx, *grads: Tensor) -> tuple:
        # Autograd checks gradients against the shape of the received rows, but the
        # tensors that `_Start` must return have the shape of the sent rows. So they
        # travel in the state, and what is returned here only satisfies the shape check.
        state = ctx.state
        state.grads = state.start(grads, state.output_splits, state.input_splits)
        return None, *grads


class AllToAll:
    """A differentiable all-to-all with uneven splits that overlaps with computation.

    The constructor starts the communication and `finish` waits for it. Computation in
    between overlaps with it, and its backward pass overlaps with the communication of
    the gradients.

    Args:
        tensors: each with sum(input_splits) rows, sorted by destination rank.
        input_splits: rows sent to each rank.
        output_splits: rows received from each rank.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        input_splits: list[int],
        output_splits: list[int],
        group: dist.ProcessGroup,
    ):
        self._state = AllToAllState(input_splits, output_splits, group)
        self._in_flight = _Start.apply(self._state, *tensors)

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for the rows of each tensor, and return them sorted by source rank."""
        return _Finish.apply(self._state, *self._in_flight)


def sort_received_by_expert(splits: AllToAllSplits) -> PermutedTokens:
    """Return the permutation from received order (rank, expert) to expert order."""
    received_PE = splits.received_PE
    num_rows = sum(splits.output_splits)
    row_R1 = torch.arange(num_rows + 1, device=received_PE.device)
    starts_EP = exclusive_cumsum(received_PE.flatten()).view_as(received_PE).t().flatten()
    lengths_EP = received_PE.t().flatten()
    shift_R = torch.repeat_interleave(
        starts_EP - exclusive_cumsum(lengths_EP), lengths_EP, output_size=num_rows
    )
    order_R = shift_R + row_R1[:-1]
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, row_R1[:-1])
    return PermutedTokens(
        source_index_S=order_R,
        token_S=order_R,
        unpermute_index_S=inverse_R,
        token_offsets_T1=row_R1,
        expert_offsets_E=received_PE.sum(0).cumsum(0),
    )
