"""The report card as a terminal table and as an HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence

from megatron.gate_checks.card import CheckResult
from megatron.gate_checks.tiny_run import Curve

_BARS = "▁▂▃▄▅▆▇█"
_STYLE = (
    "body{font:15px sans-serif;margin:2em;max-width:60em}"
    "td,th{padding:.2em 1em .2em 0;text-align:left;vertical-align:top}"
    ".pass{color:#0a7d32}.fail{color:#b00020;font-weight:bold}.skip{color:#777}"
)
_WIDTH = 480
_HEIGHT = 120


def header_lines(title: str) -> list[str]:
    """Return the first lines of the table."""
    return [title, f"{'check':<32}{'result':<8}{'seconds':>7}  detail"]


def result_line(result: CheckResult) -> str:
    """Return a line of the table."""
    seconds = f"{result.seconds:.1f}" if result.outcome != "skip" else ""
    return f"{result.name:<32}{result.outcome:<8}{seconds:>7}  {result.detail}".rstrip()


def curve_lines(curve: Curve) -> list[str]:
    """Return the curves of a training, each as one line of bars with its first and last value."""
    lines = []
    for name, values in _named_curves(curve).items():
        lines.append(f"{name:<32}{bars(values)}  {values[0]:.3g} -> {values[-1]:.3g}")
    return lines


def bars(values: Sequence[float]) -> str:
    """Return one bar character per value, from the smallest to the largest."""
    low = min(values)
    spread = max(values) - low or 1.0
    return "".join(_BARS[int((value - low) / spread * (len(_BARS) - 1))] for value in values)


def _named_curves(curve: Curve) -> dict[str, list[float]]:
    return {
        "loss": curve.losses,
        "load, max over mean": curve.load_imbalance,
        "experts per token": curve.experts_per_token,
    }


def summary_line(results: Sequence[CheckResult]) -> str:
    """Return the conclusion, which names the failed checks."""
    failed = [result.name for result in results if result.outcome == "fail"]
    passed = sum(result.outcome == "pass" for result in results)
    if failed:
        return f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}"
    skipped = len(results) - passed
    return f"{passed} checks passed" + (f", {skipped} skipped" if skipped else "")


def html_page(title: str, results: Sequence[CheckResult]) -> str:
    """Return the report card as one HTML page without external files."""
    rows = []
    curves = []
    for result in results:
        cells = [
            html.escape(result.name),
            f'<span class="{result.outcome}">{result.outcome}</span>',
            f"{result.seconds:.1f}",
            html.escape(result.detail),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        if result.curve is not None:
            for name, values in _named_curves(result.curve).items():
                curves.append(f"<h3>{html.escape(name)}</h3>{_svg(values)}")
    return "\n".join(
        [
            f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
            f"<p>{html.escape(summary_line(results))}</p>",
            "<table><tr><th>check<th>result<th>seconds<th>detail</tr>",
            *rows,
            "</table>",
            *curves,
            "",
        ]
    )


def _svg(values: Sequence[float]) -> str:
    """Return a line chart, labelled with its extreme values."""
    low = min(values)
    high = max(values)
    spread = high - low or 1.0
    points = []
    for i, value in enumerate(values):
        x = i / max(1, len(values) - 1) * _WIDTH
        y = _HEIGHT - (value - low) / spread * _HEIGHT
        points.append(f"{x:.1f},{y:.1f}")
    line = f'<polyline fill="none" stroke="#2456a6" points="{" ".join(points)}"/>'
    chart = f'<svg width="{_WIDTH}" height="{_HEIGHT}" style="background:#f4f4f4">{line}</svg>'
    return f"{chart}<p>{low:.3g} to {high:.3g} in {len(values)} steps</p>"
