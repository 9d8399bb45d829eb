"""Chart of what a model costs: bars by part of the model, one panel for each section."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
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
    """Draw the sections that have bars.

    Args:
        title: what the model is.
    Returns:
        A PNG file.
    """
    altair = import_optional("altair", "analysis", "--png")
    panels = [_panel(altair, section) for section in sections if section.chart_title]
    chart = altair.vconcat(*panels, title=title).resolve_scale(
        color="independent", y="independent"
    )
    chart = chart.configure_title(anchor="start", offset=8).configure_view(stroke=None)
    file = io.BytesIO()
    chart.save(file, format="png", scale_factor=_SCALE)
    return file.getvalue()


def _panel(altair: Any, section: CostSection) -> Any:
    """Return the stacked bars of one section, in the order of its parts."""
    bars = [bar for bar in section.bars() if bar.value]
    parts = list(dict.fromkeys(bar.part for bar in bars))
    series = list(dict.fromkeys(bar.series for bar in bars))
    order = {name: number for number, name in enumerate(series)}
    rows = [asdict(bar) | {"order": order[bar.series]} for bar in bars]
    return (
        altair.Chart(altair.Data(values=rows), title=section.chart_title)
        .mark_bar()
        .encode(
            x=altair.X("value:Q", title=None, axis=altair.Axis(format="~s")),
            y=altair.Y("part:N", title=None, sort=parts),
            color=altair.Color("series:N", title=None, sort=series),
            order=altair.Order("order:Q"),
        )
        .properties(width=_WIDTH, height=_ROW_HEIGHT * len(parts))
    )
