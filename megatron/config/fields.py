"""What config classes are made of: fields with extra spellings or choices, and checks with one form of message."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any


def option(default: Any, *flags: str, choices: tuple | None = None) -> Any:
    """A dataclass field with extra flag spellings or a closed set of values."""
    metadata = {"flags": flags, "choices": choices}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(ok: bool, what: str, value: Any, allowed: str, advice: str = "") -> None:
    """Raise ValueError in the project's one form: what was set, to what, what is allowed, what to do next."""
    if not ok:
        raise ValueError(
            f"{what} is {value!r}; allowed: {allowed}" + (f". {advice}" if advice else "")
        )


def require_choices(config: Any) -> None:
    """Raise ValueError for a field whose value is not among its choices."""
    for f in dataclasses.fields(config):
        choices, value = f.metadata.get("choices") or (), getattr(config, f.name)
        require(
            not choices or value in choices,
            f"--{f.name.replace('_', '-')}",
            value,
            " ".join(map(str, choices)),
        )
