"""Reports in headless Chromium: no errors, no requests, and every control does what it says.

Effects are read from the data of Vega's views, which are what the charts draw.
"""

from __future__ import annotations

import shlex

import numpy as np
import pytest

from helpers.browser import open_page
from helpers.report_runs import rows_of_run, start_row, write_run
from megatron.analysis.report import maps
from megatron.analysis.report.report import write_report
from megatron.analysis.report.sources import find_runs

ODD_LABEL = "<img src=x onerror=console.error(1)>"

EXPERT_MAPS = (("load", "load_by_expert"), ("gate-mass", "gate_mass_by_expert"))
"""Chart and metric"""

DRAWN_ROWS = """([id, type]) => {
    const found = [];
    const visit = (item, mark) => {
        if (mark === type && item.datum) found.push(item.datum);
        for (const child of item.items || []) visit(child, item.marktype);
    };
    visit(page.views[id].scenegraph().root, "");
    return found;
}"""
"""Data of the marks of a type that are on the canvas, in their order"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Write a report of two gates with two seeds each, and of one run with another label."""
    folder = tmp_path_factory.mktemp("runs")
    names = []
    for gate, shift in (("topk", 0.0), ("remoe", 0.1)):
        for seed in (1, 2):
            rows = rows_of_run(seed, gate, iterations=800, shift=shift)
            names.append(str(write_run(folder / f"{gate}-{seed}", rows)))
    rows = rows_of_run(9, "hash")
    rows[5]["loss"] = float("nan")
    names.append(f"{ODD_LABEL}={write_run(folder / 'odd', rows)}")
    write_report(find_runs(names), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def opened(report):
    """Open the report once; tests leave the controls as they find them."""
    with open_page(report, 1280) as (page, errors):
        wait_until_drawn(page)
        yield page
        assert errors == []


def wait_until_drawn(page):
    page.wait_for_selector("html[data-drawn=yes]", timeout=120_000)


def choose(page, control, value):
    """Choose an option, and wait until the charts that follow it are drawn."""
    page.select_option(f"#{control}", value)
    wait_until_drawn(page)


def drawn(page, chart, mark="line"):
    """Return the rows that a chart shows with marks of a type."""
    return page.evaluate(DRAWN_ROWS, [chart, mark])


def ends_of_x(page, chart):
    return page.evaluate("id => page.views[id].scale('x').domain()", chart)


def train_rows(seed, gate):
    return [r for r in rows_of_run(seed, gate, iterations=800) if r["kind"] == "train"]


def test_report_fits_a_phone(report):
    """In both colour schemes all charts are drawn, nothing overflows, and no error is logged."""
    with open_page(report, 390, dark=True) as (page, errors):
        for scheme, ink in (("dark", "#e8eaef"), ("light", "#1c1f26")):
            page.emulate_media(color_scheme=scheme)
            wait_until_drawn(page)
            assert page.evaluate("page.colour('ink')") == ink
            assert_charts_fit(page, 390)
    assert errors == []


def assert_charts_fit(page, width):
    """Assert that every chart is drawn inside of its frame, and the page is not wider."""
    assert page.evaluate("Object.keys(page.charts).filter(id => !page.views[id])") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    overhang = page.evaluate(
        """[...document.querySelectorAll(".plot canvas")].map(canvas =>
            canvas.getBoundingClientRect().right -
            canvas.closest(".chart").getBoundingClientRect().right)"""
    )
    assert len(overhang) == page.evaluate("Object.keys(page.charts).length") > 15
    assert max(overhang) <= 0


def test_report_fits_a_desktop(opened):
    assert_charts_fit(opened, 1280)


def test_theme_follows_the_system(opened):
    before = opened.evaluate("page.views['curve-loss'].scale('color').range()")
    opened.emulate_media(color_scheme="dark")
    wait_until_drawn(opened)
    opened.wait_for_function(
        "old => page.views['curve-loss'].scale('color').range()[0] !== old", arg=before[0]
    )
    after = opened.evaluate("page.views['curve-loss'].scale('color').range()")
    opened.emulate_media(color_scheme="light")
    opened.wait_for_function(
        "old => page.views['curve-loss'].scale('color').range()[0] === old", arg=before[0]
    )
    wait_until_drawn(opened)
    assert not set(before) & set(after)


def test_axis_select_changes_the_axis(opened):
    rows = train_rows(1, "topk")
    expected = {
        "iteration": rows[-1]["iteration"],
        "tokens": rows[-1]["consumed_tokens"],
        "flops": 6e7 * rows[-1]["consumed_tokens"],
    }
    for position, end in expected.items():
        choose(opened, "axis", position)
        for chart in ("curve-loss", "held-out-loss", "curve-load_cv"):
            assert max(ends_of_x(opened, chart)) == pytest.approx(end, rel=1e-4)
    choose(opened, "axis", "time")
    seconds = np.mean(
        [
            sum(10 * r["step_time_ms"] / 1000 for r in train_rows(seed, "topk"))
            for seed in (1, 2)
        ]
    )
    others = np.mean(
        [
            sum(10 * r["step_time_ms"] / 1000 for r in train_rows(seed, "remoe"))
            for seed in (1, 2)
        ]
    )
    end = max(ends_of_x(opened, "curve-loss"))
    assert end * 60 == pytest.approx(max(seconds, others), rel=1e-4)
    choose(opened, "axis", "tokens")


def test_smoothing_select_draws_running_means(opened):
    losses = [[row["loss"] for row in train_rows(seed, "topk")] for seed in (1, 2)]
    mean = np.mean(losses, axis=0)
    for reach in (0, 2, 5):
        choose(opened, "smoothing", str(reach))
        shown = [r["mean"] for r in drawn(opened, "curve-loss") if r["group"] == "topk"]
        expected = [mean[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(mean))]
        np.testing.assert_allclose(shown, expected, rtol=5e-5)
    choose(opened, "smoothing", "2")


def test_y_axis_select_changes_the_scale(opened):
    """Also for the groups that are left when others are hidden."""

    def scale(expression):
        return opened.evaluate(f"page.views['curve-loss'].scale('y').{expression}")

    top = scale("domain()")[1]
    choose(opened, "range", "low")
    means = [row["mean"] for row in drawn(opened, "curve-loss") if row["mean"] is not None]
    low, high = scale("domain()")
    assert opened.evaluate("page.views['curve-load_cv'].scale('y').type") == "linear"
    assert low <= min(means) and sorted(means)[len(means) * 3 // 4] < high < top
    opened.click("[data-group=topk]")
    wait_until_drawn(opened)
    assert {row["group"] for row in drawn(opened, "curve-loss")} == {"remoe", ODD_LABEL}
    opened.click("[data-group=topk]")
    wait_until_drawn(opened)
    choose(opened, "range", "log")
    assert scale("type") == "log"
    assert opened.evaluate("page.views['curve-load_cv'].scale('y').type") == "log"
    choose(opened, "range", "all")
    assert scale("type") == "linear" and scale("domain()")[1] == top


def test_smoothing_keeps_gaps(opened):
    choose(opened, "smoothing", "5")
    shown = [r["mean"] for r in drawn(opened, "curve-loss") if r["group"] == ODD_LABEL]
    choose(opened, "smoothing", "2")
    assert shown.count(None) == 1


def test_legend_hides_and_shows_groups(opened):
    """With the mouse, with the keyboard, and all together."""
    everything = {"topk", "remoe", ODD_LABEL}

    def shown():
        charts = [("curve-loss", "line"), ("curve-load_cv", "line"), ("histogram", "symbol")]
        charts.append(("final-loss", "symbol"))
        found = [{row["group"] for row in drawn(opened, *chart)} for chart in charts]
        assert all(groups == found[0] for groups in found)
        return found[0]

    assert shown() == everything
    opened.click("[data-group=remoe]")
    assert shown() == everything - {"remoe"}
    opened.focus("[data-group=topk]")
    opened.keyboard.press("Space")
    assert shown() == {ODD_LABEL}
    opened.click("#show-all")
    assert shown() == everything
    opened.click("#hide-all")
    assert shown() == set() and not opened.is_checked("[data-group=topk]")
    opened.click("#show-all")
    assert shown() == everything


def test_hidden_groups_stay_hidden_when_charts_change(opened):
    opened.click("[data-group=remoe]")
    choose(opened, "axis", "iteration")
    assert "remoe" not in {row["group"] for row in drawn(opened, "curve-loss")}
    choose(opened, "axis", "tokens")
    opened.click("[data-group=remoe]")


def test_held_out_select_changes_both_charts(opened):
    rows = rows_of_run(9, "hash")
    for kind in ("eval/code", "test", "eval"):
        choose(opened, "held-out", kind)
        expected = [row["loss"] for row in rows if row["kind"] == kind][-1]
        for chart, mark in (("held-out-loss", "line"), ("final-loss", "symbol")):
            shown = [r for r in drawn(opened, chart, mark) if r["group"] == ODD_LABEL]
            assert {row["kind"] for row in shown} == {kind}
            assert shown[-1]["mean"] == pytest.approx(expected, rel=5e-5)


def test_layer_and_run_selects_change_both_maps(opened):
    for run, (seed, gate) in (("1", (2, "topk")), ("2", (1, "remoe"))):
        for layer in (1, 0):
            choose(opened, "load-run", run)
            choose(opened, "load-layer", str(layer))
            for chart, metric in EXPERT_MAPS:
                rows = drawn(opened, chart, "rect")
                shown = [row["relative"] for row in rows if "relative" in row]
                shares = [row[metric][layer] for row in train_rows(seed, gate)]
                np.testing.assert_allclose(shown, 4 * np.array(shares).ravel(), rtol=5e-3)
    choose(opened, "load-run", "0")


ROWS_OF_MAP = """() => {
    const names = page.views.load.scale("y").domain();
    const labels = [];
    const visit = (item) => {
        if (item.role === "axis-label") labels.push(...item.items.map(text => text.text));
        for (const child of item.items || []) visit(child);
    };
    visit(page.views.load.scenegraph().root);
    return { names, labels, height: page.views.load.height() };
}"""
"""Rows of the map of loads, labels of both axes, and its height"""


@pytest.mark.parametrize("cells, per_row", [(100_000, 1), (2 * 128, 4)])
def test_maps_of_many_experts_have_fewer_labels_or_rows(tmp_path, monkeypatch, cells, per_row):
    monkeypatch.setattr(maps, "EXPERT_CELLS", cells)
    rows = rows_of_run(1, iterations=50)
    loads = np.random.default_rng(0).dirichlet(np.ones(48), 5)
    for row, load_E in zip([row for row in rows if "load_by_expert" in row], loads):
        row["load_by_expert"] = row["gate_mass_by_expert"] = [load_E.tolist()]
    write_report(find_runs([str(write_run(tmp_path, rows))]), tmp_path / "report.html")
    with open_page(tmp_path / "report.html") as (page, errors):
        wait_until_drawn(page)
        shown = page.evaluate(ROWS_OF_MAP)
        numbers = [row["numbers"] for row in drawn(page, "load", "rect") if "numbers" in row]
    assert errors == []
    firsts = list(range(0, 48, per_row))
    assert shown["names"] == firsts and len(numbers) == 5 * len(firsts)
    if per_row == 1:
        assert shown["height"] == 460 and {*map(str, range(0, 48, 3))} < {*shown["labels"]}
        assert "1" not in shown["labels"] and numbers[:2] == ["0", "1"]
    else:
        assert shown["height"] == 14 * 12 and numbers[:2] == ["0 to 3", "4 to 7"]


def test_copy_button_copies_the_command(opened):
    opened.locator("details.command").nth(2).locator("summary").click()
    button = opened.locator("button.copy").nth(2)
    button.click()
    opened.wait_for_function(
        "b => b.textContent === 'Copied'", arg=button.element_handle(), timeout=10_000
    )
    copied = opened.evaluate("navigator.clipboard.readText()")
    assert shlex.split(copied) == start_row(1, "remoe")["command"]


def test_tooltip_shows_text_as_text(opened):
    """Point at a curve whose group has HTML in its name."""
    opened.click("#hide-all")
    opened.check(f"[data-group='{ODD_LABEL}']")
    choose(opened, "smoothing", "0")
    opened.locator("#curve-loss").scroll_into_view_if_needed()
    place = opened.evaluate(
        """label => {
            const view = page.views["curve-loss"];
            const rows = view.data("curve-loss").filter(r => r.mean !== null && r.group === label);
            const [x, y] = view.origin().map(offset => offset + view.padding().left);
            const box = document.querySelector("#curve-loss canvas").getBoundingClientRect();
            const row = rows[9];
            return [box.x + x + view.scale("x")(row.tokens), box.y + y + view.scale("y")(row.mean)];
        }""",
        ODD_LABEL,
    )
    opened.mouse.move(place[0] - 5, place[1] - 5)
    opened.mouse.move(*place)
    tooltip = opened.locator("#vg-tooltip-element.visible")
    tooltip.wait_for(timeout=10_000)
    assert ODD_LABEL in tooltip.inner_text()
    opened.mouse.move(0, 0)
    choose(opened, "smoothing", "2")
    opened.click("#show-all")


def test_printing_uses_light_colours(opened):
    opened.emulate_media(color_scheme="dark")
    wait_until_drawn(opened)
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    opened.emulate_media(media="print", color_scheme="dark")
    assert opened.evaluate("page.colour('ink')") == "#1c1f26"
    style = "getComputedStyle(document.querySelector('.plot canvas')).filter"
    assert "invert(1)" in opened.evaluate(style)
    assert opened.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    opened.evaluate("dispatchEvent(new Event('afterprint'))")
    opened.emulate_media(media="screen", color_scheme="dark")
    assert opened.evaluate("page.colour('ink')") == "#e8eaef"
    opened.emulate_media(color_scheme="light")
    wait_until_drawn(opened)
