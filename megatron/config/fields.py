"""Building blocks of the config classes: field declarations and checks with one form of message."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any

from megatron.config.needs import Need

_LONGEST_VALUE = 500
"""Characters of a value in an error message"""


def option(
    default: Any,
    *flags: str,
    choices: tuple | None = None,
    needs: Need | tuple[Need, ...] = (),
    repeatable: bool = False,
) -> Any:
    """Declare a dataclass field with more than a default.

    A list or tuple as default is copied to a tuple.

    Args:
        flags: further spellings of the flag.
        choices: the closed set of values.
        needs: settings without which the option has no effect, all of them; setting it
            without them is an error.
        repeatable: a flag that is given several times adds to the list; else the last
            one replaces the others.
    """
    metadata = {"flags": flags, "choices": choices, "needs": needs, "repeatable": repeatable}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """Return the flag of a config field: `train_iters` becomes `--train-iters`."""
    return "--" + field_name.replace("_", "-")


def shortened(value: Any) -> str:
    """Return the repr of a value, cut when it is too long for an error message of one line."""
    text = repr(value)
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[: _LONGEST_VALUE // 2]}... ({len(text)} characters)"


def require(ok: bool, what: str, value: Any, allowed: str, advice: str = "") -> None:
    """Raise ValueError in the project's one form unless `ok`.

    The message says what was set, to which value, what is allowed and, with `advice`, what
    to do next.
    """
    if ok:
        return
    message = f"{what} is {shortened(value)}; allowed: {allowed}"
    if advice:
        message += f". {advice}"
    raise ValueError(message)


def require_setting(config: Any, name: str, ok: bool, allowed: str, advice: str = "") -> None:
    """Raise ValueError about the field `name` of a config unless `ok`; see `require`."""
    value = getattr(config, name)
    if isinstance(value, tuple):
        value = list(value)
    require(ok, flag_name(name), value, allowed, advice)


def require_each(
    config: Any, names: Iterable[str], is_allowed: Callable[[Any], bool], allowed: str
) -> None:
    """Raise ValueError for the first named field whose value is not allowed."""
    for name in names:
        require_setting(config, name, is_allowed(getattr(config, name)), allowed)


def require_positive_integers(config: Any, *names: str) -> None:
    """Raise ValueError for the first named field that is not positive."""
    require_each(config, names, lambda value: value > 0, "a positive integer")


def require_positive_numbers(config: Any, *names: str) -> None:
    """Raise ValueError for the first named field that is not positive."""
    require_each(config, names, lambda value: value > 0, "a positive number")


def require_not_negative(config: Any, *names: str) -> None:
    """Raise ValueError for the first named field that is negative."""
    require_each(config, names, lambda value: value >= 0, "0 or more")


def require_at_most_one(config: Any, *names: str) -> None:
    """Raise ValueError if more than one of these fields, which are alternatives, is set."""
    used = [name for name in names if getattr(config, name)]
    if len(used) > 1:
        others = " and ".join(flag_name(name) for name in used[:-1])
        require_setting(config, used[-1], False, f"only without {others}", "Use one of them.")


def require_choices(config: Any) -> None:
    """Raise ValueError for the first field whose value is not among its choices."""
    for f in dataclasses.fields(config):
        choices = f.metadata.get("choices")
        if choices:
            allowed = " ".join(map(str, choices))
            require_setting(config, f.name, getattr(config, f.name) in choices, allowed)
