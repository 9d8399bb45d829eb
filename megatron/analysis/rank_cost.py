"""What a step needs on a rank, for the fewest and the most experts that a token may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.analysis.ceilings import Ceilings
from megatron.analysis.rank_parameters import Topology
from megatron.analysis.step_time import PlannedSection, memory_sections
from megatron.config.schema import RunConfig
from megatron.model.flops import ExpertUse, ModelFlops


@dataclass(frozen=True)
class RankCostSection:
    """One kind of cost of a rank, at both ends of what is known about the experts per token."""

    fewest: PlannedSection
    """with the fewest experts"""
    most: PlannedSection
    """with the most experts; the same as `fewest` where their number is known"""
    experts_per_token: tuple[float, float]
    """mean over tokens and layers, of the fewest and of the most"""

    @property
    def name(self) -> str:
        """Key in the JSON file."""
        return self.most.name

    @property
    def chart_title(self) -> str:
        """Title of the chart."""
        return self.most.chart_title

    def text(self) -> str:
        """Return the section for the most experts, and one line for the fewest."""
        if self.fewest is self.most:
            return self.most.text()
        fewest, most = self.experts_per_token
        return (
            f"with {most:.4g} routed experts per token, the most\n{self.most.text()}\n"
            f"with {fewest:.4g}, the fewest: {self.fewest.summary}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "fewest_experts": self.fewest.to_dict(),
            "most_experts": self.most.to_dict(),
        }

    def chart_rows(self) -> list[tuple[str, str, float]]:
        """Return the numbers of the chart, for the most experts."""
        return self.most.chart_rows()


def rank_cost_sections(
    config: RunConfig,
    vocab_size: int,
    topology: Topology,
    flops: ModelFlops,
    uses: Sequence[ExpertUse],
    ceilings: Ceilings | None = None,
) -> list[RankCostSection]:
    """Return memory and communication of a rank and, with ceilings, the time of a step.

    Args:
        vocab_size: before padding.
        flops: of the model on one rank that holds all experts.
        uses: the experts per token, or those with the fewest and with the most.

    Raises:
        ValueError: the flags do not fit the number of ranks.
    """
    means = [_mean(use.routed) for use in uses]
    columns = []
    for use, experts_per_token in zip(uses, means, strict=True):
        columns.append(
            memory_sections(
                config,
                vocab_size,
                topology,
                experts_per_token,
                flops_by_part=flops.computed(use),
                ceilings=ceilings,
            )
        )
    sections = []
    for fewest, most in zip(columns[0], columns[-1], strict=True):
        sections.append(RankCostSection(fewest, most, (means[0], means[-1])))
    return sections


def _mean(numbers: Sequence[float]) -> float:
    """Return the mean; 0 for a model without MoE layers."""
    return sum(numbers) / len(numbers) if numbers else 0.0
