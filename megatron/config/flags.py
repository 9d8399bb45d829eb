"""Command-line flags generated from the fields of config classes. No flag is listed by hand.

The flag of a field is its name with hyphens: `train_iters` is set by `--train-iters`. The
string under a field is the flag's help text.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.config.fields import flag_name
from megatron.config.needs import Need, setting

# Flags of gate options that have another name in Megatron; the plain name works too.
_MEGATRON_NAMES = {
    "loss_coeff": "--moe-loss-coeff",
    "z_loss_coeff": "--moe-z-loss-coeff",
    "balance_scope": "--moe-balance-scope",
}
EXPERT_OPTIONS = "expert_options"
"""Section of the options of the expert type"""
_FLAG_TYPES = (int, float, str, bool)


@dataclass(frozen=True)
class ValueType:
    """Type of the values that a flag accepts."""

    base: type
    """int, float, str or bool; the type of one element when there are several"""
    is_list: bool = False
    """whether the flag takes several values, as a tuple"""
    is_optional: bool = False
    """whether `none` is a value"""


@dataclass(frozen=True)
class Flag:
    """The flag of one field of a config class."""

    section: str
    """config section of the field, such as "model" """
    name: str
    """name of the field"""
    spellings: tuple[str, ...]
    """flags with hyphens; the first one is preferred when flags are written"""
    type: ValueType
    choices: tuple
    """allowed values; empty: all values of the type"""
    default: Any
    help: str
    needs: tuple[Need, ...] = ()
    """settings without which the option has no effect"""
    repeatable: bool = False
    """whether each further occurrence of the flag adds to the list"""

    @property
    def dest(self) -> str:
        """Path of the value in the configuration; attribute name in argparse's namespace."""
        return f"{self.section}.{self.name}"

    @property
    def key(self) -> str:
        """Name of the value among those of all sections, as needs name it.

        Options of an expert type are named as their flags, since gates may have the same.
        """
        return value_key(self.section, self.name)

    @property
    def all_spellings(self) -> tuple[str, ...]:
        """All spellings, of switches including the negative ones."""
        if self.type.base is bool:
            return (*self.spellings, *negative_spellings(self.spellings))
        return self.spellings


def value_key(section: str, name: str) -> str:
    """Return the key of a field's value among those of all sections; see `Flag.key`."""
    if section == EXPERT_OPTIONS:
        return f"expert_{name}"
    return name


def negative_spellings(spellings: Iterable[str]) -> list[str]:
    """Return the --no-x form of each switch --x; that of --gate.x is --gate.no-x."""
    negative = []
    for spelling in spellings:
        prefix, dot, name = spelling.removeprefix("--").rpartition(".")
        negative.append(f"--{prefix}{dot}no-{name}")
    return negative


@functools.cache
def flags_of(cls: type, section: str) -> tuple[Flag, ...]:
    """Return the flags of a config class, in the order of its fields.

    Raises:
        ValueError: a field has no default, or a type that no flag can have.
    """
    hints = typing.get_type_hints(cls)
    help_texts = _field_docs(cls)
    flags = []
    for field in dataclasses.fields(cls):
        where = f"{cls.__module__}.{cls.__qualname__}.{field.name}"
        flag = Flag(
            section=section,
            name=field.name,
            spellings=flag_spellings(field.name, section, field.metadata.get("flags") or ()),
            type=_value_type(hints[field.name], where),
            choices=tuple(field.metadata.get("choices") or ()),
            default=_default(field, where),
            help=help_texts.get(field.name, ""),
            needs=_needs(field, section),
            repeatable=field.metadata.get("repeatable", False),
        )
        flags.append(flag)
    return tuple(flags)


def flag_spellings(name: str, section: str, others: Iterable[str] = ()) -> tuple[str, ...]:
    """Return all spellings of a field's flag, the preferred one first.

    That is Megatron's name if it has another one, or else the plain name, which begins with
    --expert- for options of an expert type. Flags of the section `gate_options.NAME` begin with
    the name of the gate: --NAME.topk.
    """
    plain = flag_name(value_key(section, name))
    preferred = plain
    if is_gate_section(section):
        preferred = _MEGATRON_NAMES.get(name, plain)
    hyphenated = [spelling.replace("_", "-") for spelling in others]
    spellings = tuple(dict.fromkeys((preferred, plain, *hyphenated)))
    gate = section.partition(".")[2]
    if not gate:
        return spellings
    return tuple(f"{flag_name(gate)}.{s.removeprefix('--')}" for s in spellings)


def is_gate_section(section: str) -> bool:
    """Return whether a section holds the options of a gate."""
    return section.partition(".")[0] == "gate_options"


def is_options_section(section: str) -> bool:
    """Return whether a section holds the options of a gate or of an expert type."""
    return is_gate_section(section) or section == EXPERT_OPTIONS


def index_flags(classes: dict[str, type]) -> dict[str, Flag]:
    """Return the flags of several config classes by spelling, including negative ones.

    Args:
        classes: config class of each section.
    Raises:
        ValueError: two fields have a flag in common.
    """
    index: dict[str, Flag] = {}
    for section, cls in classes.items():
        for flag in flags_of(cls, section):
            for spelling in flag.all_spellings:
                other = index.setdefault(spelling, flag)
                if other is not flag:
                    raise ValueError(
                        f"the flag {spelling} of {cls.__module__}.{cls.__qualname__} is taken "
                        f"by {other.dest}; rename the field"
                    )
    return index


def _needs(field: dataclasses.Field, section: str) -> tuple[Need, ...]:
    """Return what an option needs; all options of a gate or an expert type need experts."""
    needs = field.metadata.get("needs", ())
    if isinstance(needs, Need):
        needs = (needs,)
    if is_options_section(section):
        needs = (setting("num_experts"), *needs)
    return tuple(needs)


def _default(field: dataclasses.Field, where: str) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if field.default is dataclasses.MISSING:
        raise ValueError(f"{where} has no default; every field of a config class needs one")
    return field.default


def _value_type(hint: Any, where: str) -> ValueType:
    """Return the type of a flag's values from the annotation of its field."""
    base = hint
    is_list = False
    is_optional = False
    if typing.get_origin(base) in (typing.Union, types.UnionType):
        members = [arg for arg in typing.get_args(base) if arg is not type(None)]
        is_optional = True
        if len(members) == 1:
            base = members[0]
    if typing.get_origin(base) is tuple and typing.get_args(base)[1:] == (Ellipsis,):
        base = typing.get_args(base)[0]
        is_list = True
    if base not in _FLAG_TYPES or (base is bool and (is_list or is_optional)):
        raise ValueError(
            f"{where} has the type {hint}; a flag can be int, float, str, bool, tuple[T, ...] "
            "of the first three, or one of these or None"
        )
    return ValueType(base, is_list, is_optional)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """Return the string under each field, by field name.

    The strings are read from the source text; where there is none (a frozen program, an
    interactive session), the result is empty.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base))
            body = ast.parse(source).body[0].body
        except (OSError, TypeError, SyntaxError):
            continue
        docs.update(_docs_in(body))
    return docs


def _docs_in(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Yield (field name, docstring) of each annotated field that is followed by a string."""
    for field, following in zip(body, body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(following, ast.Expr):
            continue
        doc = following.value
        if isinstance(doc, ast.Constant) and isinstance(doc.value, str):
            yield field.target.id, " ".join(doc.value.split())
