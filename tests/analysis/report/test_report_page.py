"""HTML pages: escaping, JSON in scripts, numbers."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest

from megatron.analysis.html_page import vega_bundle
from megatron.analysis.report.page import (
    PageContent,
    chart_figure,
    escape,
    render_page,
    rounded,
    script_json,
)


def test_text_is_escaped_and_visible():
    assert escape('<a href="x">\'&') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;"
    assert escape("a\u202eb\x00c\u200b") == "a\\u202eb\\u0000c\\u200b"
    assert escape("tab\tand\nline, naïve 日本") == "tab\tand\nline, naïve 日本"


def test_json_cannot_end_its_script():
    value = {"</script><!--": ["\u2028", float("nan"), float("-inf"), (1, 2.5)]}
    text = script_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script><!--": ["\u2028", None, None, [1, 2.5]]}


@pytest.mark.parametrize(
    "value, expected",
    [
        (1 / 3, 0.33333),
        (40960.0, 40960),
        (123456.0, 123460),
        (float("nan"), None),
        (math.inf, None),
        (0.0, 0),
        (1.25e-9, 1.25e-9),
        (1e300, 1e300),
    ],
)
def test_numbers_are_rounded_for_json(value, expected):
    (found,) = rounded([value])
    assert found == expected and type(found) is type(expected)


def test_page_is_complete_and_has_no_addresses():
    """The page's own text loads nothing; the libraries only name their home pages."""
    content = PageContent(
        title="<b>",
        body=chart_figure("a", "Loss <of> runs", "note", wide=True),
        charts={"a": {"mark": "bar", "data": {"name": "d"}}},
        datasets={"d": [{"constants": {"g": "</script>"}, "columns": {"x": [1]}}]},
        scripts=('const end = "</script>";',),
    )
    page = render_page(content)
    assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")
    assert "<title>&lt;b&gt;</title>" in page and "Loss &lt;of&gt; runs" in page
    assert page.count("</script>") == page.count("<script") == 5
    assert 'const end = "<\\/script>";' in page
    assert not re.findall(r"<(?:script|link|iframe)[^>]*(?:src|href)=", page)
    assert "default-src 'none'" in page and len(page) < 1_000_000


def test_page_without_the_extra_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    vega_bundle.cache_clear()
    with pytest.raises(ValueError, match=r"vl_convert.*pip install 'moe-megatron\[analysis\]'"):
        render_page(PageContent("t", ""))
