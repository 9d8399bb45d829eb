"""Conversion of flag values between text, JSON and Python."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from megatron.config.fields import require
from megatron.config.flags import Flag, negative_spellings

_TYPE_NAMES = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}


def parse_value(flag: Flag, raw: Any, what: str) -> Any:
    """Convert a value from the command line or from JSON to the flag's type.

    An empty text as the only element is the empty list: `--data-path ""` overrides what
    run.json sets. `none` is None where that is allowed.

    Args:
        raw: text or a list of text (command line), or a JSON value.
        what: name of the value in error messages.
    Raises:
        ValueError: the value does not have the flag's type, or is not among its choices.
    """
    if flag.type.is_optional and raw in (None, "none", ["none"]):
        return None
    if not flag.type.is_list:
        return _parse_element(flag, raw, what)
    element_type = _TYPE_NAMES[flag.type.base]
    require(isinstance(raw, list), what, raw, f"a list, each element {element_type}")
    if raw == [""]:
        return ()
    return tuple(_parse_element(flag, element, what) for element in raw)


def format_flag(spelling: str, value: Any) -> list[str]:
    """Return command-line words that set a flag to a value.

    Raises:
        ValueError: an element of a list starts with "--", which would be read as a flag.
    """
    if isinstance(value, bool):
        return [spelling] if value else negative_spellings([spelling])
    if value is None:
        return [f"{spelling}=none"]
    if not isinstance(value, (tuple, list)):
        return [f"{spelling}={value}"]
    if not value:
        return [f"{spelling}="]
    words = [spelling]
    for element in value:
        require(
            not str(element).startswith("--"),
            spelling,
            element,
            'text that does not start with "--"',
            "Put it into run.json instead.",
        )
        words.append(str(element))
    return words


def _parse_element(flag: Flag, raw: Any, what: str) -> Any:
    """Convert a value, or one element of a list."""
    base = flag.type.base
    value = None
    if base in (str, bool):
        if isinstance(raw, base):
            value = raw
    elif isinstance(raw, (str, int, float)) and not isinstance(raw, bool):
        value = _parse_number(base, raw)
    is_allowed = value is not None and (not flag.choices or value in flag.choices)
    require(is_allowed, what, raw, " ".join(map(str, flag.choices)) or _TYPE_NAMES[base])
    return value


def _parse_number(base: type, raw: str | int | float) -> int | float | None:
    """Return a number, or None if `raw` is not one of the type `base`.

    1e6 and 10_000 are integers too. Integers beyond 64 bits, infinities and NaN are refused.
    """
    try:
        exact = Decimal(raw)
        rounded = float(raw)
    except (ValueError, ArithmeticError):
        return None
    if not math.isfinite(rounded):
        return None
    if base is float:
        return rounded
    if abs(exact) >= 2**63 or exact != exact.to_integral_value():
        return None
    return int(exact)


def flatten_settings(sections: dict[str, Any]) -> dict[str, Any]:
    """Return the values of nested sections, as in run.json, by "section.name"."""
    flat = {}
    for section, content in sections.items():
        if isinstance(content, dict):
            inner = flatten_settings(content)
            flat |= {f"{section}.{name}": value for name, value in inner.items()}
        else:
            flat[section] = content
    return flat
