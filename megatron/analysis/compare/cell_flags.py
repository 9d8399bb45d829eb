"""Flags of a cell: values by name, as in a study file, and as words of a command line."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from megatron.config.training import LENGTH_FIELDS
from megatron.config.values import format_flag

FlagValues = dict[str, Any]
"""Values of flags by name without dashes: text, a number, true or false for a switch, a list of
several words, or None for a flag that is left out although `base` sets it"""

RUNNER_FLAGS = {
    "save": "each cell has its own folder for checkpoints",
    "load": "a cell continues from its own checkpoints",
    "load-or-init": "a cell continues from its own checkpoints",
    "load-step": "a cell continues from its own checkpoints",
    "finetune": "a cell continues from its own checkpoints",
    "metrics-file": "each cell has its own file",
    "tensorboard-dir": "metrics are in metrics.jsonl of each cell",
    "config": "write the flags into the study, so that it is complete",
    "skip-train": "a cell trains",
    "exit-interval": "a cell runs to its end; an interrupted one continues with the next start",
    "exit-duration-in-mins": "a cell runs to its end; an interrupted one continues with the next "
    "start",
}
"""Flags that a study may not set, because the runner does or the cells would not be complete"""

LENGTH_FLAGS = tuple(name.replace("_", "-") for name in LENGTH_FIELDS.values())
"""Flags of which a run sets one: the length of the training"""

_FLAG_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)?", re.IGNORECASE)


def normalized_name(name: str) -> str:
    """Return the name of a flag without dashes in front, with hyphens: `--train_iters`."""
    return name.removeprefix("--").replace("_", "-")


def is_flag_name(name: Any) -> bool:
    """Return whether a key of a study file can be the name of a flag."""
    return isinstance(name, str) and _FLAG_NAME.fullmatch(name.removeprefix("--")) is not None


def is_flag_value(value: Any) -> bool:
    """Return whether a value of a study file can be that of a flag; see `FlagValues`."""
    if isinstance(value, list):
        return all(isinstance(word, (str, int, float)) for word in value) and not any(
            isinstance(word, bool) or str(word).startswith("--") for word in value
        )
    return value is None or isinstance(value, (str, int, float))


def flags_from_words(words: list[str]) -> FlagValues:
    """Return the flags of a command line by name; those without a value are True.

    Raises:
        ValueError: a word follows no flag.
    """
    flags: FlagValues = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = normalized_name(name)
            flags[name] = value if equals else True
            continue
        if not name:
            raise ValueError(f"{word!r} follows no flag; allowed: --flag value ...")
        if flags[name] is True:
            flags[name] = word
        elif isinstance(flags[name], list):
            flags[name].append(word)
        else:
            flags[name] = [flags[name], word]
    return flags


def to_words(flags: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that set these flags.

    Raises:
        ValueError: an element of a list starts with "--", which would be read as a flag.
    """
    words = []
    for name, value in flags.items():
        if value is not None:
            words += format_flag(f"--{name}", value)
    return words


def identity(flags: Mapping[str, Any], ranks: int) -> str:
    """Return a hash of what a cell runs: it changes if, and only if, a flag or the ranks do."""
    by_name = {name: to_words({name: value}) for name, value in flags.items()}
    present = {name: words for name, words in by_name.items() if words}
    content = json.dumps([present, ranks], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def changed_flags(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe how the flags of a cell differ from those that it ran with, for a message."""
    changes = []
    for name in sorted({*before, *now}):
        old = to_words({name: before.get(name)})
        new = to_words({name: now.get(name)})
        if old != new:
            shown = [shlex.join(words) or f"no --{name}" for words in (old, new)]
            changes.append(f"{shown[0]}, now {shown[1]}")
    return "; ".join(changes)


def without_length(flags: Mapping[str, Any]) -> FlagValues:
    """Return flags without the length of the training."""
    return {name: value for name, value in flags.items() if name not in LENGTH_FLAGS}
