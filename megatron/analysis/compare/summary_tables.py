"""Tables of a study's summary, as text and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.analysis.compare.aligned_rows import aligned_rows
from megatron.analysis.compare.seed_statistics import CONFIDENCE, POWER, SeedStatistics
from megatron.analysis.compare.study_summary import (
    ComparisonGroup,
    ConfigurationSummary,
    StudySummary,
)

MISSING = "-"
"""what a table has in place of a number that is not known"""
UNITS = {"tokens": "tokens", "flops": "FLOP", "seconds": "s of training steps"}
"""Unit of each axis of megatron.analysis.curves.AXES"""


@dataclass(frozen=True)
class SummaryTable:
    """A table with a title above and notes below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the table with aligned columns: the first to the left, the others right."""
        lines = aligned_rows([self.header, *self.rows])
        return "\n".join([self.title, *lines, *self.notes])

    def markdown(self) -> str:
        """Return the table in Markdown, with the title as a heading of level 2."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [_markdown_row(cells) for cells in (self.header, rule, *self.rows)]
        notes = [f"{note}\n" for note in self.notes]
        return "\n".join([f"## {self.title}", "", *lines, "", *notes]).replace("+-", "±")


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def summary_tables(summary: StudySummary) -> list[SummaryTable]:
    """Return the tables of a summary; for each group those of losses, budgets and costs."""
    tables = []
    for group in summary.groups:
        suffix = f": {group.label}" if group.label else ""
        tables.append(_loss_table(summary, group, suffix))
        tables.append(_budget_table(group, suffix))
        tables.append(_cost_table(group, suffix))
    tables += _tuning_tables(summary)
    tables += _left_out_tables(summary)
    return tables


def _loss_table(summary: StudySummary, group: ComparisonGroup, suffix: str) -> SummaryTable:
    percent = f"{CONFIDENCE:.0%}"
    header = ["configuration", "seeds", "held-out loss", f"{percent} interval"]
    if summary.baseline:
        header += ["difference", f"{percent} interval", "p", "p (Holm)", "shown"]
    rows = []
    for found in group.configurations:
        row = [found.label, str(found.final_loss.n), mean_and_std(found.final_loss)]
        row.append(_interval(found.final_loss.low, found.final_loss.high))
        if summary.baseline:
            row += _comparison_cells(found)
        rows.append(tuple(row))
    return SummaryTable(
        title=f"Held-out loss at the end of training{suffix}",
        header=tuple(header),
        rows=tuple(rows),
        notes=tuple(_comparison_notes(summary, group)),
    )


def _comparison_cells(found: ConfigurationSummary) -> list[str]:
    if found.is_baseline:
        return ["baseline", *[MISSING] * 4]
    comparison = found.comparison
    if comparison is None:
        return [MISSING] * 5
    return [
        _number(comparison.difference, "+.4f"),
        _interval(comparison.low, comparison.high, "+.4f"),
        _number(comparison.p_value, ".3g"),
        _number(found.corrected_p, ".3g"),
        verdict(found),
    ]


def verdict(found: ConfigurationSummary) -> str:
    """Say in a word what a comparison with the baseline shows about the held-out loss."""
    if found.comparison is None or math.isnan(found.corrected_p):
        return MISSING
    if found.corrected_p >= 1 - CONFIDENCE:
        return "no"
    return "lower" if found.comparison.difference < 0 else "higher"


def _comparison_notes(summary: StudySummary, group: ComparisonGroup) -> list[str]:
    """Say what was compared and what the design can find."""
    notes = ["Losses are in nats per token: mean +- standard deviation over seeds."]
    if not summary.baseline:
        notes.append("The study declares no baseline, so no configurations are compared.")
        return notes
    compared = [found for found in group.configurations if found.comparison is not None]
    if not compared:
        reason = "No cell of the baseline belongs to this group"
        if any(found.is_baseline for found in group.configurations):
            reason = "Only the baseline belongs to this group"
        notes.append(f"{reason}, so nothing is compared.")
        return notes
    notes.append(
        "Differences from the baseline are tested over common seeds (Student's paired t-test, "
        "two-sided), with Holm's correction for all comparisons of the study. shown: whether "
        f"the loss is lower or higher at a corrected level of {1 - CONFIDENCE:.2f}."
    )
    few = [found.label for found in compared if found.comparison and found.comparison.n < 2]
    if few:
        notes.append(f"Too few common seeds for a test, which needs 2: {'; '.join(few)}.")
    for pairs in sorted({found.comparison.n for found in compared if found.comparison}):
        sizes = [found.detectable for found in compared if found.comparison.n == pairs]
        if not math.isnan(sizes[0]):
            notes.append(
                f"With {pairs} pairs, and paired differences with a standard deviation of "
                f"{summary.pooled_std:.4f} (pooled over the study), a test finds a difference "
                f"of {sizes[0]:.4f} with probability {POWER}, before the correction; smaller "
                "ones are likely to be missed."
            )
    return notes


def _budget_table(group: ComparisonGroup, suffix: str) -> SummaryTable:
    # Metrics of earlier versions have no FLOPs.
    axes = [
        axis for axis, position in group.equal_positions.items() if not math.isnan(position)
    ]
    header = ["configuration"]
    for axis in axes:
        header.append(f"at {_amount(group.equal_positions[axis])} {UNITS[axis]}")
    rows = []
    for found in group.configurations:
        losses = [mean_and_std(found.equal_losses[axis]) for axis in axes]
        rows.append((found.label, *losses))
    return SummaryTable(
        title=f"Held-out loss at equal tokens, FLOPs and time{suffix}",
        header=tuple(header),
        rows=tuple(rows),
        notes=(
            "Each column is at the largest amount that all cells reach, interpolated linearly "
            "between evaluations. A run that has more left at this point has not decayed its "
            "learning rate to the end, which raises its loss.",
        ),
    )


_COST_COLUMNS: tuple[tuple[str, Callable[[ConfigurationSummary], str]], ...] = (
    ("step time ms", lambda found: _number(found.step_time_ms.median, ".1f")),
    (
        "quartiles",
        lambda found: _interval(found.step_time_ms.low, found.step_time_ms.high, ".1f"),
    ),
    ("parameters", lambda found: _count(found.parameters_total)),
    ("active", lambda found: _count(found.active_parameters)),
    ("experts/token", lambda found: _number(found.computing_experts, ".2f")),
    ("MaxVio", lambda found: _mean(found, "max_violation", ".2f")),
    ("load CV", lambda found: _mean(found, "load_cv", ".2f")),
    ("dead experts", lambda found: _mean(found, "dead_expert_fraction", ".1%")),
    ("zero-computation", lambda found: _mean(found, "zero_computation_fraction", ".1%")),
    ("dropped", lambda found: _mean(found, "dropped_assignment_fraction", ".1%")),
)


def _cost_table(group: ComparisonGroup, suffix: str) -> SummaryTable:
    columns = []
    for name, show in _COST_COLUMNS:
        cells = [show(found) for found in group.configurations]
        if set(cells) != {MISSING}:
            columns.append((name, cells))
    names = [found.label for found in group.configurations]
    notes = [
        "Step times are medians over logging intervals; cells that run at the same time slow each "
        "other down. Metrics of routing are means over MoE layers in the last fifth of training."
    ]
    for found in group.configurations:
        notes += [f"Not matched: {found.label}: {mismatch}." for mismatch in found.mismatches]
        if found.matched is not None:
            notes.append(
                f"At its measured {found.computing_experts:.2f} experts per token, {found.label} "
                f"would be matched with {found.matched.num_experts} experts of width "
                f"{found.matched.width}."
            )
    return SummaryTable(
        title=f"Cost and balance{suffix}",
        header=("configuration", *(name for name, _ in columns)),
        rows=tuple(zip(names, *(cells for _, cells in columns), strict=True)),
        notes=tuple(notes),
    )


def _tuning_tables(summary: StudySummary) -> list[SummaryTable]:
    rows = []
    for found in summary.configurations:
        if found.tuning is None:
            continue
        losses = found.tuning.get("losses") or {}
        grid = ", ".join(f"{value}: {_loss(loss)}" for value, loss in losses.items())
        chosen = f"{found.tuning.get('value')}"
        seed = f"{found.tuning.get('seed')}"
        rows.append((found.label, f"--{found.tuning.get('flag')}", chosen, seed, grid))
    if not rows:
        return []
    header = ("configuration", "flag", "chosen", "on seed", "held-out loss by value")
    note = (
        "A value is chosen by the held-out loss of one seed, which slightly favours the tuned "
        "configurations on that seed."
    )
    return [SummaryTable("Tuned coefficients", header, tuple(rows), (note,))]


def _left_out_tables(summary: StudySummary) -> list[SummaryTable]:
    if not summary.left_out:
        return []
    rows = [(measure.cell.cell_id, measure.problem) for measure in summary.left_out]
    return [SummaryTable("Cells that are left out", ("cell", "reason"), tuple(rows))]


# Numbers


def mean_and_std(statistics: SeedStatistics) -> str:
    """Format a loss over seeds; the spread is missing for a single seed."""
    if math.isnan(statistics.std):
        return _number(statistics.mean, ".4f")
    return f"{statistics.mean:.4f} +- {statistics.std:.4f}"


def _mean(found: ConfigurationSummary, metric: str, form: str) -> str:
    return _number(found.routing[metric].mean, form)


def _number(value: float, form: str) -> str:
    return MISSING if math.isnan(value) else format(value, form)


def _interval(low: float, high: float, form: str = ".4f") -> str:
    if math.isnan(low) or math.isnan(high):
        return MISSING
    return f"{low:{form}} to {high:{form}}"


def _amount(number: float) -> str:
    """Format a number of tokens, FLOPs or seconds with two digits or more."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 10 * unit:
            return f"{number / unit:,.0f} {name}"
    return f"{number:,.0f}"


def _count(number: float | None) -> str:
    if number is None or math.isnan(number):
        return MISSING
    return f"{number / 1e6:.2f} M"


def _loss(loss: float | None) -> str:
    return "failed" if loss is None else f"{loss:.4f}"
