"""The expert type of a run, whose options are flags with the prefix --expert-.

The types live in a higher layer, as gates do, so the parser receives functions that find
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.flag_parser import FlagParser
from megatron.config.flags import EXPERT_OPTIONS, flags_of, index_flags
from megatron.config.moe import MoEConfig
from megatron.config.run_json import parse_stored_values
from megatron.log import warn_on_rank0


@dataclass(frozen=True)
class _NoOptions:
    """Options of an expert type without any."""


def _without_options(name: str) -> type:
    return _NoOptions


@dataclass(frozen=True)
class ExpertTypes:
    """The expert types that a program knows."""

    config_class: Callable[[str], type] = _without_options
    """returns the Config of a type by name; raises ValueError for an unknown name"""
    names: Callable[[], Iterable[str]] = tuple
    """returns the names of all types, for --help and for messages about flags of another type"""


NO_EXPERT_TYPES = ExpertTypes()
"""Of programs that accept any --expert-type, without options"""


@dataclass(frozen=True)
class ExpertChoice:
    """The expert type of a run, and the others that could be chosen."""

    name: str
    is_flag: bool
    """whether a flag named it, instead of a run.json or the default"""
    config_class: type
    types: ExpertTypes

    @property
    def sections(self) -> dict[str, type]:
        """Config class of the type's options, by section."""
        return {EXPERT_OPTIONS: self.config_class}

    @property
    def titles(self) -> dict[str, str]:
        """Title of the type's options in --help, by section; only if a flag named the type."""
        if not self.is_flag:
            return {}
        return {EXPERT_OPTIONS: f"expert type {self.name}"}

    def reset(self, classes: dict[str, type], values: dict[str, dict[str, Any]]) -> None:
        """Return to the default type: one that was set has no effect.

        Args:
            classes: Config class of each section; changed in place.
            values: values of each section; changed in place.
        """
        classes[EXPERT_OPTIONS] = self.types.config_class(MoEConfig.expert_type)
        values[EXPERT_OPTIONS] = {}

    def explain(self, flag: str) -> str:
        """Return the error message about a flag of another type, or "" if it is of none."""
        owners = []
        for name in self.types.names():
            config_class = self.types.config_class(name)
            if name != self.name and flag in index_flags({EXPERT_OPTIONS: config_class}):
                owners.append(name)
        if not owners:
            return ""
        return (
            f"{flag} belongs to --expert-type {' or '.join(sorted(owners))}, but the expert type "
            f"is {self.name}; leave the flag out or choose another type"
        )


def choose_expert_type(
    words: Sequence[str], stored: dict[str, dict[str, Any]], path: str, types: ExpertTypes
) -> ExpertChoice:
    """Choose the expert type, and keep in `stored` only options of that type.

    Args:
        words: the command line.
        stored: sections of a run.json; changed in place.
        path: the run.json.
    Raises:
        ValueError: no such type, or a stored option is unknown or has a wrong type.
    """
    parser = FlagParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--expert-type")
    named = parser.parse_known_args(list(words))[0].expert_type
    stored_name = stored.get("moe", {}).get("expert_type", MoEConfig.expert_type)
    name = named or stored_name
    config_class = types.config_class(name)
    options = stored.pop(EXPERT_OPTIONS, {})
    if name == stored_name:
        flags = flags_of(config_class, EXPERT_OPTIONS)
        stored[EXPERT_OPTIONS] = parse_stored_values(options, EXPERT_OPTIONS, flags, path)
    elif options:
        warn_on_rank0(
            "--expert-type %s replaces %s of %s: the expert options stored there are dropped",
            name,
            stored_name,
            path,
        )
    return ExpertChoice(name, bool(named), config_class, types)
