"""Self-contained HTML pages: text, tables and Vega-Lite charts in one file, without a network.

A page embeds the JavaScript of Vega, Vega-Lite and Vega-Embed (0.9 MB, from vl-convert) once.
`page.js` decodes the data, draws the charts in the colours of `page.css` (light or dark, as the
reader's system is set) and draws them again when these change.

Data sets are lists of blocks, which are smaller than rows. A block of columns,
`{"constants": {"group": "topk"}, "columns": {"iteration": [10, 20], "mean": [8.2, 7.5]}}`, is one
row per element of the columns, each with the constants. Columns that several blocks have in common
are stored once in `PageContent.shared`, under the name that the block has as `"shared"`. A block of
a grid,
`{"constants": {...}, "along": {COLUMN: [X values]}, "down": {COLUMN: [Y values]},
"cells": {COLUMN: [X x Y values, the Y values of the first X first]}}`, is one row per cell.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.analysis.html_page import (
    CONTENT_POLICY,
    json_for_script,
    script_text,
    vega_bundle,
)

DataBlock = dict[str, Any]
"""Part of a data set, as the module's docstring describes it"""

NUM_SERIES_COLOURS = 7
"""Colours of `page.css` (--series-0 to --series-6), chosen for colour-blind readers"""

_FOLDER = Path(__file__).parent
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
"""Control and formatting characters, among them those that change the direction of text"""


@dataclass(frozen=True)
class PageContent:
    """What a page shows. All text in `body` is escaped already (`escape`)."""

    title: str
    """title of the document, as plain text"""
    body: str
    """HTML of the page between the header script and the data"""
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Vega-Lite specifications by id. Data are `{"name": DATA SET}`; `chart_figure` makes the
    element with this id in the body."""
    datasets: dict[str, list[DataBlock]] = field(default_factory=dict)
    """blocks by the name of the data set, as the module's docstring describes them"""
    shared: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """columns of several blocks, by name"""
    settings: dict[str, Any] = field(default_factory=dict)
    """further values for `scripts`: `page.settings`"""
    scripts: tuple[str, ...] = ()
    """JavaScript that runs after page.js and before the charts are drawn"""
    styles: tuple[str, ...] = ()
    """style sheets in addition to page.css"""


def render_page(content: PageContent) -> str:
    """Return the HTML of a page.

    Raises:
        ValueError: the extra `analysis` is not installed.
    """
    data = {
        "charts": content.charts,
        "datasets": content.datasets,
        "shared": content.shared,
        "settings": content.settings,
    }
    scripts = [
        vega_bundle(),
        read_asset("page.js"),
        *content.scripts,
        "page.drawAll();",
    ]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">',
        f"<title>{escape(content.title)}</title>",
        *(f"<style>\n{style}</style>" for style in (read_asset("page.css"), *content.styles)),
        "</head>\n<body>",
        content.body,
        f'<script type="application/json" id="page-data">{script_json(data)}</script>',
        *(f"<script>{script_text(script)}</script>" for script in scripts),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def chart_figure(chart_id: str, title: str, note: str = "", wide: bool = False) -> str:
    """Return the HTML of a chart's place.

    Args:
        chart_id: its id in `PageContent.charts`.
        title: plain text above the chart, which also names it for screen readers.
        note: plain text below it.
        wide: the chart takes all columns of the page.
    """
    name = escape(title)
    kind = "chart wide" if wide else "chart"
    below = f'\n<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="{kind}">\n<figcaption>{name}</figcaption>\n'
        f'<div class="plot" id="{escape(chart_id)}" role="img" aria-label="{name}"></div>'
        f"{below}\n</figure>"
    )


def escape(text: object) -> str:
    """Escape text for HTML, also inside of attributes in double quotes.

    Control characters and those that change the direction of text are shown as their code, such
    as \\u202e, so that no text can present itself as another one.
    """
    visible = _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))
    return html.escape(visible, quote=True)


def script_json(value: Any) -> str:
    """Return JSON for a script element: no text in it can end the element, and NaN is null."""
    return json_for_script(_finite(value))


def rounded(values: Iterable[float], digits: int = 5) -> list[float | int | None]:
    """Round numbers to significant digits, for compact JSON; NaN and infinities become None."""
    return [_rounded(float(value), digits) for value in values]


def _rounded(value: float, digits: int) -> float | int | None:
    if not math.isfinite(value):
        return None
    value = float(f"{value:.{digits}g}")
    # Integers up to 2^53 are exact, and shorter without ".0".
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which are no JSON, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_asset(name: str) -> str:
    """Return the text of a file of this folder: a style sheet or a script."""
    return (_FOLDER / name).read_text(encoding="utf-8")
