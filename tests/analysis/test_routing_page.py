"""The page about the routing of texts: its data, and what it shows in a browser."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.browser import open_page
from helpers.traces import (
    assignments_of,
    drawn_layer,
    drawn_trace,
    layer_of_lists,
    traced_gates,
)
from megatron.analysis import routing_page_data as routing_page_data_module
from megatron.analysis.html_page import json_for_script
from megatron.analysis.routing_page import routing_page, write_routing_page
from megatron.analysis.routing_page_data import (
    TOKEN_BYTES,
    PageOptions,
    routing_page_data,
)
from megatron.analysis.routing_statistics import co_activation, most_used
from megatron.analysis.token_classes import TOKEN_CLASSES
from megatron.moe.gate import available_gates
from megatron.moe.routing_trace import RoutingTrace

INTEGERS = {1: "<u1", 2: "<u2", 4: "<u4"}
ATTACK = (
    "</script><script>document.title='attacked'</script>",
    "<img src=x onerror=\"document.title='attacked'\">",
    "<!--",
    "\u202eevil\u2066",
    "'\"&amp;\\u003c",
)


def decode(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def decoded_assignments(layer: dict) -> list[list[tuple[int, float | None]]]:
    """The (choice, weight) pairs of each shown position of a page's layer."""
    encoded = layer["assignments"]
    counts = decode(encoded["counts"], INTEGERS[encoded["count_bytes"]])
    experts = decode(encoded["experts"], INTEGERS[encoded["expert_bytes"]]).tolist()
    weights = [None] * len(experts)
    if encoded["weights"] is not None:
        halves = decode(encoded["weights"], "<u2").astype(np.uint32) << 16
        weights = halves.view(np.float32).tolist()
    pairs = list(zip(experts, weights, strict=True))
    ends = np.cumsum(counts).tolist()
    return [pairs[end - count : end] for end, count in zip(ends, counts.tolist())]


def small_trace() -> RoutingTrace:
    layers = [drawn_layer(30, 300, 4, zero=2), drawn_layer(30, 4, 3, seed=1)]
    return drawn_trace(30, layers)


@pytest.mark.parametrize("limit", [100, 7, 1])
def test_page_has_the_assignments_of_each_token(limit):
    """Weights are those of the trace, rounded to bfloat16."""
    trace = small_trace()
    data = routing_page_data(trace, PageOptions("x", limit))
    shown = min(limit, 30)
    assert len(data["tokens"]["texts"]) == shown and data["num_tokens"] == 30
    for found, layer in zip(data["layers"], trace.layers, strict=True):
        expected = assignments_of(layer)[:shown]
        rounded = [
            [(e, float(torch.tensor(w).bfloat16())) for e, w in pairs] for pairs in expected
        ]
        assert decoded_assignments(found) == rounded
    for number in range(shown):
        sets = [assignments_of(layer)[number] for layer in trace.layers]
        assert data["tokens"]["experts"][number] == sum(map(len, sets))
        zero = sum(e >= 300 for e, _ in sets[0])
        assert data["tokens"]["routed"][number] == sum(map(len, sets)) - zero
    assert any(f"The first {shown} of 30 tokens" in n for n in data["notes"]) == (shown < 30)


@pytest.mark.parametrize("name", available_gates())
def test_page_has_the_assignments_of_each_gate(name):
    """Those that the gate returned, also with zero-computation experts and PEER's many."""
    texts = tuple(f" {i}" for i in range(7))
    trace = traced_gates(name, "topk", texts=texts)
    data = routing_page_data(trace, PageOptions("x"))
    for found, layer in zip(data["layers"], trace.layers, strict=True):
        experts = [[e for e, _ in pairs] for pairs in decoded_assignments(found)]
        assert experts == [[e for e, _ in pairs] for pairs in assignments_of(layer)]
        assert found["gate"] == layer.gate
        assert sum(use["count"] for use in found["listed"]) <= len(layer.expert_A)
    assert json_for_script(data)


def test_page_statistics_cover_all_tokens():
    """Loads, co-activation and classes count tokens that are not shown, too."""
    trace = small_trace()
    data = routing_page_data(trace, PageOptions("x", 3))
    layer = trace.layers[1]
    chosen = layer.expert_A.tolist()
    loads = [chosen.count(e) * 4 / len(chosen) for e in range(4)]
    assert data["layers"][1]["load"] == pytest.approx(loads, rel=1e-3)
    matrix = data["layers"][1]["matrix"]
    assert matrix["experts"] == [0, 1, 2, 3]
    counts = decode(matrix["counts"], "<u4").reshape(4, 4)
    assert counts.tolist() == co_activation(layer, most_used(layer, 4)).tolist()
    listed = data["layers"][1]["listed"]
    for use in listed:
        users = {t for t in range(30) if use["expert"] in dict(assignments_of(layer)[t])}
        assert use["count"] == len(users) == sum(use["classes"])
    rows = data["class_means"]["rows"]
    assert sum(row["tokens"] for row in rows) == 30
    total = sum(len(layer.expert_A) for layer in trace.layers)
    assert sum(row["mean"] * row["tokens"] for row in rows) == pytest.approx(total)


def test_classes_show_what_varies():
    """With as many experts everywhere it is their entropy, and nothing without weights."""
    layers = [layer_of_lists([[0, 1], [1, 2], [3, 0]])]
    trace = RoutingTrace(tuple(layers), texts=(" a", "1", "("))
    data = routing_page_data(trace, PageOptions("x"))
    assert data["class_means"]["title"] == "entropy of a token's weights, nats"
    bare = replace(trace, layers=(replace(layers[0], weight_A=None),))
    data = routing_page_data(bare, PageOptions("x"))
    assert data["class_means"] is None and data["tokens"]["entropy"] is None
    assert data["tokens"]["ids"] is None and data["layers"][0]["assignments"]["weights"] is None
    zero = RoutingTrace((layer_of_lists([[0, 1], [1, 4]], zero=1),), texts=(" a", "1"))
    data = routing_page_data(zero, PageOptions("x"))
    assert data["class_means"]["title"] == "routed experts per token, summed over layers"
    assert [row["mean"] for row in data["class_means"]["rows"]] == [2, 1]


@pytest.mark.parametrize(
    "tokens, layers, num_experts, k",
    [(1000, 60, 256, 8), (600, 4, 1 << 20, 128), (5, 1, 1 << 20, 60000)],
)
def test_largest_pages_are_below_5_mb(tokens, layers, num_experts, k):
    """E = 256 in 60 layers, PEER with a million experts, and tokens that exceed any page."""
    drawn = [drawn_layer(tokens, num_experts, k, k, seed=i) for i in range(layers)]
    trace = drawn_trace(tokens, drawn)
    assert len(routing_page(trace, PageOptions("x", 10**6)).encode()) < 5_000_000
    shown = len(routing_page_data(trace, PageOptions("x", 10**6))["tokens"]["texts"])
    assert 1 <= shown < tokens
    assert layers * k * shown * 4 < TOKEN_BYTES


def test_page_of_many_different_tokens_is_below_5_mb():
    """Whose texts and ids take more space than their experts, and are shown as far as they fit."""
    tokens = 100_000
    trace = drawn_trace(tokens, [drawn_layer(tokens, 8, 1, 1)])
    texts = tuple(f" <{i}>" for i in range(tokens))
    trace = replace(trace, texts=texts, token_ids_T=torch.arange(tokens))
    page = routing_page(trace, PageOptions("x", 10**6))
    assert len(page.encode()) < 5_000_000
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)
    data = json.loads(text)
    shown = len(data["tokens"]["texts"])
    assert all(len(data["tokens"][name]) == shown for name in ("ids", "classes", "entropy"))
    encoded = json_for_script({**data, "charts": None, "layers": None, "vocabulary": None})
    experts = 4 / 3 * 5 * shown
    assert 0.95 * TOKEN_BYTES < len(encoded) + experts < TOKEN_BYTES + 1000
    keys = {str(key) for use in data["layers"][0]["listed"] for key, *_ in use["tokens"]}
    assert keys == {*data["vocabulary"]}
    assert all(data["vocabulary"][key] == texts[int(key)] for key in keys)


@pytest.mark.slow
def test_page_of_very_many_tokens_opens(tmp_path, monkeypatch):
    """More of them than a function of JavaScript can have arguments."""
    monkeypatch.setattr(routing_page_data_module, "TOKEN_BYTES", 10**9)
    tokens = 150_000
    trace = drawn_trace(tokens, [drawn_layer(tokens, 8, 2, 1)])
    write_routing_page(tmp_path / "page.html", trace, PageOptions("x", tokens))
    with open_page(tmp_path / "page.html") as (page, errors):
        page.wait_for_selector("body.ready", timeout=300_000)
        assert page.inner_text("#low") == "1" and page.inner_text("#high") == "2"
        assert page.locator(".token").count() == tokens
        assert errors == []


def test_page_without_text_is_refused(tmp_path):
    trace = small_trace()
    with pytest.raises(ValueError, match="the text of the trace is 'not recorded'.*--load"):
        write_routing_page(tmp_path / "a.html", replace(trace, texts=None), PageOptions("x"))
    bare = replace(trace, texts=None, token_ids_T=None)
    with pytest.raises(ValueError, match="it has neither texts nor token ids"):
        write_routing_page(tmp_path / "a.html", bare, PageOptions("x"))
    empty = RoutingTrace((layer_of_lists([]),), texts=())
    with pytest.raises(ValueError, match="the number of positions of the trace is 0"):
        write_routing_page(tmp_path / "a.html", empty, PageOptions("x"))
    with pytest.raises(ValueError, match="--page-tokens is 0; allowed: a positive integer"):
        PageOptions("x", 0)
    assert not list(tmp_path.iterdir())


def test_json_cannot_leave_its_script():
    value = {"a": [*ATTACK, "\u2028\u2029"]}
    text = json_for_script(value)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == value


def attacked_trace() -> RoutingTrace:
    """40 tokens, some of them HTML, in two layers with a varying number of experts."""
    trace = drawn_trace(40, [drawn_layer(40, 6, 4, 1, zero=2), drawn_layer(40, 6, 3, 1)])
    return replace(trace, texts=(*ATTACK, *trace.texts[len(ATTACK) :]))


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    options = PageOptions("Routing of <b>x</b>", notes=("A note.",))
    assert write_routing_page(path, attacked_trace(), options) == path.stat().st_size
    return path


def shown_experts(page) -> list[list[int]]:
    """The experts of each layer in the panel of the current token."""
    rows = page.locator("#detail tbody tr").all()
    names = [row.locator(".chosen b").all_inner_texts() for row in rows]
    return [[int(n.replace("zero-computation ", "")) for n in found] for found in names]


def expected_experts(trace: RoutingTrace, token: int) -> list[list[int]]:
    """The experts of each layer, the largest weights first; zero-computation ones from 0."""
    found = []
    for layer in trace.layers:
        pairs = sorted(assignments_of(layer)[token], key=lambda pair: -abs(pair[1]))
        found.append([e % layer.num_experts for e, _ in pairs])
    return found


def test_page_works_with_a_mouse_and_keyboard(page_file):
    """Hover, keys, selections and a click on the heat map, without an error or a request."""
    trace = attacked_trace()
    with open_page(page_file, 1280, False) as (page, errors):
        page.wait_for_selector("body.ready")
        assert page.title() == "Routing of <b>x</b>"
        tokens = page.locator(".token")
        assert tokens.count() == 40
        assert tokens.nth(1).text_content() == ATTACK[1]
        assert "U+202E" in tokens.nth(3).text_content()
        tokens.nth(7).hover()
        assert shown_experts(page) == expected_experts(trace, 7)
        tokens.nth(9).click()
        tokens.nth(12).hover()
        assert shown_experts(page) == expected_experts(trace, 9), "a click holds a token"
        page.keyboard.press("ArrowRight")
        assert shown_experts(page) == expected_experts(trace, 10)
        page.keyboard.press("Escape")
        assert page.locator("#detail .hint").count() == 1
        counts = [sum(map(len, expected_experts(trace, t))) for t in range(40)]
        heat = tokens.evaluate_all("all => all.map(t => +t.style.getPropertyValue('--heat'))")
        low = min(counts)
        expected = [(count - low) / (max(counts) - low) for count in counts]
        assert heat == pytest.approx(expected, abs=1e-3)
        page.select_option("#layer", "1")
        page.select_option("#expert", "2")
        users = sum(2 in expected_experts(trace, t)[1] for t in range(40))
        assert page.inner_text("#use") == f"Expert 2 of MoE layer 1: {users} tokens."
        listed = page.locator("#top .text").all_text_contents()
        assert listed and not any(re.search(r"\s", text) for text in listed)
        page.select_option("#colour", "expert")
        heat = tokens.evaluate_all("all => all.map(t => +t.style.getPropertyValue('--heat'))")
        assert sum(value > 0 for value in heat) == users
        box = page.locator("#load canvas").bounding_box()
        position = {"x": box["width"] / 2, "y": box["height"] * 0.55}
        page.locator("#load canvas").click(position=position)
        page.wait_for_function("document.getElementById('layer').value === '0'")
        assert page.locator("#co_activation canvas").count() == 1
        assert page.locator("#classes canvas").count() == 1
        assert errors == [] and page.title() == "Routing of <b>x</b>"


@pytest.mark.parametrize("width, dark", [(390, True), (390, False), (1280, True)])
def test_page_fits_windows_in_both_schemes(page_file, width, dark):
    """Nothing is wider than the window, a tap shows the experts, and text can be read."""
    trace = attacked_trace()
    with open_page(page_file, width, dark) as (page, errors):
        page.wait_for_selector("body.ready")
        if width < 600:
            page.locator(".token").nth(6).tap()
            assert shown_experts(page) == expected_experts(trace, 6)
            page.get_by_label("Close").tap()
            assert page.locator("#detail tbody").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        surface = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", surface))) < 128) == dark
        assert lowest_contrast(page) > 4.5
        assert errors == []


def lowest_contrast(page) -> float:
    """The lowest ratio of luminances between the text and the ground of a token (WCAG 2)."""
    pairs = page.evaluate(
        """() => {
          const canvas = document.createElement('canvas').getContext('2d');
          const rgb = (colour) => {
            canvas.clearRect(0, 0, 1, 1);
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          return [...document.querySelectorAll('.token')].map((token) => {
            const style = getComputedStyle(token);
            return [rgb(style.color), rgb(style.backgroundColor)];
          });
        }"""
    )

    def luminance(rgb: list[int]) -> float:
        shares = [c / 255 for c in rgb]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ratios = []
    for pair in pairs:
        dark, light = sorted(map(luminance, pair))
        ratios.append((light + 0.05) / (dark + 0.05))
    return min(ratios)


def test_page_names_every_class(page_file):
    text = page_file.read_text(encoding="utf-8")
    assert all(name in text for name in TOKEN_CLASSES)
