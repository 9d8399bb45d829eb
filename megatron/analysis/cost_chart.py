"""Chart of what a model costs: bars by part of the model, one panel for each section."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from megatron.analysis.model_cost import CostSection
from megatron.optional_packages import import_optional, require_package

_WIDTH = 520
_ROW_HEIGHT = 24
_SCALE = 2.0
"""Pixels per point"""


def require_chart_packages(needed_by: str) -> None:
    """Check that charts can be drawn.

    Raises:
        ValueError: a package is missing; the message names the extra that installs it.
    """
    require_package("altair", "analysis", needed_by)
    require_package("vl_convert", "analysis", needed_by)


def cost_png(sections: Sequence[CostSection], title: str) -> bytes:
    """Draw the sections that have a number other than 0.

    Args:
        title: what the model is.
    Returns:
        A PNG file.
    """
    altair = import_optional("altair", "analysis", "--png")
    panels = []
    for section in sections:
        rows = [row for row in section.chart_rows() if row[2]]
        if rows:
            panels.append(_panel(altair, section.chart_title, rows))
    chart = altair.vconcat(*panels, title=title).resolve_scale(
        color="independent", y="independent"
    )
    chart = chart.configure_title(anchor="start", offset=8).configure_view(stroke=None)
    file = io.BytesIO()
    chart.save(file, format="png", scale_factor=_SCALE)
    return file.getvalue()


def _panel(altair: Any, title: str, rows: list[tuple[str, str, float]]) -> Any:
    """Return the stacked bars of one section, in the order of its parts."""
    parts = list(dict.fromkeys(part for part, _, _ in rows))
    series = list(dict.fromkeys(name for _, name, _ in rows))
    order = {name: number for number, name in enumerate(series)}
    values = []
    for part, name, value in rows:
        values.append({"part": part, "series": name, "value": value, "order": order[name]})
    return (
        altair.Chart(altair.Data(values=values), title=title)
        .mark_bar()
        .encode(
            x=altair.X("value:Q", title=None, axis=altair.Axis(format="~s")),
            y=altair.Y("part:N", title=None, sort=parts),
            color=altair.Color("series:N", title=None, sort=series),
            order=altair.Order("order:Q"),
        )
        .properties(width=_WIDTH, height=_ROW_HEIGHT * len(parts))
    )
