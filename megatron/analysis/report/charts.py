"""Vega-Lite specifications of a report's charts. Their data are added by name (see page.py).

`usermeta` tells report.js what a control of the page changes in a chart:
`progress`: its x axis is the position in training, which the reader selects; `smooth`: the columns
that the smoothing replaces by running means; `groups`: its scales have all groups, and rows of
hidden groups are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.analysis.report.page import NUM_SERIES_COLOURS
from megatron.optional_packages import import_optional

CURVE_HEIGHT = 230
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4])
"""Dash patterns: groups beyond the colours repeat them with the next pattern"""


@dataclass(frozen=True)
class CurveAxis:
    """What the y axis of a curve shows."""

    title: str
    """name and unit"""
    starts_at_zero: bool = False
    format: str = ""
    """format of its labels, of d3-format; empty: that of Vega"""


def altair():
    """Return the module altair.

    Raises:
        ValueError: the extra `analysis` is not installed.
    """
    return import_optional("altair", "analysis", "a report")


def group_colour():
    """Return the colour channel of groups; report.js gives all charts one scale."""
    return altair().Color("group:N", legend=None)


def group_dash():
    """Return the dash channel of groups, like their colours."""
    return altair().StrokeDash("group:N", legend=None)


def dash_of(place: int) -> list[int]:
    """Return the dash pattern of the group at a place in the legend."""
    return DASHES[place // NUM_SERIES_COLOURS % len(DASHES)]


@dataclass(frozen=True)
class CurveColumns:
    """Which columns the data of a chart of curves have in addition to mean."""

    positions: tuple[tuple[str, str], ...]
    """(column, title) of the positions in training, for the tooltip"""
    spread: bool = False
    """low and high: a band around the mean"""
    extremes: bool = False
    """least and most: a fainter band"""
    points: bool = False
    """show the points: there are few, and a line of one point is invisible"""
    smooth: bool = True
    """whether the reader can smooth them; evaluations are means over many batches already"""


def curve_chart(dataset: str, axis: CurveAxis, columns: CurveColumns) -> dict[str, Any]:
    """Return curves of groups over the training.

    A point's mean is a line, the spread over seeds a band, and the extremes of the rows that the
    point stands for a fainter band.
    """
    alt = altair()
    x = alt.X(
        "iteration:Q",
        title="iteration",
        scale=alt.Scale(zero=True, nice=False),
        axis=number_axis("~s", tickCount=5),
    )
    scale = alt.Scale(zero=axis.starts_at_zero)
    y_axis = number_axis(axis.format, tickCount=6)
    colour = group_colour()
    base = alt.Chart().encode(x=x)

    def y(column: str) -> Any:
        return alt.Y(f"{column}:Q", title=axis.title, scale=scale, axis=y_axis)

    layers = []
    if columns.extremes:
        area = base.mark_area(opacity=0.13)
        layers.append(area.encode(y=y("least"), y2="most:Q", color=colour))
    if columns.spread:
        area = base.mark_area(opacity=0.25)
        layers.append(area.encode(y=y("low"), y2="high:Q", color=colour))
    line = base.mark_line(strokeWidth=1.75)
    layers.append(line.encode(y=y("mean"), color=colour, strokeDash=group_dash()))
    if columns.points:
        point = base.mark_point(size=26, filled=True, opacity=1)
        layers.append(point.encode(y=y("mean"), color=colour))
    # Invisible points, because a line has one tooltip for all of its points.
    hover = base.mark_point(size=250, filled=True, opacity=0)
    layers.append(
        hover.encode(y=y("mean"), color=colour, tooltip=_curve_tooltip(axis, columns))
    )
    usermeta = {"progress": True, "groups": True}
    if columns.smooth:
        usermeta["smooth"] = ["mean", *(["low", "high"] if columns.spread else [])]
    return _finished(alt.layer(*layers, data=alt.NamedData(dataset)), CURVE_HEIGHT, usermeta)


def _curve_tooltip(axis: CurveAxis, columns: CurveColumns) -> list[Any]:
    alt = altair()
    tooltip = [
        alt.Tooltip("group:N", title="run"),
        alt.Tooltip("mean:Q", title=axis.title, format=".5~g"),
    ]
    if columns.extremes:
        tooltip.append(alt.Tooltip("least:Q", title="minimum", format=".5~g"))
        tooltip.append(alt.Tooltip("most:Q", title="maximum", format=".5~g"))
    if columns.spread:
        tooltip.append(alt.Tooltip("seeds:Q", title="seeds"))
    for name, title in columns.positions:
        tooltip.append(alt.Tooltip(f"{name}:Q", title=title, format=".4~s"))
    return tooltip


def expert_map_chart(dataset: str, name: str) -> dict[str, Any]:
    """Return shares of a layer's experts over the training, relative to their mean.

    report.js sets its height and labels, which depend on the run and layer that it shows.

    Args:
        name: what the experts share, such as load.
    """
    title = f"{name} / mean {name}"
    alt = altair()
    colour = alt.Color(
        "log_relative:Q",
        title=title,
        scale=alt.Scale(domain=[-3, 3], domainMid=0, clamp=True, interpolate="rgb"),
        legend=alt.Legend(
            orient="bottom",
            gradientLength=220,
            values=[-3, -2, -1, 0, 1, 2, 3],
            labelExpr="datum.value < 0 ? '1/' + pow(2, -datum.value) : '' + pow(2, datum.value)",
        ),
    )
    chart = (
        alt.Chart(alt.NamedData(dataset))
        .transform_calculate(
            # The scale ends at 1/8 and 8; a share of 0 has no logarithm.
            log_relative="datum.relative > 0 ? clamp(log(datum.relative) / LN2, -3, 3) : -3",
            numbers=_numbers_of_row("expert"),
        )
        .mark_rect()
        .encode(
            x=_time_of_map(),
            x2="end:Q",
            y=alt.Y("expert:O", title="expert"),
            color=colour,
            tooltip=[
                alt.Tooltip("numbers:N", title="expert"),
                alt.Tooltip("relative:Q", title=title, format=".3~g"),
                alt.Tooltip("start:Q", title="after iteration"),
                alt.Tooltip("end:Q", title="to iteration"),
            ],
        )
    )
    return _finished(chart, CURVE_HEIGHT, {})


def histogram_map_chart(dataset: str) -> dict[str, Any]:
    """Return the distribution of experts per token over the training.

    report.js sets its height and labels.
    """
    alt = altair()
    chart = (
        alt.Chart(alt.NamedData(dataset))
        .transform_calculate(numbers=_numbers_of_row("experts"))
        .mark_rect()
        .encode(
            x=_time_of_map(),
            x2="end:Q",
            y=alt.Y("experts:O", title="experts per token", sort="descending"),
            color=alt.Color(
                "share:Q",
                title="share of tokens",
                scale=alt.Scale(domainMin=0, interpolate="rgb"),
                legend=alt.Legend(orient="bottom", gradientLength=220, format="~%"),
            ),
            tooltip=[
                alt.Tooltip("numbers:N", title="experts per token"),
                alt.Tooltip("share:Q", title="share of tokens", format=".3~%"),
                alt.Tooltip("start:Q", title="after iteration"),
                alt.Tooltip("end:Q", title="to iteration"),
            ],
        )
    )
    return _finished(chart, CURVE_HEIGHT, {})


def _numbers_of_row(column: str) -> str:
    """Return the expression of the numbers in a row, of which `last` is the last if it exists."""
    first = f"datum.{column}"
    return f"datum.last > {first} ? {first} + ' to ' + datum.last : '' + {first}"


def histogram_chart(dataset: str, labels: list[str]) -> dict[str, Any]:
    """Return the distribution of experts per token at the end of the training."""
    alt = altair()
    encoding = {
        "x": alt.X("experts:Q", title="experts per token", axis=alt.Axis(tickMinStep=1)),
        "y": alt.Y("share:Q", title="share of tokens", axis=number_axis("~%")),
        "color": group_colour(),
        "tooltip": [
            alt.Tooltip("group:N", title="run"),
            alt.Tooltip("numbers:N", title="experts per token"),
            alt.Tooltip("share:Q", title="share of tokens", format=".3~%"),
        ],
    }
    base = alt.Chart(alt.NamedData(dataset)).transform_calculate(
        numbers=_numbers_of_row("experts")
    )
    if len(labels) == 1:
        encoding["x"] = alt.X(
            "experts:O", title="experts per token", axis=alt.Axis(labelAngle=0)
        )
        return _finished(base.mark_bar().encode(**encoding), CURVE_HEIGHT, {"groups": True})
    line = base.mark_line(
        point=alt.OverlayMarkDef(size=35, filled=True), strokeWidth=1.5
    ).encode(strokeDash=group_dash(), **encoding)
    return _finished(line, CURVE_HEIGHT, {"groups": True})


def layer_chart(dataset: str, axis: CurveAxis) -> dict[str, Any]:
    """Return a metric of the MoE layers at the end of the training."""
    alt = altair()
    chart = (
        alt.Chart(alt.NamedData(dataset))
        .mark_line(point=alt.OverlayMarkDef(size=45, filled=True), strokeWidth=1.5)
        .encode(
            x=alt.X("layer:O", title="MoE layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title=axis.title, scale=alt.Scale(zero=axis.starts_at_zero)),
            color=group_colour(),
            strokeDash=group_dash(),
            tooltip=[
                alt.Tooltip("group:N", title="run"),
                alt.Tooltip("layer:O", title="MoE layer"),
                alt.Tooltip("value:Q", title=axis.title, format=".4~g"),
            ],
        )
    )
    return _finished(chart, CURVE_HEIGHT, {"groups": True})


def interval_chart(
    dataset: str, labels: list[str], axis: CurveAxis, interval: str, counted: str = "runs"
) -> dict[str, Any]:
    """Return one mean with its interval per group, and the values of its runs as rings.

    Args:
        axis: of the values.
        interval: name of the interval in the tooltip.
        counted: what the mean is over, and the column `count` counts.
    """
    alt = altair()
    title = axis.title
    y = alt.Y(
        "group:N",
        title=None,
        sort=labels,
        axis=alt.Axis(labelLimit=150, domain=False, ticks=False, grid=True),
    )
    scale = alt.Scale(zero=False, nice=True, padding=12)
    base = alt.Chart().encode(y=y, color=group_colour())
    x_axis = number_axis(axis.format, tickCount=5)
    rule = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title=title, scale=scale, axis=x_axis), x2="high:Q"
    )
    tooltip = [
        alt.Tooltip("group:N", title="run"),
        alt.Tooltip("mean:Q", title=title, format=".5~g"),
        alt.Tooltip("low:Q", title=f"{interval}, from", format=".5~g"),
        alt.Tooltip("high:Q", title="to", format=".5~g"),
        alt.Tooltip("count:Q", title=counted),
    ]
    mean = base.mark_point(filled=True, size=85, opacity=1).encode(
        x=alt.X("mean:Q", title=title, scale=scale, axis=x_axis), tooltip=tooltip
    )
    single = base.mark_point(size=45, strokeWidth=1.25, opacity=0.8).encode(
        x=alt.X("value:Q", title=title, scale=scale, axis=x_axis),
        tooltip=[
            alt.Tooltip("group:N", title="run"),
            alt.Tooltip("value:Q", title=title, format=".5~g"),
            alt.Tooltip("seed:N", title="seed"),
        ],
    )
    chart = alt.layer(rule, single, mean, data=alt.NamedData(dataset))
    height = max(60, min(26 * len(labels), 2600))
    return _finished(chart, height, {"groups": True})


def _time_of_map() -> Any:
    """Return the x channel of a heat map; bounds are rounded to pixels, or seams would show."""
    alt = altair()
    scale = alt.Scale(round=True, nice=False)
    return alt.X("start:Q", title="iteration", scale=scale, axis=number_axis("~s", grid=False))


def number_axis(number_format: str, **options: Any) -> Any:
    """Return an axis whose labels have a format; d3 would write 0 with a prefix, as 0M."""
    alt = altair()
    if not number_format:
        return alt.Axis(**options)
    zero = "datum.value === 0 ? '0' : datum.label"
    return alt.Axis(format=number_format, labelExpr=zero, **options)


def _finished(chart, height: int, usermeta: dict[str, Any]) -> dict[str, Any]:
    """Return the specification of a chart as wide as its element."""
    alt = altair()
    chart = chart.properties(width="container", height=height, usermeta=usermeta)
    # The theme of a page sets the looks; altair's own is for notebooks.
    with alt.theme.enable("none"):
        spec = chart.to_dict()
    spec.pop("config", None)
    return spec
