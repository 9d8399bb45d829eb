"""Settings that an option needs to have an effect, declared with the option.

    keep_every: int = option(0, needs=setting("keep_last"))
    moe_min_capacity: int = option(
        4, needs=setting("moe_train_capacity_factor") | setting("moe_eval_capacity_factor")
    )

`megatron.config.effect` checks them for the flags and the run.json of a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A field, and the values of it at which another option has an effect."""

    name: str
    values: tuple = ()
    """the values; empty: all that are above `above`, on, or not empty"""
    above: float = 0

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Return whether the field has such a value."""
        value = values[self.name]
        if self.values:
            return value in self.values
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value > self.above
        return bool(value)

    def describe(self, spelling: str) -> str:
        """Return the setting as it is written on a command line.

        Args:
            spelling: the flag of the field.
        """
        if self.values:
            return f"{spelling} {' or '.join(map(str, self.values))}"
        if self.above:
            return f"{spelling} above {self.above:g}"
        return spelling


@dataclass(frozen=True)
class Need:
    """What an option needs to have an effect: any one of several settings, or a rule."""

    settings: tuple[Setting, ...] = ()
    rule: Callable[[Mapping[str, Any]], bool] | None = None
    """decides from the values by field, where settings cannot express the need"""
    text: str = ""
    """description of the rule that follows "it has an effect only with" """
    resets: bool = False
    """whether flags without it are reset with a warning instead of refused"""

    def __or__(self, other: Need) -> Need:
        return Need(self.settings + other.settings)

    def resetting(self) -> Need:
        """Return the same need of options that are often left in a command line without it."""
        return dataclasses.replace(self, resets=True)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Return whether the option has an effect.

        Args:
            values: all values by field. A need of a field that is not among them, as in a
                tool that has the flags of some sections only, counts as fulfilled.
        """
        if self.rule:
            return self.rule(values)
        if any(setting.name not in values for setting in self.settings):
            return True
        return any(setting.holds(values) for setting in self.settings)


def setting(name: str, *values: Any, above: float = 0) -> Need:
    """Return the need of one field.

    Args:
        name: the field, of any section or of the gate.
        values: those that fulfil the need; none: see `above`.
        above: a number fulfils the need when it is larger, other values when they are on or
            not empty.
    """
    return Need((Setting(name, values, above),))


TRAINING = setting("skip_train", False).resetting()
"""The need of options of training: --skip-train is added to the command line of a training"""
