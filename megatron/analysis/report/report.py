"""Write a report of runs: one HTML file with curves, load maps, final losses and commands.

Sections follow from the metrics that the runs have. A section whose metrics no run has is left
out, and a note says so.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron
from megatron.analysis.compare.seed_statistics import CONFIDENCE
from megatron.analysis.report import blocks, charts, maps, series, tables
from megatron.analysis.report.charts import CurveAxis, CurveColumns
from megatron.analysis.report.finals import (
    constant_value,
    held_out_kinds,
    kind_title,
    main_held_out_kind,
    metric_quantiles,
)
from megatron.analysis.report.groups import RunGroup, group_runs
from megatron.analysis.report.page import (
    PageContent,
    chart_figure,
    escape,
    read_asset,
    render_page,
)
from megatron.analysis.report.problems import run_problems
from megatron.analysis.report.runs import PROBE, TRAIN, ReportRun, read_run
from megatron.analysis.report.shown_metrics import (
    BALANCE,
    OPTIMIZATION,
    PROBE_METRICS,
    MetricCharts,
    count_metrics,
    gradient_parts,
)
from megatron.analysis.report.sources import RunSource
from megatron.analysis.report.words import summary_statements
from megatron.io.atomic_write import write_text

LOSS = CurveAxis("loss, nats per token", format=".4~f")
MOST_HISTORY_COLUMNS = 200
MOST_SHOWN_POINTS = 25
"""Points of a curve up to which each is drawn"""

SMOOTHED_FROM = 60
"""Points of a curve from which on it is smoothed at first"""


@dataclass(frozen=True)
class ReportOptions:
    """What a report is called."""

    title: str = ""
    """title of the page; empty: made from the runs"""


@dataclass
class _Draft:
    """The parts of a page, as the sections add them."""

    groups: list[RunGroup]
    unit: blocks.TimeUnit
    loss_points: int
    """points of a loss curve, at most"""
    metric_points: int
    """points of a curve of another metric, at most"""
    body: list[str] = field(default_factory=list)
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)
    datasets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    shared: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """metrics that no run has"""
    without_numbers: list[str] = field(default_factory=list)
    """metrics that are NaN in all rows"""
    constant: list[str] = field(default_factory=list)
    """metrics that never change, with their value"""
    rows_per_point: int = 1
    """rows that a point of a curve stands for, at most"""

    @property
    def labels(self) -> list[str]:
        """Labels of the groups, in the order of the legend."""
        return [group.label for group in self.groups]

    def section(
        self,
        title: str,
        explanation: str,
        figures: list[str],
        controls: str = "",
        is_large: bool = False,
    ) -> None:
        """Add a section, unless it has no figures; large ones have at most two columns."""
        figures = [figure for figure in figures if figure]
        if not figures:
            return
        tools = f'<div class="controls">{controls}</div>' if controls else ""
        kind = "charts pair" if is_large else "charts"
        self.body.append(
            f'<section><h2>{escape(title)}</h2><p class="explain">{escape(explanation)}</p>{tools}'
            f'<div class="{kind}">{"".join(figures)}</div></section>'
        )

    def curve(
        self, metric: str, title: str, axis: CurveAxis, kinds: Sequence[str] = (TRAIN,)
    ) -> str:
        """Add the curves of a metric, and return their figure; '' if no run has it."""
        most_points = self.loss_points if metric == "loss" else self.metric_points
        data = blocks.curve_data(self.groups, kinds, metric, self.unit, most_points)
        if data is None:
            is_recorded = series.is_recorded(self.groups, kinds, metric)
            (self.without_numbers if is_recorded else self.missing).append(metric)
            return ""
        is_held_out = not {TRAIN, PROBE} & {*kinds}
        chart_id = f"held-out-{metric}" if is_held_out else f"curve-{metric}"
        self.rows_per_point = max(self.rows_per_point, data.rows_per_point)
        columns = CurveColumns(
            positions=tuple(self.settings["positions"].items()),
            spread=data.has_spread,
            extremes=data.has_extremes,
            points=data.most_points <= MOST_SHOWN_POINTS,
            smooth=list(kinds) == [TRAIN],
        )
        self.charts[chart_id] = charts.curve_chart(chart_id, axis, columns)
        self.datasets[chart_id] = data.blocks
        self.shared |= data.shared
        return chart_figure(chart_id, title)


def write_report(
    sources: Sequence[RunSource],
    output: Path,
    options: ReportOptions | None = None,
    on_read: Callable[[int], object] = lambda count: None,
) -> list[ReportRun]:
    """Read runs and write their report.

    Args:
        sources: from `sources.find_runs`.
        on_read: called with 1 after each run.

    Returns:
        The runs of the report.

    Raises:
        ValueError: no run has a row, or the extra is not installed.
        OSError: the report cannot be written.
    """
    charts.altair()  # before minutes of reading
    runs = []
    for source in sources:
        runs.append(read_run(source, MOST_HISTORY_COLUMNS))
        on_read(1)
    write_text(output, report_html(runs, options or ReportOptions()))
    return runs


def report_html(runs: list[ReportRun], options: ReportOptions) -> str:
    """Return the HTML of a report.

    Raises:
        ValueError: no run has a row, or the extra is not installed.
    """
    shown = [run for run in runs if not run.is_empty]
    if not shown:
        files = ", ".join(str(run.source.path) for run in runs[:3])
        raise ValueError(
            f"no run has a training row or an evaluation (read: {files}); allowed: runs that have "
            "logged at least once, see --log-interval"
        )
    groups = group_runs(shown)
    kinds = held_out_kinds(groups)
    optimization = OPTIMIZATION | gradient_parts(shown)
    draft = _empty_draft(groups, shown, kinds, optimization)
    title = options.title or _title(groups)
    found = [(run, run_problems(run)) for run in runs]
    found = [(run, sentences) for run, sentences in found if sentences]
    draft.body.append(
        tables.summary_list(summary_statements(groups, main_held_out_kind(kinds)))
    )
    if found:
        draft.body.append(
            f'<section class="warning"><h2>{len(found)} of {len(runs)} runs need attention</h2>'
            f"{tables.problem_list(found)}</section>"
        )
    draft.body.append(_toolbar(draft))
    _loss_section(draft, kinds)
    _final_section(draft, kinds)
    _load_section(draft)
    _experts_section(draft)
    _metric_section(draft, "Routing and balance", _BALANCE_EXPLANATION, BALANCE)
    _metric_section(draft, "Changes of the routing", _PROBE_EXPLANATION, PROBE_METRICS, PROBE)
    _speed_section(draft)
    explanation = "Values of the last step of each row."
    _metric_section(draft, "Optimization", explanation, optimization)
    _table_section(draft, kinds)
    _command_section(draft, shown)
    return render_page(
        PageContent(
            title=title,
            body=_page_body(title, draft, runs),
            charts=draft.charts,
            datasets=draft.datasets,
            shared=draft.shared,
            settings=draft.settings,
            scripts=(read_asset("report.js"),),
            styles=(read_asset("report.css"),),
        )
    )


def _empty_draft(
    groups: list[RunGroup], runs: list[ReportRun], kinds: list[str], optimization: MetricCharts
) -> _Draft:
    """Return a draft without sections, with as many points as fit."""
    num_metrics = count_metrics(runs, BALANCE | PROBE_METRICS | optimization)
    unit = _time_unit(runs)
    draft = _Draft(
        groups,
        unit,
        series.points_of_losses(len(groups) * (1 + len(kinds))),  # and the training loss
        series.points_of_metrics(len(groups) * (1 + num_metrics)),  # and the throughput
    )
    draft.settings = {
        "positions": _positions(runs, unit),
        "groups": draft.labels,
        "dashes": [charts.dash_of(place) for place in range(len(groups))],
    }
    return draft


_BALANCE_EXPLANATION = (
    "Means over the MoE layers and the steps of each row of metrics.jsonl, over all ranks. "
    "docs/metrics.md defines them."
)


_PROBE_EXPLANATION = (
    "Means over the MoE layers, measured on the same held-out tokens each time. docs/metrics.md "
    "defines them."
)


def _time_unit(runs: list[ReportRun]) -> blocks.TimeUnit:
    ends = [run.train.seconds_R for run in runs if run.train.seconds_R is not None]
    return blocks.TimeUnit.of(
        max((float(end_R[-1]) for end_R in ends if len(end_R)), default=0.0)
    )


def _positions(runs: list[ReportRun], unit: blocks.TimeUnit) -> dict[str, str]:
    """Return the titles of the positions that some run has."""
    positions = {"iteration": "iteration", "tokens": "training tokens"}
    tables_of_rows = [run.train for run in runs] + [
        rows for run in runs for rows in run.held_out.values()
    ]
    if any(rows.flops_R is not None and len(rows) for rows in tables_of_rows):
        positions["flops"] = "training FLOPs"
    if any(rows.seconds_R is not None and len(rows) for rows in tables_of_rows):
        positions["time"] = f"training time, {unit.name}"
    return positions


def _title(groups: list[RunGroup]) -> str:
    labels = [group.label for group in groups]
    if len(labels) == 1:
        return f"Training report: {labels[0]}"
    if len(labels) <= 4:
        return f"Training report: {', '.join(labels)}"
    return f"Training report: {len(labels)} configurations"


def _page_body(title: str, draft: _Draft, runs: list[ReportRun]) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    number = f"{len(runs)} runs in {len(draft.groups)} groups" if len(runs) > 1 else "One run"
    lede = f"{number}. Written {now:%Y-%m-%d %H:%M} UTC by moe-megatron {megatron.__version__}."
    return (
        '<a class="skip" href="#content">Skip to the report</a>'
        f'<header><h1>{escape(title)}</h1><p class="lede">{escape(lede)}</p></header>'
        "<noscript><p>The charts need JavaScript; the tables do not.</p></noscript>"
        f'<main id="content">{"".join(draft.body)}</main>'
        f"<footer>{_notes(draft)}</footer>"
    )


def _notes(draft: _Draft) -> str:
    """Return how the data were reduced, and what is missing."""
    notes = []
    if draft.rows_per_point > 1:
        notes.append(
            f"Each point of a curve stands for up to {draft.rows_per_point} rows of "
            "metrics.jsonl: the line is their mean, the fainter band reaches from their minimum to "
            "their maximum."
        )
    if any(len(group) > 1 for group in draft.groups):
        notes.append(
            "Runs that differ in the seed only are one group: its line is the mean over the seeds "
            "at the same iteration, its band one standard deviation to both sides, the fainter "
            "band the range."
        )
    notes.append(
        "Training time is the time of the optimizer steps, without start-up, evaluations and "
        "checkpoints. Steps that a resumed run repeated count once."
    )
    if draft.constant:
        notes.append(f"The same in all rows, so without a chart: {', '.join(draft.constant)}.")
    if draft.missing:
        names = ", ".join(dict.fromkeys(draft.missing))
        notes.append(f"Left out, because no run has recorded it: {names}.")
    if draft.without_numbers:
        names = ", ".join(dict.fromkeys(draft.without_numbers))
        notes.append(f"Left out, because it is not a number in any row: {names}.")
    return "".join(f"<p>{escape(note)}</p>" for note in notes)


def _toolbar(draft: _Draft) -> str:
    positions = draft.settings["positions"]
    first = "tokens"
    choices = [(name, title) for name, title in positions.items()]
    axis = tables.option_list(choices, first)
    missing = {"flops": "training FLOPs", "time": "training time"}
    for name, title in missing.items():
        if name not in positions:
            axis += f'<option value="{name}" disabled>{title} (not recorded)</option>'
    longest = max((len(run.train) for group in draft.groups for run in group.runs), default=0)
    longest = min(longest, draft.loss_points)
    smoothing = tables.option_list(
        [("0", "off"), ("2", "5 points"), ("5", "11 points"), ("12", "25 points")],
        "2" if longest >= SMOOTHED_FROM else "0",
    )
    ranges = tables.option_list(
        [("all", "all values"), ("low", "lowest 80% of losses"), ("log", "logarithmic")]
    )
    return (
        '<div class="toolbar"><div class="controls">'
        f"{tables.select_control('axis', 'x axis', axis)}"
        f"{tables.select_control('range', 'y axis', ranges)}"
        f"{tables.select_control('smoothing', 'running mean', smoothing)}"
        f"{tables.legend_buttons(draft.groups)}</div>"
        f"{tables.legend_html(draft.groups)}</div>"
    )


def _loss_section(draft: _Draft, kinds: list[str]) -> None:
    figures = [draft.curve("loss", "Training loss", LOSS)]
    controls = ""
    if kinds:
        figures.append(draft.curve("loss", "Held-out loss", LOSS, kinds))
        choices = [(kind, kind_title(kind)) for kind in kinds]
        controls = tables.select_control(
            "held-out", "held-out set", tables.option_list(choices, main_held_out_kind(kinds))
        )
    explanation = "Cross-entropy per token in nats, without auxiliary losses."
    draft.section("Loss", explanation, figures, controls, is_large=True)


def _final_section(draft: _Draft, kinds: list[str]) -> None:
    data = blocks.final_blocks(draft.groups, kinds)
    if not data or sum(map(len, draft.groups)) == 1:  # the summary has the loss of a single run
        return
    draft.charts["final-loss"] = charts.interval_chart(
        "final-loss", draft.labels, LOSS, f"{CONFIDENCE:.0%} interval"
    )
    draft.datasets["final-loss"] = data
    figure = chart_figure("final-loss", "Loss in the last evaluation", wide=True)
    draft.section(
        "Final held-out loss",
        f"Filled: mean over the seeds; line: its {CONFIDENCE:.0%} confidence interval "
        "(Student's t, n − 1 degrees of freedom; none for a single run); rings: the runs. The set "
        "is the one selected above.",
        [figure],
    )


def _load_section(draft: _Draft) -> None:
    found = [run for group in draft.groups for run in group.runs if run.loads]
    if not found:
        draft.missing.append("load_by_expert")
        return
    has_masses = any(run.gate_masses for run in found)
    most_cells = maps.EXPERT_CELLS // (2 if has_masses else 1)
    chosen = maps.fitting_runs(found, most_cells)
    most_cells //= len(chosen)
    loads = maps.expert_maps([run.loads for run in chosen], most_cells)
    draft.charts["load"] = charts.expert_map_chart("load", "load")
    draft.datasets["load"] = loads.blocks
    figures = [chart_figure("load", "Load by expert and iteration", wide=not has_masses)]
    explanation = (
        "Load: assignments to each routed expert divided by the mean over the layer's experts; 1 "
        "is uniform."
    )
    reductions = _runs_left_out(found, chosen) + loads.reductions
    if has_masses:
        masses = maps.expert_maps([run.gate_masses for run in chosen], most_cells)
        draft.charts["gate-mass"] = charts.expert_map_chart("gate-mass", "gate mass")
        draft.datasets["gate-mass"] = masses.blocks
        figures.append(chart_figure("gate-mass", "Gate mass by expert and iteration"))
        explanation += " Gate mass: sum of their weights, divided likewise."
        reductions += masses.reductions
    else:
        draft.missing.append("gate_mass_by_expert")
    scale = "The colour scale ends at 1/8 and 8; a dead expert has the colour of 1/8."
    runs = tables.option_list([(str(i), run.name) for i, run in enumerate(chosen)])
    draft.section(
        "Load of the experts over training",
        " ".join([explanation, scale, *dict.fromkeys(reductions)]),
        figures,
        tables.select_control("load-run", "run", runs)
        + tables.select_control("load-layer", "MoE layer", ""),
        is_large=True,
    )


def _runs_left_out(found: list[ReportRun], chosen: list[ReportRun]) -> list[str]:
    if len(chosen) == len(found):
        return []
    return [f"Maps are of {len(chosen)} of {len(found)} runs."]


def _experts_section(draft: _Draft) -> None:
    figures = []
    explanation = [
        "Share of tokens that a number of experts process, after capacity, over all MoE layers."
    ]
    last = maps.last_histograms(draft.groups)
    if last.blocks:
        draft.charts["histogram"] = charts.histogram_chart("histogram", draft.labels)
        draft.datasets["histogram"] = last.blocks
        figures.append(chart_figure("histogram", "Experts per token in the last row"))
        explanation += last.reductions
    layers = blocks.experts_by_layer_blocks(draft.groups)
    if layers:
        axis = CurveAxis("mean experts per token")
        draft.charts["experts-by-layer"] = charts.layer_chart("experts-by-layer", axis)
        draft.datasets["experts-by-layer"] = layers
        figures.append(chart_figure("experts-by-layer", "Experts per token by layer, last row"))
    found = [run for group in draft.groups for run in group.runs if run.experts_per_token]
    controls = ""
    if found:
        chosen = maps.fitting_runs(found, maps.HISTOGRAM_CELLS)
        over_time = maps.histogram_maps(
            [run.experts_per_token for run in chosen], maps.HISTOGRAM_CELLS // len(chosen)
        )
        draft.datasets["histogram-map"] = over_time.blocks
        draft.charts["histogram-map"] = charts.histogram_map_chart("histogram-map")
        figures.append(
            chart_figure("histogram-map", "Experts per token over training", wide=True)
        )
        explanation += _runs_left_out(found, chosen) + over_time.reductions
        runs = tables.option_list([(str(i), run.name) for i, run in enumerate(chosen)])
        controls = tables.select_control("histogram-run", "run over training", runs)
    else:
        draft.missing.append("experts_per_token_histogram")
    draft.section("Experts per token", " ".join(explanation), figures, controls, is_large=True)


def _metric_section(
    draft: _Draft, title: str, explanation: str, metrics: MetricCharts, kind: str = TRAIN
) -> None:
    figures = []
    for metric, (name, axis) in metrics.items():
        value = constant_value(draft.groups, metric, kind)
        if value is None:
            figures.append(draft.curve(metric, name, axis, [kind]))
        else:
            draft.constant.append(f"{metric} ({value:g})")
    draft.section(title, explanation, figures)


def _speed_section(draft: _Draft) -> None:
    figures = [
        draft.curve("tokens_per_s", "Throughput", CurveAxis("tokens per second", True, "~s"))
    ]
    data = []
    for group in draft.groups:
        found = metric_quantiles(group, "step_time_ms", (0.1, 0.5, 0.9))
        if found:
            rows = sum(len(run.train) for run in group.runs)
            data.append(blocks.interval_block(group.label, found, rows))
    if data:
        draft.charts["step-time"] = charts.interval_chart(
            "step-time",
            draft.labels,
            CurveAxis("step time, ms"),
            "10th to 90th percentile",
            counted="training rows",
        )
        draft.datasets["step-time"] = data
        figures.append(chart_figure("step-time", "Step time: median, 10th to 90th percentile"))
    draft.section(
        "Throughput", "Of all ranks together, without evaluations.", figures, is_large=True
    )


def _table_section(draft: _Draft, kinds: list[str]) -> None:
    draft.body.append(
        "<section><h2>Runs</h2>"
        '<p class="explain">Losses are those of the last row of each kind.</p>'
        f"{tables.run_table(draft.groups, kinds)}</section>"
    )


def _command_section(draft: _Draft, runs: list[ReportRun]) -> None:
    commands = tables.command_list(runs)
    if commands:
        draft.body.append(f"<section><h2>Commands</h2>{commands}</section>")
    else:
        draft.missing.append("the command (rows of kind run)")
