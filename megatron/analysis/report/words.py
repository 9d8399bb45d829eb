"""The summary of a report in words, numbers first, and how numbers are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.analysis.compare.seed_statistics import CONFIDENCE, SeedStatistics
from megatron.analysis.report.finals import (
    final_loss,
    kind_title,
    metric_median,
)
from megatron.analysis.report.groups import RunGroup
from megatron.analysis.report.runs import ReportRun
from megatron.analysis.report.series import rows_of_kind

_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Statement:
    """One line of the summary."""

    figure: str
    """the number, with its unit where that is short"""
    text: str
    """what it is, as a sentence without the number"""


def si_text(value: float, digits: int = 3) -> str:
    """Write a number with an SI prefix: 819k, 1.2M; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    for factor, prefix in _SI:
        if abs(value) >= factor:
            return f"{value / factor:.{digits}g}{prefix}"
    return f"{value:.{digits}g}"


def count_text(value: float) -> str:
    """Write a number of things: 1,204; a dash for NaN."""
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def loss_text(value: float) -> str:
    """Write a loss with four decimals; a dash for NaN."""
    return f"{value:.4f}" if math.isfinite(value) else "–"


def duration_text(seconds: float) -> str:
    """Write a time: 42 s, 5.3 min, 3.1 h, 2.5 days; a dash for NaN."""
    if not math.isfinite(seconds):
        return "–"
    for least, unit, factor in ((259200, "days", 86400), (5400, "h", 3600), (90, "min", 60)):
        if seconds >= least:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def summary_statements(groups: list[RunGroup], kind: str) -> list[Statement]:
    """Return the statements of the summary.

    Args:
        kind: kind of the held-out loss; '': there is none, and the training loss counts.
    """
    runs = [run for group in groups for run in group.runs if not run.is_empty]
    statements = _loss_statements(groups, kind or "train")
    statements += _length_statements(runs)
    statements += _speed_statements(groups)
    return statements + _balance_statements(groups)


def _loss_statements(groups: list[RunGroup], kind: str) -> list[Statement]:
    found = [(group.label, final_loss(group, kind)) for group in groups]
    ranked = [(label, result) for label, result in found if result.n]
    ranked.sort(key=lambda item: item[1].mean)
    if not ranked:
        return [Statement("–", "no run has a loss that is a number in its last evaluation.")]
    title = kind_title(kind)
    if len(groups) == 1:
        return [_fallen_loss(groups[0], ranked[0][1], kind)]
    best_label, best = ranked[0]
    first = Statement(
        loss_text(best.mean),
        f"nats per token: the lowest final {title} loss, of {best_label}{_certainty(best)}.",
    )
    if len(ranked) == 1:
        return [first]
    next_label, second = ranked[1]
    last_label, last = ranked[-1]
    text = f"nats per token more for the second, {next_label}{_overlap(best, second)}"
    if len(ranked) > 2:
        text += f", and {loss_text(last.mean - best.mean)} more for the last, {last_label}"
    return [first, Statement(f"+{loss_text(second.mean - best.mean)}", f"{text}.")]


def _fallen_loss(group: RunGroup, final: SeedStatistics, kind: str) -> Statement:
    text = f"nats per token: the final {kind_title(kind)} loss{_certainty(final)}"
    tables = [rows_of_kind(run, kind) for run in group.runs]
    losses = [rows.values.get("loss") for rows in tables if rows is not None and len(rows) > 1]
    starts = [loss_R[0] for loss_R in losses if loss_R is not None and math.isfinite(loss_R[0])]
    if starts:
        text += f", after {loss_text(sum(starts) / len(starts))} in the first row"
    return Statement(loss_text(final.mean), f"{text}.")


def _certainty(result: SeedStatistics) -> str:
    if result.n < 2:
        return " (one run, so no interval)"
    percent = round(100 * CONFIDENCE)
    return (
        f" (mean of {result.n} runs; {percent}% confidence interval "
        f"{loss_text(result.low)} to {loss_text(result.high)})"
    )


def _overlap(first: SeedStatistics, second: SeedStatistics) -> str:
    """Say whether the intervals of two groups overlap, where both have one."""
    if first.n < 2 or second.n < 2:
        return ""
    if second.low <= first.high:
        return " (the confidence intervals overlap)"
    return " (the confidence intervals do not overlap)"


def _length_statements(runs: list[ReportRun]) -> list[Statement]:
    trained = [run.train for run in runs if len(run.train)]
    if not trained:
        return []
    tokens = [float(rows.tokens_R[-1]) for rows in trained]
    iterations = [float(rows.iteration_R[-1]) for rows in trained]
    text = f"training tokens in {_range(iterations, count_text)} iterations"
    seconds = [float(rows.seconds_R[-1]) for rows in trained if rows.seconds_R is not None]
    if seconds:
        text += f" and {_range(seconds, duration_text)}"
    if len(runs) > 1:
        text += f", in each of {len(trained)} runs"
    if min(tokens) < 0.99 * max(tokens):
        text += ": final losses compare runs of different length, so compare the curves"
    return [Statement(_range(tokens, si_text), f"{text}.")]


def _speed_statements(groups: list[RunGroup]) -> list[Statement]:
    speeds = []
    for group in groups:
        values = [metric_median(run, "tokens_per_s") for run in group.runs]
        values = [value for value in values if math.isfinite(value)]
        if values:
            speeds.append((sum(values) / len(values), group))
    if not speeds:
        return []
    speeds.sort(key=lambda item: -item[0])
    fastest, group = speeds[0]
    text = f"tokens per second (median){_machine(group.runs[0])}"
    if len(speeds) > 1:
        slowest, slow_group = speeds[-1]
        text += (
            f" with {group.label}, the fastest; {count_text(slowest)} with {slow_group.label}"
        )
    return [Statement(count_text(fastest), f"{text}.")]


def _machine(run: ReportRun) -> str:
    ranks = run.start("world_size")
    device = run.start("device")
    if not ranks or not device:
        return ""
    where = "the CPU" if device == "cpu" else device
    return f" on {ranks} {'rank' if ranks == 1 else 'ranks'} ({where})"


def _balance_statements(groups: list[RunGroup]) -> list[Statement]:
    metric = "load_imbalance_max_over_mean"
    loads = []
    for group in groups:
        lasts = [run.train.last(metric) for run in group.runs if not run.is_empty]
        lasts = [value for value in lasts if math.isfinite(value)]
        if lasts:
            loads.append((sum(lasts) / len(lasts), group.label))
    if not loads:
        return []
    loads.sort()
    text = "times the mean load goes to the busiest expert at the end (mean over layers)"
    if len(loads) > 1:
        text += f" with {loads[0][1]}, the most even; {loads[-1][0]:.2f} with {loads[-1][1]}"
    return [Statement(f"{loads[0][0]:.2f}", f"{text}.")]


def _range(values: list[float], write) -> str:
    low = write(min(values))
    high = write(max(values))
    return low if low == high else f"{low} to {high}"
