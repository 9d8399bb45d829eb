"""Loads of single optimizer steps, for the mean of their largest violations.

The loads of a step are complete when those of all ranks are added. They are kept on the
device and added up once per log line, so that no step waits for communication.

Shape suffixes: S optimizer steps, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.moe.count_metrics import max_violation
from megatron.moe.routing_details import MAX_LISTED_EXPERTS

MAX_KEPT_STEPS = 256
"""Steps whose loads are kept before they are added over ranks, also between log lines"""


class StepLoads:
    """The loads that one layer counted in each optimizer step since the last log line."""

    def __init__(self) -> None:
        self._load_E: list[Tensor] = []
        self._violation_sum = 0.0
        self._num_steps = 0

    def append(self, step_sums: dict[str, Tensor]) -> None:
        """Keep the loads of a step; nothing for a layer that did not run or is too large.

        Args:
            step_sums: `MoELayer.step_sums` of the completed step.
        """
        load_E = step_sums.get("load_E")
        if load_E is not None and len(load_E) <= MAX_LISTED_EXPERTS:
            self._load_E.append(load_E)

    @property
    def is_full(self) -> bool:
        """Whether `add` is due."""
        return len(self._load_E) >= MAX_KEPT_STEPS

    def sums(self) -> dict[str, Tensor]:
        """Return this rank's loads, [S, E], to be summed over ranks; empty without any."""
        if not self._load_E:
            return {}
        return {"step_loads": torch.stack(self._load_E)}

    def add(self, totals: dict[str, Tensor]) -> None:
        """Add the loads of all ranks: `sums`, summed. They are then no longer kept."""
        steps: Sequence[Tensor] = totals.get("step_loads", ())
        for load_E in steps:
            self._violation_sum += max_violation(load_E)
        self._num_steps += len(steps)
        self._load_E = []

    def pop_mean(self) -> float | None:
        """Return the mean MaxVio of the steps that were added, and forget them; None: none."""
        mean = None
        if self._num_steps:
            mean = self._violation_sum / self._num_steps
        self._violation_sum = 0.0
        self._num_steps = 0
        return mean
