"""Update of the gates' state after each optimizer step.

For example the expert biases of deepseek_v3, the L1 strength of remoe, and peer's statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.moe.gate import Gate
from megatron.moe.layer_sums import all_reduce_layer_sums, entries_with_prefix, find_moe_layers
from megatron.moe.routing import StepTotals
from megatron.parallel.groups import Groups


class GateUpdater:
    """Gives every gate the totals of a step, from which it updates its state.

    The layers count during the forward passes of a step (`MoELayer.step_sums`), before capacity
    drops anything. The counts are summed over micro-batches and ranks, so that all ranks update
    their gates alike.
    """

    def __init__(self, model: nn.Module, groups: Groups):
        self.layers = find_moe_layers(model)
        self.groups = groups
        for layer in self.layers:
            layer.sum_loads_over_step()
        self._any_gate_with_state = any(layer.gate.has_state for layer in self.layers)

    @torch.no_grad()
    def post_optimizer_step(self, skipped: bool = False) -> None:
        """Call `Gate.post_optimizer_step` of every layer, then clear the step's counts.

        One all-reduce; none if no gate of the model keeps state. The state of a frozen gate
        stays as it is: a bias or controller would otherwise change what frozen weights do.

        Args:
            skipped: the step changed no weights because a gradient or the loss was NaN or
                infinite; then it changes no gate's state either.
        """
        counted = [layer for layer in self.layers if layer.step_sums]
        if self._any_gate_with_state and counted and not skipped:
            sums = all_reduce_layer_sums([layer.step_sums for layer in counted], self.groups)
            _update_gates([layer.gate for layer in counted], sums)
        for layer in self.layers:
            layer.reset_step_state()


def _update_gates(gates: list[Gate], layer_sums: list[dict[str, Tensor]]) -> None:
    """Give each gate the totals of its layer, and the loads of all gates of its class."""
    loads = [sums["load_E"].float() for sums in layer_sums]
    for gate, sums, load_E in zip(gates, layer_sums, loads, strict=True):
        if gate.is_frozen:
            continue
        same_gate = [
            load
            for other, load in zip(gates, loads, strict=True)
            if type(other) is type(gate) and load.shape == load_E.shape
        ]
        metric_sums = entries_with_prefix(sums, "sum/")
        step_sums = entries_with_prefix(sums, "step/")
        num_tokens = sums["tokens"].float()
        gate.post_optimizer_step(
            StepTotals(load_E, num_tokens, metric_sums, torch.stack(same_gate), step_sums)
        )
