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
        layer_sums: values of each layer by name; all layers have the same names and shapes.
        to_host: also copy the result to the CPU, in one copy.
    """
    names = list(layer_sums[0])
    shapes = [layer_sums[0][name].shape for name in names]
    rows = [_flatten(sums, names) for sums in layer_sums]
    totals = all_reduce_sum(torch.stack(rows), groups)
    if to_host:
        totals = totals.cpu()
    sizes = [shape.numel() for shape in shapes]
    reduced = []
    for row in totals:
        values = zip(names, row.split(sizes), shapes, strict=True)
        reduced.append({name: value.view(shape) for name, value, shape in values})
    return reduced


def _flatten(sums: dict[str, Tensor], names: list[str]) -> Tensor:
    """Concatenate these values to one row."""
    return torch.cat([sums[name].flatten() for name in names])


def entries_with_prefix(sums: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the gate's own entries by name: those with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in sums.items()
        if name.startswith(prefix)
    }
