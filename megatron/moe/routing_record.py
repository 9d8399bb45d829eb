"""Records the assignments of a model's MoE layers during forward passes.

Shape suffixes: T positions of all recorded passes, padding included, A assignments,
C choices (routed and zero-computation experts).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron.moe.dispatch.plan import DispatchPlan
from megatron.moe.layer import MoELayer
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.routing import GateInput, Routing


@dataclass
class RoutingRecord:
    """Assignments of one layer, before capacity, over the recorded forward passes."""

    num_choices: int
    """routed and zero-computation experts, C"""
    num_positions: int = 0
    """T: the positions of the passes are numbered one after the other"""
    _parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, inp: GateInput, routing: Routing, plan: DispatchPlan) -> None:
        """Append a routing; see `megatron.moe.layer.RoutingObserver`."""
        token_A = routing.token_A + self.num_positions
        # A copy: the weights belong to the graph of the forward pass.
        part = (token_A, routing.expert_A.clone(), routing.weight_A.detach().clone())
        self._parts.append(part)
        self.num_positions += len(inp.x_TD)

    def assignments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (token_A, expert_A, weight_A): int64, int64, fp32, sorted by token."""
        columns = [torch.cat(parts) for parts in zip(*self._parts, strict=True)]
        order_A = columns[0].argsort(stable=True)
        token_A, expert_A, weight_A = (column[order_A] for column in columns)
        return token_A, expert_A, weight_A


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[RoutingRecord]]:
    """Record the assignments of each MoE layer of a model, in order, while the context is open.

    Recomputed passes are not recorded again.

    Raises:
        RuntimeError: a layer is being recorded already.
    """
    layers = find_moe_layers(model)
    records = [RoutingRecord(_num_choices(layer)) for layer in layers]
    with ExitStack() as stack:
        for layer, record in zip(layers, records, strict=True):
            if layer.routing_observer is not None:
                raise RuntimeError("the routing of this model is being recorded already")
            layer.routing_observer = record
            stack.callback(setattr, layer, "routing_observer", None)
        yield records


def _num_choices(layer: MoELayer) -> int:
    return layer.gate.num_experts + len(layer.gate.zero_computation_experts)
