"""Floating-point operations of a gate, counted while it runs on a few tokens.

A gate may multiply its tokens by any matrices, and may come from outside the tree, so nothing
is assumed about its parameters. A copy with weights of its own runs forward and backward on the
CPU for two numbers of tokens, and the difference is the cost per token. What does not depend on
the tokens, such as products of the router's weight with itself in a loss, is not part of it.

A product of matrices [a, b] and [b, c] is 2 a b c operations. Others are not counted, as in
`torch.utils.flop_counter`, whose import takes 0.4 s because it imports Triton.

Shape suffixes: T tokens, D hidden, n rows of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.log import warn_on_rank0
from megatron.moe.gate import Gate
from megatron.moe.routing import GateInput, Routing

_FEWER_TOKENS = 8
_MORE_TOKENS = 16


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass and of its backward pass, per token or another unit."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Operations of both passes."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __sub__(self, other: Flops) -> Flops:
        return Flops(self.forward - other.forward, self.backward - other.backward)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.backward * factor)

    @staticmethod
    def of_matrix(num_weights: int, *, trained: bool = True) -> Flops:
        """Return the operations of one product of a row and a matrix with so many weights.

        The backward pass has one such product for the gradient of the row, and another one
        for that of the weights if they are trained.
        """
        forward = 2.0 * num_weights
        return Flops(forward, forward * (1 + trained))


@dataclass(frozen=True)
class GateFlops:
    """Operations of one gate."""

    routing: Flops
    """per token"""
    zero_computation: Flops
    """per assignment to a zero-computation expert, the mean over these experts"""
    carry: Callable[[int], Tensor] | None = None
    """returns a carry for the next gate, given the number of tokens; None: it has none"""


class _ProductCounter(TorchDispatchMode):
    """Counts the operations of matrix products that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: else torch imports its compiler, for 2 s. It runs no compiled code."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = _FIRST_FACTOR.get(func.overloadpacket)
        if first is not None:
            # The shared size appears in one factor; the rest are the sizes of the result.
            columns = args[first + 1].shape[-1]
            self.flops += 2 * math.prod(args[first].shape) * columns
        return func(*args, **(kwargs or {}))


_FIRST_FACTOR = {
    torch.ops.aten.mm: 0,
    torch.ops.aten.bmm: 0,
    torch.ops.aten.addmm: 1,
    torch.ops.aten.baddbmm: 1,
}
"""Position of the first factor among the arguments of each matrix product"""


def count_gate(gate: Gate, carry: Callable[[int], Tensor] | None = None) -> GateFlops:
    """Count the operations of a gate of any device, also `meta`, in training.

    A gate that cannot run on the CPU is counted as if each token were multiplied by each of its
    matrices once, with a warning.

    Args:
        carry: returns what the previous gate with the same key carries, for a number of tokens.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return _count_copy(gate, carry)
    except Exception as error:
        warn_on_rank0(
            "the FLOPs of gate %s are estimated from its matrices, because a copy of it does "
            "not run on the CPU: %s: %s",
            type(gate).__name__,
            type(error).__name__,
            error,
        )
        weights = sum(p.numel() for p in gate.parameters() if p.dim() >= 2)
        return GateFlops(Flops.of_matrix(weights), Flops())


@torch.enable_grad()
def _count_copy(gate: Gate, carry: Callable[[int], Tensor] | None) -> GateFlops:
    copy = type(gate)(gate.config, gate.context)
    copy.warn_once = lambda message: None  # the gate of the model warns
    for parameter, original in zip(copy.parameters(), gate.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    fewer, _ = _run(copy, _FEWER_TOKENS, carry)
    more, routing = _run(copy, _MORE_TOKENS, carry)
    per_token = (more - fewer) * (1 / (_MORE_TOKENS - _FEWER_TOKENS))
    next_carry = None
    if routing.carry is not None:
        shape = routing.carry.shape[1:]
        dtype = routing.carry.dtype

        def next_carry(num_tokens: int) -> Tensor:
            return torch.randn(num_tokens, *shape, dtype=dtype)

    return GateFlops(per_token, _zero_computation(copy), next_carry)


def _run(
    gate: Gate, num_tokens: int, carry: Callable[[int], Tensor] | None
) -> tuple[Flops, Routing]:
    """Count a forward and a backward pass over random tokens of one sequence."""
    context = gate.context
    carried = None
    if carry is not None:
        carried = carry(num_tokens).requires_grad_()
    inp = GateInput(
        torch.randn(num_tokens, context.hidden_size).requires_grad_(),
        torch.arange(num_tokens) % (context.vocab_size or num_tokens),
        torch.zeros(num_tokens, dtype=torch.int64),
        carried,
        num_sequences=1,
    )
    with _ProductCounter() as forward:
        routing = gate(inp)
        losses = [term.loss() for term in routing.balance] + list(routing.losses.values())
        outputs = [routing.weight_A.sum(), routing.aux_loss, *losses]
        for tensor in (routing.carry, routing.logits_TE):
            if tensor is not None:
                outputs.append(tensor.sum())
    with _ProductCounter() as backward:
        _backward(outputs)
    return Flops(forward.flops, backward.flops), routing


def _zero_computation(gate: Gate) -> Flops:
    """Count the zero-computation experts of a gate on one row, and average over them."""
    total = Flops()
    experts: nn.ModuleList = gate.zero_computation_experts
    for expert in experts:
        x_nD = torch.randn(1, gate.context.hidden_size).requires_grad_()
        with _ProductCounter() as forward:
            y_nD = expert(x_nD)
        with _ProductCounter() as backward:
            _backward([y_nD.sum()])
        total = total + Flops(forward.flops, backward.flops)
    return total * (1 / max(1, len(experts)))


def _backward(outputs: list[Tensor]) -> None:
    """Run the backward pass of all 0-d outputs that have one."""
    differentiable = [output for output in outputs if output.requires_grad]
    if differentiable:
        torch.stack(differentiable).sum().backward()
