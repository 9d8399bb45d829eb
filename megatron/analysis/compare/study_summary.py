"""Summary of a study: each configuration over its seeds, compared with the baseline."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.analysis.compare.cell_measures import ROUTING_METRICS, CellMeasures, Quartiles
from megatron.analysis.compare.matching import ExpertSizes, matched_sizes
from megatron.analysis.compare.results import MatchRule, StudyResults
from megatron.analysis.compare.seed_statistics import (
    PairedComparison,
    SeedStatistics,
    compare_pairs,
    detectable_difference,
    holm,
    pooled_std,
)
from megatron.analysis.curves import AXES, largest_common_position


@dataclass(frozen=True)
class ConfigurationSummary:
    """One configuration, which is a cell without its seed, over all of its seeds."""

    axes: dict[str, str]
    """label on each axis"""
    label: str
    """labels on the axes on which the study's configurations differ"""
    loss_by_seed: dict[int, float]
    """held-out loss at the end by seed; NaN for cells that are not part of the comparison"""
    final_loss: SeedStatistics
    """held-out loss at the end of the training"""
    equal_losses: dict[str, SeedStatistics]
    """by axis of AXES: held-out loss at the largest position that all cells of the group reach,
    interpolated between evaluations"""
    step_time_ms: Quartiles
    """over the logging intervals of all seeds"""
    routing: dict[str, SeedStatistics]
    """means of ROUTING_METRICS in the last part of the training"""
    parameters_total: int | None
    active_parameters: float
    """measured; mean over the seeds; NaN if none is known"""
    computing_experts: float
    """measured experts that compute something per token and MoE layer; mean over the seeds; NaN
    if there are none"""
    mismatches: tuple[str, ...]
    """how cells differ from the parameters that the study wants matched; without repetitions"""
    tuning: dict[str, Any] | None
    """flag, value, seed and losses of a tuned flag"""
    experts: ExpertSizes | None
    """number and width of the experts, from the flags; None: they are not both set"""
    matched: ExpertSizes | None = None
    """experts with which a configuration that is not matched would be, with the measured mean
    number of experts per token; None: it is matched, or the experts are not known"""
    is_baseline: bool = False
    comparison: PairedComparison | None = None
    """held-out loss at the end against the baseline's; None for a baseline, or without one"""
    corrected_p: float = math.nan
    """p-value of the comparison after Holm's correction over all comparisons of the study"""
    detectable: float = math.nan
    """difference that the comparison finds with probability POWER, before the correction, given
    the spread of all comparisons"""


@dataclass(frozen=True)
class ComparisonGroup:
    """Configurations with a common baseline: their labels on the other axes are equal."""

    label: str
    """those labels; empty if there is only one group"""
    configurations: tuple[ConfigurationSummary, ...]
    equal_positions: dict[str, float]
    """by axis of AXES: where losses are compared; NaN if a cell lacks the axis"""


@dataclass(frozen=True)
class StudySummary:
    """What a study found."""

    name: str
    held_out: str
    """kind of the rows of metrics.jsonl with the held-out loss"""
    baseline: dict[str, str]
    """labels of the baseline; empty: the study declares none"""
    groups: tuple[ComparisonGroup, ...]
    measures: tuple[CellMeasures, ...] = field(repr=False)
    """of each cell, in the order of the study"""
    pooled_std: float
    """standard deviation of paired differences over all comparisons; NaN: none has two pairs"""

    @property
    def configurations(self) -> list[ConfigurationSummary]:
        """The configurations of all groups."""
        return [found for group in self.groups for found in group.configurations]

    @property
    def left_out(self) -> list[CellMeasures]:
        """Cells that are not part of the comparison."""
        return [measure for measure in self.measures if measure.problem]


def summarize_study(results: StudyResults) -> StudySummary:
    """Summarize the results of a study, also while cells are missing.

    Raises:
        ValueError: scipy is not installed.
    """
    measures = [CellMeasures.of(cell, results.held_out) for cell in results]
    members: dict[tuple[str, ...], list[CellMeasures]] = defaultdict(list)
    for measure in measures:
        members[_group_key(measure, results)].append(measure)
    shown_axes = _axes_that_differ(measures)
    groups = [_summarize_group(group, results, shown_axes) for group in members.values()]
    groups = _with_matched_sizes(groups, results.match)
    if len(groups) == 1:
        groups = [replace(groups[0], label="")]
    spread = pooled_std(_comparisons(groups))
    return StudySummary(
        name=results.name,
        held_out=results.held_out,
        baseline=results.baseline,
        groups=_with_study_wide_results(groups, spread),
        measures=tuple(measures),
        pooled_std=spread,
    )


def _comparisons(groups: Sequence[ComparisonGroup]) -> list[PairedComparison]:
    return [
        found.comparison
        for group in groups
        for found in group.configurations
        if found.comparison is not None
    ]


def _with_study_wide_results(
    groups: Sequence[ComparisonGroup], spread: float
) -> tuple[ComparisonGroup, ...]:
    """Add to each comparison what depends on all comparisons of the study."""
    corrected = iter(holm([found.p_value for found in _comparisons(groups)]))
    complete = []
    for group in groups:
        configurations = []
        for found in group.configurations:
            if found.comparison is not None:
                detectable = detectable_difference(spread, found.comparison.n)
                found = replace(found, corrected_p=next(corrected), detectable=detectable)
            configurations.append(found)
        complete.append(replace(group, configurations=tuple(configurations)))
    return tuple(complete)


def _group_key(measure: CellMeasures, results: StudyResults) -> tuple[str, ...]:
    """Return the labels that a cell shares with its baseline."""
    if not results.baseline:
        return ()
    return tuple(
        label for axis, label in measure.cell.axes.items() if axis not in results.baseline
    )


def _axes_that_differ(measures: Sequence[CellMeasures]) -> list[str]:
    labels: dict[str, set[str]] = defaultdict(set)
    for measure in measures:
        for axis, label in measure.cell.axes.items():
            labels[axis].add(label)
    return [axis for axis, found in labels.items() if len(found) > 1] or list(labels)


def _summarize_group(
    measures: list[CellMeasures], results: StudyResults, shown_axes: list[str]
) -> ComparisonGroup:
    by_configuration: dict[tuple[str, ...], list[CellMeasures]] = defaultdict(list)
    for measure in measures:
        by_configuration[tuple(measure.cell.axes.values())].append(measure)
    curves = [measure.held_out for measure in measures if not measure.problem]
    positions = {axis: largest_common_position(curves, axis) for axis in AXES}
    found = [
        _summarize_configuration(seeds, positions, results, shown_axes)
        for seeds in by_configuration.values()
    ]
    baselines = [configuration for configuration in found if configuration.is_baseline]
    if baselines:
        found = [_compared(configuration, baselines[0]) for configuration in found]
    return ComparisonGroup(
        label=", ".join(_group_key(measures[0], results)),
        configurations=tuple(found),
        equal_positions=positions,
    )


def _summarize_configuration(
    seeds: list[CellMeasures],
    positions: dict[str, float],
    results: StudyResults,
    shown_axes: list[str],
) -> ConfigurationSummary:
    axes = seeds[0].cell.axes
    compared = [measure for measure in seeds if not measure.problem]
    equal_losses = {}
    for axis, position in positions.items():
        losses = [measure.held_out.at(axis, position) for measure in compared]
        equal_losses[axis] = SeedStatistics.of(losses)
    routing = {}
    for name in ROUTING_METRICS:
        routing[name] = SeedStatistics.of([measure.routing[name] for measure in compared])
    times_ms = [time_ms for measure in compared for time_ms in measure.step_times_ms]
    is_baseline = bool(results.baseline) and axes == {**axes, **results.baseline}
    return ConfigurationSummary(
        axes=axes,
        label=", ".join(axes[axis] for axis in shown_axes),
        loss_by_seed={measure.cell.seed: measure.final_loss for measure in seeds},
        final_loss=SeedStatistics.of([measure.final_loss for measure in compared]),
        equal_losses=equal_losses,
        step_time_ms=Quartiles.of(times_ms),
        routing=routing,
        parameters_total=seeds[0].cell.parameters_total,
        active_parameters=_mean_known([m.cell.active_parameters for m in compared]),
        computing_experts=_mean_known([m.cell.experts_per_token for m in compared]),
        mismatches=tuple(dict.fromkeys(filter(None, (m.cell.mismatch for m in seeds)))),
        experts=_expert_sizes(seeds[0].cell.flags),
        tuning=next((m.cell.tuning for m in seeds if m.cell.tuning is not None), None),
        is_baseline=is_baseline,
    )


def _expert_sizes(flags: dict[str, Any]) -> ExpertSizes | None:
    """Return the number and width of experts that flags of a cell set."""
    try:
        return ExpertSizes(int(flags["num-experts"]), int(flags["moe-ffn-hidden-size"]))
    except (KeyError, TypeError, ValueError):
        return None


def _with_matched_sizes(
    groups: Sequence[ComparisonGroup], match: MatchRule | None
) -> list[ComparisonGroup]:
    """Add, to configurations that are not matched, the experts with which they would be."""
    if match is None:
        return list(groups)
    known = [found for group in groups for found in group.configurations]
    by_axes = {tuple(found.axes.items()): found for found in known}
    complete = []
    for group in groups:
        configurations = []
        for found in group.configurations:
            reference = by_axes.get(tuple(match.reference_axes(found.axes).items()))
            if found.mismatches and reference is not None:
                found = replace(found, matched=_matched_to(reference, found))
            configurations.append(found)
        complete.append(replace(group, configurations=tuple(configurations)))
    return complete


def _matched_to(
    reference: ConfigurationSummary, found: ConfigurationSummary
) -> ExpertSizes | None:
    if reference.experts is None or found.experts is None:
        return None
    try:
        return matched_sizes(
            reference.experts, reference.computing_experts, found.computing_experts
        )
    except ValueError:
        # The means are not known, or no size fits.
        return None


def _mean_known(values: Sequence[float | None]) -> float:
    return SeedStatistics.of([value for value in values if value is not None]).mean


def _compared(
    configuration: ConfigurationSummary, baseline: ConfigurationSummary
) -> ConfigurationSummary:
    if configuration.is_baseline:
        return configuration
    comparison = compare_pairs(configuration.loss_by_seed, baseline.loss_by_seed)
    return replace(configuration, comparison=comparison)
