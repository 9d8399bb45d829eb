"""Reads the layers' counters, reduces them over ranks, and gives gates their step's loads. The one place that does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megatron.moe.gates import Gate
from megatron.moe.layer import MoELayer
from megatron.parallel.groups import Groups, all_reduce_sum


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The mixture layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, MoELayer)]


class MoEMetrics:
    """Collects what the mixture layers of a model counted.

    `after_step` once per optimizer step, `read` once per log line: one all-reduce each, and `after_step` has none
    when no gate asks for loads.
    """

    def __init__(self, model: nn.Module, groups: Groups):
        self.layers, self.groups = moe_layers(model), groups
        self._steppers = [m for m in self.layers if type(m.gate).post_step is not Gate.post_step]
        self._seen: dict[int, Tensor] = {}

    @torch.no_grad()
    def after_step(self) -> None:
        """Call `post_step` of each gate that has one with this step's loads, summed over ranks and micro-batches."""
        if not self._steppers:
            return
        totals = torch.stack([self._step_load(m) for m in self._steppers])
        all_reduce_sum(totals, self.groups)
        for layer, row in zip(self._steppers, totals, strict=True):
            layer.gate.post_step(row[1:], row[0])

    def _step_load(self, layer: MoELayer) -> Tensor:
        """[1 + E]: tokens and wanted load since the last step; the log interval's sums go on underneath."""
        sums = layer.counters[True]
        now = torch.cat([sums["tokens"].view(1), sums["wanted_C"][: layer.num_experts]])
        before = self._seen.get(id(layer), torch.zeros_like(now))
        self._seen[id(layer)] = now
        return now - before

    @torch.no_grad()
    def read(self, training: bool = True) -> dict[str, float | list[float]]:
        """Means over ranks and over all forwards since the last reading, which is then forgotten.

        Returns:
            experts_per_token_wanted / _kept (routed and local choices a token asked for / got), drop_fraction (of
            assignments), lost_token_fraction (tokens that lost a choice), load_imbalance_max_over_mean (of routed
            experts, kept, mean over layers), moe_aux_loss (mean over layers), the gate's stats, each also as a list
            `..._by_layer`, and kept_experts_histogram (share of tokens that got 0, 1, 2, ... experts). Empty
            without mixture layers or forwards.
        """
        if not self.layers or not self.layers[0].counters[training]:
            return {}
        names = list(self.layers[0].counters[training])
        sizes = [self.layers[0].counters[training][n].numel() for n in names]
        rows = torch.stack([torch.cat([m.counters[training][n].flatten() for n in names]) for m in self.layers])
        rows = all_reduce_sum(rows.double(), self.groups).cpu()
        for m in self.layers:
            m.counters[training].clear()
        if training:  # an evaluation between two log lines leaves the step's starting point alone
            self._seen.clear()
        return _summarise([dict(zip(names, row.split(sizes), strict=True)) for row in rows],
                          self.layers[0].num_experts)


def _summarise(layers: Iterable[dict[str, Tensor]], num_experts: int) -> dict[str, float | list[float]]:
    """Per-layer ratios of sums, and their means over layers."""
    by_layer: dict[str, list[float]] = {}
    histogram = torch.zeros(())
    for sums in layers:
        tokens, wanted, kept = sums["tokens"].sum(), sums["wanted_C"].sum(), sums["kept_C"].sum()
        load = sums["kept_C"][:num_experts]
        values = {
            "experts_per_token_wanted": wanted / tokens,
            "experts_per_token_kept": kept / tokens,
            "drop_fraction": (wanted - kept) / wanted,
            "lost_token_fraction": sums["lost_tokens"].sum() / tokens,
            "load_imbalance_max_over_mean": load.max() / load.mean(),
            "moe_aux_loss": sums["aux_loss"].sum() / sums["forwards"].sum(),
        }
        for name, value in sums.items():
            if name.startswith("stat/"):
                values[name.removeprefix("stat/")] = value.sum() / sums["forwards"].sum()
        for name, value in values.items():
            by_layer.setdefault(name, []).append(float(value))
        histogram = histogram + sums["kept_histogram"]
    means = {name: sum(v) / len(v) for name, v in by_layer.items()}
    return {**means, "kept_experts_histogram": (histogram / histogram.sum()).tolist(),
            **{f"{name}_by_layer": v for name, v in by_layer.items()}}
