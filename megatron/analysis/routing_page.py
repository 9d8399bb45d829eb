"""A self-contained HTML page about the routing of some texts: no file and no network is needed.

All text reaches the page as JSON in a script element and is inserted by `textContent`, so that
nothing in it is read as HTML.
"""

from __future__ import annotations

import html
from pathlib import Path

import megatron
from megatron.analysis.html_page import (
    CONTENT_POLICY,
    json_for_script,
    script_text,
    vega_bundle,
)
from megatron.analysis.routing_charts import (
    class_chart,
    co_activation_chart,
    load_chart,
)
from megatron.analysis.routing_page_data import PageOptions, routing_page_data
from megatron.config.fields import require
from megatron.io import atomic_write
from megatron.moe.routing_trace import RoutingTrace

_FILES = Path(__file__).parent


def write_routing_page(path: str | Path, trace: RoutingTrace, options: PageOptions) -> int:
    """Write the page of a trace atomically.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: the trace has no position or no texts, or a package that draws charts is
            not installed.
        OSError: the file cannot be written.
    """
    content = routing_page(trace, options).encode()
    atomic_write.write_bytes(path, content)
    return len(content)


def routing_page(trace: RoutingTrace, options: PageOptions) -> str:
    """Return the page of a trace; see `write_routing_page`."""
    require(trace.num_positions > 0, "the number of positions of the trace", 0, "1 or more")
    advice = "Record the trace with this tool: it has neither texts nor token ids."
    if trace.token_ids_T is not None:
        advice = "Name the model with --load: its tokenizer decodes the token ids."
    require(
        trace.texts is not None,
        "the text of the trace",
        "not recorded",
        "the text of each token",
        advice,
    )
    data = routing_page_data(trace, options)
    charts = {
        "load": load_chart(len(trace.layers)),
        "co_activation": co_activation_chart(),
    }
    means = data["class_means"]
    if means is not None:
        charts["classes"] = class_chart(means["title"], len(means["rows"]))
    return _filled(
        _read("html"),
        {
            "TITLE": html.escape(options.title),
            "CONTENT_POLICY": CONTENT_POLICY,
            "VERSION": html.escape(megatron.__version__),
            "STYLE": _read("css"),
            "DATA": json_for_script({**data, "charts": charts}),
            "LIBRARY": script_text(vega_bundle()),
            "SCRIPT": script_text(_read("js")),
        },
    )


def _read(suffix: str) -> str:
    return (_FILES / f"routing_page.{suffix}").read_text(encoding="utf-8")


def _filled(template: str, parts: dict[str, str]) -> str:
    """Replace each @@NAME@@ of a template once, and nothing in what replaces it."""
    pieces = template.split("@@")
    for index in range(1, len(pieces), 2):
        pieces[index] = parts[pieces[index]]
    return "".join(pieces)
