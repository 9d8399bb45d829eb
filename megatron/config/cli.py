"""Dataclass fields become flags; run.json in and out. No flag is listed by hand.

Two passes: `--gate` is read first, and then that gate's own options are flags like all others. The gates live above
this layer, so the caller passes in how to find them, be it pretrain_gpt.py or a tool with the same flags:

    parse(argv, gates.config_of, gates.available)

Every error is a ValueError with one line, for the caller to print before it exits with status 2.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import json
import logging
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from megatron import __version__
from megatron.config import gate_overrides
from megatron.config.schema import RUN_JSON_LAYOUT, SECTIONS, MoEConfig, RunConfig, require
from megatron.io.atomic_write import write_text

# XMoE's spellings of --gate.
GATE_ALIASES = {
    "--use-threshold": "threshold",
    "--use-topk": "topk",
    "--use-hash-layer": "hash",
    "--use-base-layer": "base",
}
# Options of gates that Megatron has under another name; the plain name works too.
MEGATRON_NAMES = {
    "loss_coeff": "--moe-loss-coeff",
    "z_loss_coeff": "--moe-z-loss-coeff",
    "balance_scope": "--moe-balance-scope",
}
KINDS = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}
METAVARS = {int: "N", float: "X", str: "TEXT"}
Options = TypeVar("Options")


@dataclass(frozen=True)
class Flag:
    """One field of a config class as a flag."""

    section: str
    name: str
    spellings: tuple[str, ...]
    """with hyphens; the first is the one we write"""
    kind: type
    """int, float, str or bool; of the elements, when there are many"""
    many: bool
    optional: bool
    choices: tuple
    default: Any
    help: str

    @property
    def dest(self) -> str:
        return f"{self.section}.{self.name}"


def parse(
    argv: Sequence[str] | None,
    gate_config: Callable[[str], type],
    gate_names: Callable[[], Iterable[str]] = tuple,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> RunConfig:
    """The run's configuration from flags, `--config run.json` and defaults, in this order of precedence.

    The stored gate options of run.json count only while the gate is the one stored with them. When flags name another
    gate they are dropped, all of them and with a warning: equal names mean different things (topk is a count for one
    gate and a cap for another), so the new gate starts from its own defaults.

    Args:
        argv: without the program's name; None: sys.argv[1:].
        gate_config: name -> that gate's Config class; raises ValueError for an unknown name.
        gate_names: all gates, for --help and to say whose a foreign flag is.
    Raises:
        ValueError: a line that says what was set, where, what is allowed.
        SystemExit: with status 0, after --help or --version.
    """
    return parse_with(None, argv, gate_config, gate_names, prog=prog, description=description)[
        0
    ]


def parse_with(
    options: type[Options] | None,
    argv: Sequence[str] | None,
    gate_config: Callable[[str], type],
    gate_names: Callable[[], Iterable[str]] = tuple,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> tuple[RunConfig, Options | None]:
    """`parse` for a tool with flags of its own: the fields of the dataclass `options`. See `parse`."""
    tokens = list(_normalise(sys.argv[1:] if argv is None else argv))
    gate, path = _first_pass(tokens)
    stored = _sections(_load_json(path), path) if path else {}
    stored_gate = stored.get("moe", {}).get("gate", MoEConfig.gate)
    gate = gate or stored_gate
    # A gate that is gone may be replaced.
    derived = (
        gate_overrides.drop_derived(stored, gate_config(stored_gate))
        if stored_gate in {gate, *gate_names()}
        else ""
    )
    classes = {**SECTIONS, "gate_options": gate_config(gate)}
    if options is not None:
        classes["options"] = options
    if gate == stored_gate:
        gate_flags = flags_of(classes["gate_options"], "gate_options")
        stored["gate_options"] = _typed(
            stored.get("gate_options", {}),
            "gate_options",
            {flag.name: flag for flag in gate_flags},
            path,
        )
    elif stored.pop("gate_options", {}):
        logging.getLogger(__name__).warning(
            "--gate %s replaces %s of %s: the gate options stored there are dropped%s, and %s starts from its own "
            "defaults",
            gate,
            stored_gate,
            path,
            derived,
            gate,
        )

    gates = {name: gate_config(name) for name in gate_names()}
    known = _index(classes)
    namespace, extra = _parser(
        classes, stored, gate, gates, prog, description
    ).parse_known_args(tokens)
    if extra:
        raise ValueError(_complaint(extra[0], known, gate, gates))
    values = {section: dict(stored.get(section, {})) for section in classes}
    for flag in dict.fromkeys(known.values()):
        raw = getattr(namespace, flag.dest, None)
        if raw is not None:
            values[flag.section][flag.name] = _value(flag, _unescape(raw), flag.spellings[0])
    values["moe"]["gate"] = gate
    built = {
        section: cls(**values[section]) for section, cls in classes.items() if section != "moe"
    }
    extras = built.pop("options", None)
    gate_overrides.apply(built["gate_options"], values["moe"], built["model"].num_layers, gate)
    built["moe"] = MoEConfig(**values["moe"])
    built["gate_options"] = dataclasses.asdict(built["gate_options"])
    return RunConfig(**built), extras


def to_flags(config: RunConfig) -> list[str]:
    """Flags that parse to `config`: what differs from the defaults, and every gate option.

    Raises:
        ValueError: an element of a list starts with "--", which only run.json can hold.
    """
    words = []
    for section, cls in SECTIONS.items():
        part = getattr(config, section)
        for flag in flags_of(cls, section):
            if getattr(part, flag.name) != flag.default:
                words += _words(flag.spellings[0], getattr(part, flag.name))
    for name, value in config.gate_options.items():
        words += _words(_spellings(name, "gate_options")[0], value)
    return words


def write_run_json(config: RunConfig, path: str | Path) -> None:
    """Write `config` as JSON, nested by section, as `write_text` does."""
    write_text(path, json.dumps(config.to_dict(), indent=2) + "\n")


def read_run_json(path: str | Path) -> RunConfig:
    """What `write_run_json` wrote, or the configuration in a checkpoint's run.json. Raises as `from_dict` does."""
    return from_dict(_load_json(path), str(path))


def from_dict(content: dict[str, Any], where: str = "run.json") -> RunConfig:
    """The inverse of `RunConfig.to_dict`; keys that are missing take their defaults.

    Gate options are taken as they are: the gate's own Config judges them.

    Args:
        where: named in error messages.
    Raises:
        ValueError: an unknown key (the nearest is named), or a value that its class refuses.
    """
    sections = _sections(content, where)
    gate_options = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in sections.pop("gate_options", {}).items()
    }
    try:
        return RunConfig(
            **{s: SECTIONS[s](**values) for s, values in sections.items()},
            gate_options=gate_options,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# From fields to flags


@functools.cache
def flags_of(cls: type, section: str) -> tuple[Flag, ...]:
    """The flags of a config class, in the order of its fields.

    Raises:
        ValueError: a field has no default, or a type no flag can have.
    """
    hints, docs = typing.get_type_hints(cls), _field_docs(cls)
    flags = []
    for field in dataclasses.fields(cls):
        where = f"{cls.__module__}.{cls.__qualname__}.{field.name}"
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        if default is dataclasses.MISSING:
            raise ValueError(f"{where} has no default; every field of a config class needs one")
        kind, many, optional = _kind(hints[field.name], where)
        spellings = _spellings(field.name, section, field.metadata.get("flags") or ())
        choices = tuple(field.metadata.get("choices") or ())
        flags.append(
            Flag(
                section,
                field.name,
                spellings,
                kind,
                many,
                optional,
                choices,
                default,
                docs.get(field.name, ""),
            )
        )
    return tuple(flags)


def _kind(hint: Any, where: str) -> tuple[type, bool, bool]:
    """(type of one value, many of them?, may it be None?) of an annotation."""
    kind, many, optional = hint, False, False
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        kind, optional = rest[0] if len(rest) == 1 else hint, True
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (Ellipsis,):
        kind, many = typing.get_args(kind)[0], True
    if kind not in KINDS or (kind is bool and (many or optional)):
        raise ValueError(
            f"{where} has the type {hint}; a flag can be int, float, str, bool, tuple[T, ...] of the "
            "first three, or one of these or None"
        )
    return kind, many, optional


def _spellings(name: str, section: str, others: Iterable[str] = ()) -> tuple[str, ...]:
    plain = "--" + name.replace("_", "-")
    first = MEGATRON_NAMES.get(name, plain) if section == "gate_options" else plain
    return tuple(dict.fromkeys((first, plain, *(flag.replace("_", "-") for flag in others))))


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field, by name. Without the source text (a frozen program, a prompt) there are none."""
    docs = {}
    for base in reversed(cls.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        except (OSError, TypeError, SyntaxError):
            continue
        for field, doc in zip(body, body[1:]):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
                and isinstance(doc.value.value, str)
            ):
                docs[field.target.id] = " ".join(doc.value.value.split())
    return docs


def _index(classes: dict[str, type]) -> dict[str, Flag]:
    """All flags by spelling, switches also by their --no- form."""
    index: dict[str, Flag] = {}
    for section, cls in classes.items():
        for flag in flags_of(cls, section):
            for spelling in (
                *flag.spellings,
                *(_negations(flag.spellings) if flag.kind is bool else ()),
            ):
                if index.setdefault(spelling, flag) is not flag:
                    raise ValueError(
                        f"the flag {spelling} of {cls.__module__}.{cls.__qualname__} is taken by "
                        f"{index[spelling].dest}; rename the field"
                    )
    return index


def _negations(spellings: Iterable[str]) -> list[str]:
    return ["--no-" + spelling.removeprefix("--") for spelling in spellings]


# The parser


class _Parser(argparse.ArgumentParser):
    """Raises ValueError with one line where argparse prints its usage and exits."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; --help lists all flags")


class _Switch(argparse.Action):
    """--x sets True, --no-x False."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        self.negative = _negations(option_strings)
        super().__init__([*option_strings, *self.negative], dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string not in self.negative)


def _normalise(argv: Sequence[str]) -> Iterator[str]:
    """Hyphens for underscores in flags. We have no one-letter flags, so `-x` can only be a value: hide its hyphen."""
    for i, token in enumerate(argv):
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            yield name.replace("_", "-") + equals + value
        elif i == 0 and token == "-h":
            yield "--help"
        else:
            yield "\0" + token if token.startswith("-") else token


def _unescape(raw: Any) -> Any:
    if isinstance(raw, list):
        return [_unescape(element) for element in raw]
    return raw.removeprefix("\0") if isinstance(raw, str) else raw


def _first_pass(tokens: list[str]) -> tuple[str | None, str]:
    """(the gate that flags name, if any; the path given to --config)."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gate")
    parser.add_argument("--config", default="")
    for alias in GATE_ALIASES:
        parser.add_argument(
            alias, dest="aliases", action="append_const", const=alias, default=[]
        )
    told, _ = parser.parse_known_args(tokens)
    named = {GATE_ALIASES[alias]: alias for alias in told.aliases}
    if told.gate:
        named.setdefault(told.gate, f"--gate {told.gate}")
    if len(named) > 1:
        raise ValueError(
            f"{' and '.join(named.values())} name different gates; give one of them"
        )
    return next(iter(named), None), told.config


def _parser(
    classes: dict[str, type],
    stored: dict[str, dict],
    gate: str,
    gates: Iterable[str],
    prog: str | None,
    description: str | None,
) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        add_help=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=36),
    )
    general = parser.add_argument_group("general")
    general.add_argument("--help", action="help", help="show this and exit")
    general.add_argument(
        "--version",
        action="version",
        version=f"moe-megatron {__version__}",
        help="show the version and exit",
    )
    general.add_argument(
        "--config",
        metavar="FILE",
        help="run.json of another run; flags take precedence over it",
    )
    # The DeepSpeed launcher adds the first, and scripts written for Megatron-DeepSpeed the second; neither says
    # anything new: the rank is in the environment, and the engine is always DeepSpeed's.
    general.add_argument("--local-rank", help=argparse.SUPPRESS)
    general.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    for section, cls in classes.items():
        title, text = section, cls.__doc__
        if section == "gate_options":
            title, text = (
                f"gate {gate}",
                f"The gate's own flags. Gates: {' '.join(sorted({gate, *gates}))}",
            )
        group = parser.add_argument_group(title, text)
        for flag in flags_of(cls, section):
            _add(group, flag, stored.get(section, {}).get(flag.name, flag.default))
        if section == "moe":
            for alias, name in GATE_ALIASES.items():
                group.add_argument(
                    alias, action="store_true", help=f"the same as --gate {name}"
                )
    return parser


def _add(group: argparse._ArgumentGroup, flag: Flag, value: Any) -> None:
    shown = {True: "on", False: "off"}[value] if flag.kind is bool else value
    if flag.many and value is not None:
        shown = " ".join(map(str, value))
    text = f"{flag.help} (default: {'empty' if shown == '' else shown})".strip().replace(
        "%", "%%"
    )
    if flag.kind is bool:
        group.add_argument(*flag.spellings, dest=flag.dest, action=_Switch, help=text)
    else:
        metavar = (
            "{" + ",".join(map(str, flag.choices)) + "}"
            if flag.choices
            else METAVARS[flag.kind]
        )
        group.add_argument(
            *flag.spellings,
            dest=flag.dest,
            metavar=metavar,
            nargs="+" if flag.many else None,
            help=text,
        )


def _complaint(token: str, known: Iterable[str], gate: str, gates: dict[str, type]) -> str:
    """What to say about an argument that is no flag of this run."""
    flag = token.partition("=")[0]
    if not flag.startswith("--"):
        return f"unexpected argument {_unescape(token)!r}; every value follows its flag"
    owners = sorted(
        name
        for name, cls in gates.items()
        if name != gate and flag in _index({"gate_options": cls})
    )
    if owners:
        return (
            f"{flag} belongs to --gate {' or '.join(owners)}, but the gate is {gate}; "
            "leave the flag out or choose another gate"
        )
    near = difflib.get_close_matches(flag, [*known, *GATE_ALIASES], n=1)
    return (
        f"{flag} is no flag; "
        + (f"did you mean {near[0]}? " if near else "")
        + "--help lists all flags"
    )


# Values


def _value(flag: Flag, raw: Any, what: str) -> Any:
    """A value from the command line (text, or a list of text) or from JSON, in the flag's type.

    An empty text alone is the empty list: `--data-path ""` takes back what run.json set. `none` is None where allowed.
    """
    if flag.optional and raw in (None, "none", ["none"]):
        return None
    if not flag.many:
        return _element(flag, raw, what)
    require(isinstance(raw, list), what, raw, f"a list, each element {KINDS[flag.kind]}")
    return () if raw == [""] else tuple(_element(flag, element, what) for element in raw)


def _element(flag: Flag, raw: Any, what: str) -> Any:
    value = None
    if flag.kind in (str, bool):
        value = raw if isinstance(raw, flag.kind) else None
    elif isinstance(raw, (str, int, float)) and not isinstance(raw, bool):
        value = _number(flag.kind, raw)
    allowed = " ".join(map(str, flag.choices)) or KINDS[flag.kind]
    require(
        value is not None and (not flag.choices or value in flag.choices), what, raw, allowed
    )
    return value


def _number(kind: type, raw: str | int | float) -> int | float | None:
    """1e6 and 10_000 are integers too; numbers beyond 64 bits, infinities and NaN are none of ours."""
    try:
        exact, rounded = Decimal(raw), float(raw)
    except (ValueError, ArithmeticError):
        return None
    if not math.isfinite(rounded):
        return None
    if kind is float:
        return rounded
    return int(exact) if abs(exact) < 2**63 and exact == exact.to_integral_value() else None


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else _negations([flag])[0]]
    if not isinstance(value, (tuple, list)):
        return [f"{flag}={'none' if value is None else value}"]
    for element in value:
        require(
            not str(element).startswith("--"),
            flag,
            element,
            'text that does not start with "--"',
            "Put it into run.json instead.",
        )
    return [flag, *map(str, value)] if value else [f"{flag}="]


# run.json


def _load_json(path: str | Path) -> Any:
    """A run.json; of a checkpoint's, which also names tokenizer and topology, the configuration."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give the path of a run.json"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return content["config"] if isinstance(content, dict) and "config" in content else content


def _sections(content: Any, where: str) -> dict[str, dict[str, Any]]:
    """Return the config sections stored in a run.json, with their values checked and typed.

    Gate options are returned as they are: their gate may not be known yet.
    """
    require(isinstance(content, dict), where, content, "a JSON object")
    for stored_section, values in content.items():
        if stored_section not in RUN_JSON_LAYOUT:
            raise ValueError(_unknown_key(where, stored_section, list(RUN_JSON_LAYOUT)))
        require(isinstance(values, dict), f"{where}: {stored_section}", values, "a JSON object")
    sections: dict[str, dict[str, Any]] = {}
    for stored_section, values in content.items():
        if stored_section == "gate_options":
            sections["gate_options"] = values
            continue
        flags = {}
        for section in RUN_JSON_LAYOUT[stored_section]:
            flags.update({flag.name: flag for flag in flags_of(SECTIONS[section], section)})
        for name, value in _typed(values, stored_section, flags, where).items():
            sections.setdefault(flags[name].section, {})[name] = value
    return sections


def _typed(
    values: dict[str, Any], stored_section: str, flags: dict[str, Flag], where: str
) -> dict[str, Any]:
    """Check the keys of one section of run.json and convert its values to their types."""
    for name in values:
        if name not in flags:
            known = [f"{stored_section}.{known}" for known in flags]
            raise ValueError(_unknown_key(where, f"{stored_section}.{name}", known))
    return {
        name: _value(flags[name], value, f"{where}: {stored_section}.{name}")
        for name, value in values.items()
    }


def _unknown_key(where: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"{where}: unknown key {key!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"allowed: {' '.join(known)}"
    )
