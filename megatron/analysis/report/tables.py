"""HTML of a report's text parts: summary, legend, table of runs, commands, problems."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.analysis.report.charts import dash_of
from megatron.analysis.report.finals import kind_title, last_loss, metric_median
from megatron.analysis.report.groups import RunGroup
from megatron.analysis.report.page import NUM_SERIES_COLOURS, escape
from megatron.analysis.report.runs import ReportRun
from megatron.analysis.report.words import (
    Statement,
    count_text,
    duration_text,
    loss_text,
    si_text,
)

MOST_LOSS_COLUMNS = 6


@dataclass(frozen=True)
class RunColumn:
    """One column of the table of runs."""

    title: str
    cell: Callable[[ReportRun], str]
    """text of a run's cell; '' where the run does not have it"""


def summary_list(statements: list[Statement]) -> str:
    """Return the summary, its numbers first."""
    items = [
        f"<li><b>{escape(line.figure)}</b> <span>{escape(line.text)}</span></li>"
        for line in statements
    ]
    return f'<ul class="summary">{"".join(items)}</ul>'


def legend_html(groups: list[RunGroup]) -> str:
    """Return the legend: one checkbox per group, which shows or hides it; '' for one group."""
    if len(groups) == 1:
        return ""
    entries = []
    for place, group in enumerate(groups):
        dash = " ".join(map(str, dash_of(place)))
        line = (
            f'<svg width="26" height="10" aria-hidden="true"><line x1="1" x2="25" y1="5" y2="5" '
            f'stroke="var(--series-{place % NUM_SERIES_COLOURS})" stroke-width="3" '
            f'stroke-dasharray="{dash}"/></svg>'
        )
        number = f" <small>({len(group)} runs)</small>" if len(group) > 1 else ""
        entries.append(
            f'<label><input type="checkbox" checked data-group="{escape(group.label)}">{line}'
            f"<span>{escape(group.label)}{number}</span></label>"
        )
    return (
        '<fieldset class="legend"><legend>Runs in the charts</legend>'
        f'<div class="entries">{"".join(entries)}</div></fieldset>'
    )


def legend_buttons(groups: list[RunGroup]) -> str:
    """Return the buttons that show and hide all groups; '' where the checkboxes are as quick."""
    if len(groups) < 3:
        return ""
    return (
        '<span class="buttons"><button type="button" id="show-all">Show all runs</button>'
        '<button type="button" id="hide-all">Hide all runs</button></span>'
    )


def run_table(groups: list[RunGroup], kinds: list[str]) -> str:
    """Return the table of all runs; columns that no run fills are left out."""
    runs = [(group, run) for group in groups for run in group.runs]
    columns = _columns(kinds)
    columns = [column for column in columns if _is_filled(column, runs)]
    has_groups = any(group.label != run.name for group, run in runs)
    head = ['<th scope="col" class="text">run</th>']
    if has_groups:
        head.append('<th scope="col" class="text">group</th>')
    head += [f'<th scope="col">{escape(column.title)}</th>' for column in columns]
    rows = []
    for group, run in runs:
        cells = [f'<th scope="row" title="{escape(run.source.path)}">{escape(run.name)}</th>']
        if has_groups:
            cells.append(f'<td class="text">{escape(group.label)}</td>')
        cells += [f"<td>{escape(column.cell(run) or '–')}</td>" for column in columns]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<div class="table" tabindex="0" role="region" aria-label="Table of runs"><table>'
        f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _is_filled(column: RunColumn, runs: list[tuple[RunGroup, ReportRun]]) -> bool:
    return any(column.cell(run) for _, run in runs)


def _columns(kinds: list[str]) -> list[RunColumn]:
    losses = [
        RunColumn(
            f"{kind_title(kind)} loss",
            lambda run, kind=kind: _number(loss_text, last_loss(run, kind)),
        )
        for kind in ("train", *kinds[:MOST_LOSS_COLUMNS])
    ]
    return [
        RunColumn("seed", lambda run: "" if run.seed is None else str(run.seed)),
        RunColumn("parameters", lambda run: _started_number(run, "total_parameters")),
        RunColumn("active per token", _active),
        RunColumn("tokens", lambda run: _end(run, "tokens_R", si_text)),
        RunColumn("iterations", lambda run: _end(run, "iteration_R", count_text)),
        *losses,
        RunColumn("experts/token", lambda run: _last(run, "experts_per_token")),
        RunColumn("load max/mean", lambda run: _last(run, "load_imbalance_max_over_mean")),
        RunColumn(
            "step, ms (median)",
            lambda run: _number(count_text, metric_median(run, "step_time_ms")),
        ),
        RunColumn(
            "tokens/s (median)",
            lambda run: _number(count_text, metric_median(run, "tokens_per_s")),
        ),
        RunColumn("training time", lambda run: _end(run, "seconds_R", duration_text)),
        RunColumn("training FLOPs", lambda run: _end(run, "flops_R", si_text)),
        RunColumn("ranks", lambda run: str(run.start("world_size") or "")),
        RunColumn("device", lambda run: str(run.start("device") or "")),
    ]


def _number(write: Callable[[float], str], value: float) -> str:
    return write(value) if math.isfinite(value) else ""


def _end(run: ReportRun, position: str, write: Callable[[float], str]) -> str:
    values_R = getattr(run.train, position)
    return write(float(values_R[-1])) if values_R is not None and len(values_R) else ""


def _last(run: ReportRun, metric: str) -> str:
    return _number(lambda value: f"{value:.3g}", run.train.last(metric))


def _started_number(run: ReportRun, key: str) -> str:
    value = run.start(key)
    return si_text(value) if isinstance(value, int | float) else ""


def _active(run: ReportRun) -> str:
    least = _started_number(run, "active_parameters_min")
    most = _started_number(run, "active_parameters_max")
    return least if least == most else f"{least} to {most}"


def command_list(runs: list[ReportRun]) -> str:
    """Return the exact commands of the runs, each with a button that copies it."""
    parts = []
    for run in runs:
        for row in run.starts:
            command = row.get("command")
            if not isinstance(command, list) or not command:
                continue
            number = len(parts)
            text = shlex.join(str(word) for word in command)
            parts.append(
                f'<details class="command"><summary>{escape(run.name)}'
                f"<small>{escape(_when(row))}</small></summary>"
                f'<button type="button" class="copy" data-copies="command-{number}">Copy</button>'
                f'<pre id="command-{number}" tabindex="0">{escape(text)}</pre></details>'
            )
    return "".join(parts)


def _when(row: dict[str, Any]) -> str:
    parts = []
    if row.get("iteration"):
        parts.append(f"resumed after iteration {count_text(row['iteration'])}")
    if row.get("started"):
        parts.append(f"started {row['started']}")
    if row.get("version"):
        parts.append(f"version {row['version']}")
    return f" {', '.join(parts)}" if parts else ""


def problem_list(found: list[tuple[ReportRun, list[str]]]) -> str:
    """Return the problems of runs that have some."""
    items = [
        f"<li><b>{escape(run.name)}</b>: {escape(' '.join(sentences))}</li>"
        for run, sentences in found
    ]
    return f'<ul class="problems">{"".join(items)}</ul>'


def option_list(choices: list[tuple[str, str]], selected: str = "") -> str:
    """Return the options of a select element from (value, title)."""
    parts = []
    for value, title in choices:
        mark = " selected" if value == selected else ""
        parts.append(f'<option value="{escape(value)}"{mark}>{escape(title)}</option>')
    return "".join(parts)


def select_control(element_id: str, label: str, choices: str) -> str:
    """Return a select element with its label; `choices` is the HTML of its options."""
    return (
        f'<label for="{element_id}"><span>{escape(label)}</span>'
        f'<select id="{element_id}">{choices}</select></label>'
    )
