"""The sums that MoE layers count, added over ranks; for gate updates and for metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron.moe.layer import MoELayer
from megatron.parallel.groups import Groups, all_reduce_sum


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Return the MoE layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def all_reduce_layer_sums(
    layer_sums: Sequence[dict[str, Tensor]], groups: Groups, *, to_host: bool = False
) -> list[dict[str, Tensor]]:
    """Sum each layer's values over all ranks: one fp64 all-reduce.

    Args:
        layer_sums: values of each layer by name. Layers may differ in names and shapes, as
            layers with different gates do; the ranks' values of one layer may not.
        to_host: also copy the result to the CPU, in one copy.
    """
    # Sorted, because gates may fill in their metrics in another order on another rank.
    layer_sums = [dict(sorted(sums.items())) for sums in layer_sums]
    flat = [value.flatten() for sums in layer_sums for value in sums.values()]
    totals = all_reduce_sum(torch.cat(flat), groups)
    if to_host:
        totals = totals.cpu()
    rows = iter(totals.split([len(row) for row in flat]))
    reduced = []
    for sums in layer_sums:
        reduced.append({name: next(rows).view(value.shape) for name, value in sums.items()})
    return reduced


def entries_with_prefix(sums: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the gate's own entries by name: those with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in sums.items()
        if name.startswith(prefix)
    }
