"""argparse parsers for generated flags; used by training and by the tools."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from megatron.config.effect import require_effect, values_by_name
from megatron.config.fields import flag_name
from megatron.config.flags import Flag, flags_of, is_options_section, negative_spellings
from megatron.config.values import parse_value

_METAVARS = {int: "N", float: "X", str: "TEXT"}
Section = TypeVar("Section")


class FlagParser(argparse.ArgumentParser):
    """A parser that raises ValueError with one line where argparse prints its usage and exits."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; --help-all lists all flags")


class _Switch(argparse.Action):
    """Action of boolean flags: --x sets True, --no-x sets False."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        self.negative = negative_spellings(option_strings)
        super().__init__([*option_strings, *self.negative], dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string not in self.negative)


def add_flag(
    group: argparse._ActionsContainer, flag: Flag, default: Any, *, is_hidden: bool = False
) -> None:
    """Add a flag to a parser or group. Its value stays None when it is not given.

    Args:
        default: value shown in the help text.
        is_hidden: leave the flag out of the help text.
    Raises:
        ValueError: the parser has the flag, such as --help.
    """
    for spelling in flag.all_spellings:
        if spelling in group._option_string_actions:
            raise ValueError(
                f"the flag {spelling} of {flag.section}.{flag.name} is taken by one of every "
                "program; rename the field"
            )
    facts = "; ".join([f"default: {_shown(default)}", *_shown_needs(flag)])
    text = f"{flag.help} ({facts})".strip().replace("%", "%%")
    if is_hidden:
        text = argparse.SUPPRESS
    if flag.type.base is bool:
        group.add_argument(*flag.spellings, dest=flag.dest, action=_Switch, help=text)
        return
    metavar = _METAVARS[flag.type.base]
    if flag.choices:
        metavar = "{" + ",".join(map(str, flag.choices)) + "}"
    group.add_argument(
        *flag.spellings,
        dest=flag.dest,
        metavar=metavar,
        nargs="+" if flag.type.is_list else None,
        action="extend" if flag.repeatable else "store",
        help=text,
    )


def add_section_flags(
    parser: argparse.ArgumentParser, cls: type, description: str | None = None
) -> None:
    """Add the flags of one config class to the parser of a tool, as a group.

    Read them with `section_values` or `section_from_args`.

    Args:
        description: text above the flags in --help; None: the docstring of the class.
    """
    section = _section_name(cls)
    group = parser.add_argument_group(section, description or cls.__doc__)
    for flag in flags_of(cls, section):
        add_flag(group, flag, flag.default)


def section_values(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the fields of a config class that were set by flags, converted to their types.

    Raises:
        ValueError: a value does not have its field's type, or is not among the choices.
    """
    values = {}
    for flag in flags_of(cls, _section_name(cls)):
        raw = getattr(args, flag.dest)
        if raw is not None:
            values[flag.name] = parse_value(flag, raw, flag.spellings[0])
    return values


def section_from_args(args: argparse.Namespace, cls: type[Section]) -> Section:
    """Build a config class from the flags that `add_section_flags` added.

    Raises:
        ValueError: as `section_values`, or the class refuses the values, or a flag has no
            effect.
    """
    values = section_values(args, cls)
    section = _section_name(cls)
    config = cls(**values)
    flags = flags_of(cls, section)
    given = [flag for flag in flags if flag.name in values]
    require_effect(given, values_by_name({section: config}), flags)
    return config


def _section_name(cls: type) -> str:
    """Return the name of a config class as a section: TokenizerConfig is "tokenizer"."""
    return cls.__name__.removesuffix("Config").lower()


def _shown_needs(flag: Flag) -> list[str]:
    """Return what a flag needs to have an effect, as --help shows it; for gates not experts."""
    shown = []
    for need in flag.needs:
        names = [setting.name for setting in need.settings]
        if need.resets:
            continue  # of every option of training
        if need.rule:
            shown.append(f"only with {need.text}")
        elif need.settings[0].values == (False,):
            shown.append(f"only without {flag_name(names[0])}")
        elif not is_options_section(flag.section) or names != ["num_experts"]:
            texts = [setting.describe(flag_name(setting.name)) for setting in need.settings]
            shown.append(f"only with {' or '.join(texts)}")
    return shown


def _shown(value: Any) -> str:
    """Return a default value as --help shows it."""
    if value is True:
        return "on"
    if value is False:
        return "off"
    if isinstance(value, (tuple, list)):
        value = " ".join(map(str, value))
    if value == "":
        return "empty"
    return str(value)
