"""What self-contained HTML pages have in common: embedded scripts and data, and no network."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from megatron.optional_packages import import_optional

CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:"
)
"""The browser refuses every request of the page. Vega compiles its expressions: unsafe-eval."""

_UNSAFE_IN_SCRIPT = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
"""Characters that can end a script element or a line of it, and those that UTF-8 does not have"""


def json_for_script(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in, or begin a comment there.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE_IN_SCRIPT.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def script_text(code: str) -> str:
    """Return JavaScript that does not end the script element it stands in.

    The sequences can only be in strings and regular expressions, where a backslash changes
    nothing.
    """
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


@functools.cache
def vega_bundle() -> str:
    """Return the JavaScript of Vega, Vega-Lite and Vega-Embed, which defines vegaEmbed.

    Making it takes seconds.

    Raises:
        ValueError: the package vl-convert-python is not installed.
    """
    return import_optional("vl_convert", "analysis", "a page with charts").javascript_bundle()
