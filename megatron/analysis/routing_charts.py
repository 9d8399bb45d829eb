"""Charts of a routing page, as Vega-Lite specifications whose data the page fills in."""

from __future__ import annotations

from typing import Any

from megatron.optional_packages import import_optional

EXTRA = "analysis"
"""The extra of pyproject.toml with the packages that draw charts"""

_TALLEST = 900
"""Height in pixels of a heat map with many layers"""
_SCHEME = "viridis"


def load_chart(num_layers: int) -> dict[str, Any]:
    """Return the heat map of loads, a row for each layer and a column for each bin of experts.

    Rows of its data set "load": layer, bin, experts (a label), load.
    """
    alt = import_optional("altair", EXTRA, "--output")
    tooltip = [
        alt.Tooltip("layer:O", title="MoE layer"),
        alt.Tooltip("experts:N", title="experts"),
        alt.Tooltip("load:Q", title="load / mean", format=".3f"),
    ]
    return _heat_map(
        "load",
        {"bin": "expert", "layer": "MoE layer", "load": "load / mean"},
        tooltip,
        height=min(_TALLEST, max(60, 22 * num_layers)),
    )


def co_activation_chart() -> dict[str, Any]:
    """Return the matrix of experts that are used together in the selected layer.

    Rows of its data set "co_activation": row, column (expert numbers), share, lift, positions.
    """
    alt = import_optional("altair", EXTRA, "--output")
    tooltip = [
        alt.Tooltip("row:O", title="of the tokens of expert"),
        alt.Tooltip("column:O", title="also use expert"),
        alt.Tooltip("share:Q", title="share", format=".1%"),
        alt.Tooltip("lift:Q", title="against independence", format=".2f"),
        alt.Tooltip("positions:Q", title="tokens with both"),
    ]
    titles = {"column": "also uses expert", "row": "of the tokens of expert", "share": "share"}
    return _heat_map("co_activation", titles, tooltip, height=440)


def _heat_map(
    dataset: str, titles: dict[str, str], tooltip: list[Any], height: int
) -> dict[str, Any]:
    """Return a heat map.

    Args:
        titles: by column of the data set: its horizontal axis, its vertical one, and its colour.
    """
    alt = import_optional("altair", EXTRA, "--output")
    x, y, colour = titles
    chart = alt.Chart(alt.NamedData(dataset), width="container", height=height).mark_rect()
    return chart.encode(
        x=alt.X(f"{x}:O", title=titles[x], axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y(f"{y}:O", title=titles[y], axis=alt.Axis(labelOverlap=True)),
        color=alt.Color(
            f"{colour}:Q",
            title=titles[colour],
            scale=alt.Scale(scheme=_SCHEME, domainMin=0),
            legend=alt.Legend(orient="top", direction="horizontal", gradientLength=160),
        ),
        tooltip=tooltip,
    ).to_dict()


def class_chart(title: str, num_classes: int) -> dict[str, Any]:
    """Return the bars of a mean over the tokens of each class.

    Rows of its data set "classes": name, mean, tokens.

    Args:
        title: what the mean is of, with its unit.
        num_classes: number of rows.
    """
    alt = import_optional("altair", EXTRA, "--output")
    data = alt.NamedData("classes")
    bars = alt.Chart(data, width="container", height=26 * num_classes).mark_bar()
    return bars.encode(
        x=alt.X("mean:Q", title=title, axis=alt.Axis(tickCount=6)),
        y=alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=140)),
        tooltip=[
            alt.Tooltip("name:N", title="class"),
            alt.Tooltip("mean:Q", title=title, format=".3f"),
            alt.Tooltip("tokens:Q", title="tokens"),
        ],
    ).to_dict()
