"""Writes a study's summary to its folder: text, Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.analysis.compare.cell_measures import ROUTING_METRICS, CellMeasures
from megatron.analysis.compare.results import StudyResults
from megatron.analysis.compare.study_summary import (
    ConfigurationSummary,
    StudySummary,
    summarize_study,
)
from megatron.analysis.compare.summary_tables import summary_tables, verdict
from megatron.analysis.curves import AXES
from megatron.io.atomic_write import write_text


def write_summary(results: StudyResults, folder: str | Path) -> str:
    """Summarize a study, also while cells are missing, and write the summary into a folder.

    Writes summary.txt, summary.md, summary.json, summary.csv with a row per configuration, and
    cells.csv with a row per cell. Numbers that are not known are null in JSON and empty in CSV.

    Returns:
        The content of summary.txt, for the screen.

    Raises:
        ValueError: scipy is not installed.
        OSError: a file cannot be written.
    """
    summary = summarize_study(results)
    folder = Path(folder)
    text = summary_text(summary)
    write_text(folder / "summary.txt", text)
    write_text(folder / "summary.md", summary_markdown(summary))
    write_text(folder / "summary.json", json.dumps(summary_json(summary), indent=1) + "\n")
    write_text(folder / "summary.csv", _csv(map(_configuration_row, summary.configurations)))
    write_text(folder / "cells.csv", _csv(map(_cell_row, summary.measures)))
    return text


def summary_text(summary: StudySummary) -> str:
    """Return the summary for a terminal."""
    tables = [table.text() for table in summary_tables(summary)]
    return "\n\n".join([_headline(summary), *tables]) + "\n"


def summary_markdown(summary: StudySummary) -> str:
    """Return the summary as a Markdown page."""
    tables = [table.markdown() for table in summary_tables(summary)]
    return "\n".join([f"# Study {summary.name}", "", _headline(summary), "", *tables])


def _headline(summary: StudySummary) -> str:
    cells = len(summary.measures)
    used = cells - len(summary.left_out)
    baseline = ", ".join(f"{axis} {label}" for axis, label in summary.baseline.items())
    parts = [
        f"Study {summary.name}: {len(summary.configurations)} configurations; {used} of {cells} "
        f"cells have a held-out loss (rows of kind {summary.held_out})."
    ]
    if baseline:
        parts.append(f"Baseline: {baseline}.")
    for word, what in (
        ("lower", "Lower loss than the baseline"),
        ("higher", "Higher loss"),
        ("no", "No difference shown"),
    ):
        labels = [found.label for found in summary.configurations if verdict(found) == word]
        if labels:
            parts.append(f"{what}: {'; '.join(labels)}.")
    return " ".join(parts)


def summary_json(summary: StudySummary) -> dict[str, Any]:
    """Return the summary as JSON values; NaN is None."""
    return {
        "name": summary.name,
        "held_out": summary.held_out,
        "baseline": summary.baseline,
        "pooled_std_of_differences": _plain(summary.pooled_std),
        "groups": [_plain(dataclasses.asdict(group)) for group in summary.groups],
        "left_out": {measure.cell.cell_id: measure.problem for measure in summary.left_out},
    }


def _plain(value: Any) -> Any:
    """Replace floats that JSON lacks by None, and keys by text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _configuration_row(found: ConfigurationSummary) -> dict[str, Any]:
    row: dict[str, Any] = {
        "seeds": found.final_loss.n,
        "loss": found.final_loss.mean,
        "loss_std": found.final_loss.std,
        "loss_low": found.final_loss.low,
        "loss_high": found.final_loss.high,
        "is_baseline": found.is_baseline,
    }
    comparison = found.comparison
    row |= {
        "difference": comparison.difference if comparison else None,
        "difference_low": comparison.low if comparison else None,
        "difference_high": comparison.high if comparison else None,
        "p": comparison.p_value if comparison else None,
        "p_holm": found.corrected_p,
        "detectable_difference": found.detectable,
    }
    for axis in AXES:
        row[f"loss_at_equal_{axis}"] = found.equal_losses[axis].mean
    row |= {
        "step_time_ms": found.step_time_ms.median,
        "step_time_ms_q25": found.step_time_ms.low,
        "step_time_ms_q75": found.step_time_ms.high,
        "parameters_total": found.parameters_total,
        "active_parameters": found.active_parameters,
        "computing_experts": found.computing_experts,
        "mismatch": "; ".join(found.mismatches),
    }
    for name in ROUTING_METRICS:
        row[name] = found.routing[name].mean
    return _after_axes(found.axes, row)


def _cell_row(measure: CellMeasures) -> dict[str, Any]:
    cell = measure.cell
    row: dict[str, Any] = {
        "cell": cell.cell_id,
        "seed": cell.seed,
        "state": cell.state,
        "left_out": measure.problem,
        "loss": measure.final_loss,
    }
    for axis in AXES:
        row[axis] = measure.held_out.end(axis)
    row |= {
        "parameters_total": cell.parameters_total,
        "active_parameters": cell.active_parameters,
        "computing_experts": cell.experts_per_token,
        "mismatch": cell.mismatch,
    }
    for name in ROUTING_METRICS:
        row[name] = measure.routing[name]
    return _after_axes(cell.axes, row)


def _after_axes(axes: Mapping[str, str], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Put the labels in front of other columns; an axis named like one of these is axis_NAME."""
    labels = {}
    for name, label in axes.items():
        labels[f"axis_{name}" if name in columns else name] = label
    return {**labels, **columns}


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Format rows with equal keys as CSV; without rows it is empty."""
    rows = [_plain(row) for row in rows]
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
