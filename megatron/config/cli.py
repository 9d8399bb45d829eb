"""The command line of a training run, also accepted by tools that take the same flags.

Parsing has two passes: the first finds `--gate`, `--gate-path` and `--config`; the second knows
the chosen gates' own options as flags like all others. The gates live in a higher layer, so the
caller passes functions that find them:

    parse(argv, gate_config_class, available_gates, import_gate_files)

Every error is a ValueError with one line, for the caller to print before it exits with
status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from megatron import __version__
from megatron.config.checkpoint import LOAD_OPTIONS
from megatron.config.effect import (
    require_effect,
    reset_without_effect,
    unmet_need,
    values_by_name,
)
from megatron.config.expert_choice import (
    NO_EXPERT_TYPES,
    ExpertChoice,
    ExpertTypes,
    choose_expert_type,
)
from megatron.config.flag_parser import FlagParser, add_flag
from megatron.config.flags import EXPERT_OPTIONS, Flag, flags_of, index_flags, is_gate_section
from megatron.config.foreign_names import ALIASES, NOT_NEEDED, NOT_SUPPORTED, translate
from megatron.config.gate_choice import (
    GateChoice,
    choose_gates,
    options_by_gate,
    sections_of_each_gate,
)
from megatron.config.gate_path import (
    ImportGateFiles,
    find_gate_paths,
    import_gate_paths,
    pop_stored_paths,
    with_stored_paths,
)
from megatron.config.run_sections import RunSections
from megatron.config.schema import SECTIONS, CheckpointConfig, RunConfig
from megatron.config.short_help import new_parser, short_help
from megatron.config.stored_settings import ReadHFConfig, load_stored_settings
from megatron.config.values import format_flag, parse_value
from megatron.log import warn_on_rank0

# XMoE's spellings of --gate.
GATE_ALIASES = {
    "--use-threshold": "threshold",
    "--use-topk": "topk",
    "--use-hash-layer": "hash",
    "--use-base-layer": "base",
}
# Marks a word that starts with one hyphen as a value while argparse runs; see `_normalize`.
_VALUE_MARK = "\0"
Options = TypeVar("Options")


def parse(
    argv: Sequence[str] | None,
    gate_config: Callable[[str], type],
    gate_names: Callable[[], Iterable[str]] = tuple,
    import_gate_files: ImportGateFiles | None = None,
    *,
    expert_types: ExpertTypes = NO_EXPERT_TYPES,
    read_hf_config: ReadHFConfig | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> RunConfig:
    """Return the run's configuration: flags take precedence over `--config run.json`, which
    takes precedence over defaults.

    The stored options of a gate apply only to this gate. When flags name other gates, those
    of gates that the run does not have are dropped with a warning: the same name means
    different things for different gates (topk is a count for one and a limit for another),
    so a new gate starts from its own defaults.

    Args:
        argv: arguments without the program's name; None: sys.argv[1:].
        gate_config: returns the Config class of a gate by name; raises ValueError for an
            unknown name.
        gate_names: returns the names of all gates, for --help and for messages about flags
            of another gate.
        import_gate_files: imports the files of --gate-path, before any other flag is parsed.
        expert_types: the expert types that --expert-type may name.
        read_hf_config: reads the settings of the model that --init-from-hf names, which take
            precedence over --config; None: the program cannot start from one.
    Raises:
        ValueError: one line that says what was set, where, and what is allowed.
        SystemExit: with status 0, after --help, --help-all or --version.
    """
    config, _ = parse_with(
        None,
        argv,
        gate_config,
        gate_names,
        import_gate_files,
        expert_types=expert_types,
        read_hf_config=read_hf_config,
        prog=prog,
        description=description,
    )
    return config


def parse_with(
    options: type[Options] | None,
    argv: Sequence[str] | None,
    gate_config: Callable[[str], type],
    gate_names: Callable[[], Iterable[str]] = tuple,
    import_gate_files: ImportGateFiles | None = None,
    *,
    expert_types: ExpertTypes = NO_EXPERT_TYPES,
    read_hf_config: ReadHFConfig | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> tuple[RunConfig, Options | None]:
    """Parse the flags of a tool that has flags of its own: the fields of the dataclass `options`.

    See `parse`.
    """
    words = list(_normalize(sys.argv[1:] if argv is None else argv))
    gate_flag, config_path, hf_folder = _first_pass(words)
    gate_paths = import_gate_paths(words, import_gate_files)
    stored = load_stored_settings(config_path, hf_folder, read_hf_config)
    path = hf_folder or config_path
    stored_paths = pop_stored_paths(stored)
    try:
        gate = choose_gates(gate_flag, stored, path, gate_config, gate_names)
        experts = choose_expert_type(words, stored, path, expert_types)
    except ValueError as error:
        raise with_stored_paths(error, stored_paths, path) from None
    classes = {**SECTIONS, **gate.sections, **experts.sections}
    if options is not None:
        classes["options"] = options
    known = index_flags(classes)
    parser = _build_parser(classes, stored, gate, prog, description)
    own = {*known, *parser._option_string_actions}
    namespace, unknown = parser.parse_known_args(translate(words, own, warn_on_rank0))
    if namespace.help:
        shown = {"options": "flags of this program"} if options is not None else {}
        if gate_flag:
            shown |= {section: gate.title(section) for section in gate.sections}
        print(short_help(classes, stored, shown | experts.titles, prog, description), end="")
        raise SystemExit(0)
    if unknown:
        raise ValueError(_explain_unknown(unknown[0], known, gate, experts))
    values = {section: dict(stored.get(section, {})) for section in classes}
    given = _set_values(values, namespace, known)
    shared = gate.set_values(values, namespace, given, _unmark)
    if gate_flag and known["--gate"] not in given:
        given.append(known["--gate"])  # by one of XMoE's spellings
    values["moe"]["gate"] = gate.layers.text
    if gate_paths:
        values["moe"]["gate_path"] = gate_paths
    _drop_load_options(values["checkpoint"], given, path)
    sections = RunSections(classes, values, given, shared, gate, experts)
    built = sections.build_effective(gate_config)
    options = built.pop("options", None)
    built["gate_options"] = options_by_gate(built, sections.gate)
    built[EXPERT_OPTIONS] = dataclasses.asdict(built[EXPERT_OPTIONS])
    return RunConfig(**built), options


def refuse_early(argv: Sequence[str]) -> None:
    """Refuse what is wrong whatever the gate, before gates and torch are imported.

    `parse` makes all checks, these too. Flags that are unknown here may be the gate's, and its
    options may determine the experts. Command lines with --config or --init-from-hf, whose files
    hold further settings, are left to `parse`.

    Raises:
        ValueError: as `parse`.
    """
    words = list(_normalize(argv))
    _, config_path, hf_folder = _first_pass(words)
    find_gate_paths(words)
    if config_path or hf_folder or not {"--help", "--help-all", "--version"}.isdisjoint(words):
        return
    known = index_flags(SECTIONS)
    parser = _build_parser(SECTIONS, {}, None, None, None)
    own = {*known, *parser._option_string_actions}
    namespace, _ = parser.parse_known_args(translate(words, own, lambda *_: None))
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    given = _set_values(values, namespace, known)
    built = {section: cls(**values[section]) for section, cls in SECTIONS.items()}
    fixed = [flag for flag in given if not _depends_on_experts(flag)]
    require_effect(fixed, values_by_name(built), list(dict.fromkeys(known.values())))


def _depends_on_experts(flag: Flag) -> bool:
    """Return whether a flag needs something that a gate's options may determine."""
    names = {setting.name for need in flag.needs for setting in need.settings}
    return "num_experts" in names or any(need.rule for need in flag.needs)


def _set_values(
    values: dict[str, dict[str, Any]], namespace: argparse.Namespace, known: dict[str, Flag]
) -> list[Flag]:
    """Set the values of parsed flags by section and field, and return these flags."""
    given = []
    for flag in dict.fromkeys(known.values()):
        raw = getattr(namespace, flag.dest, None)
        if raw is not None:
            values[flag.section][flag.name] = parse_value(flag, _unmark(raw), flag.spellings[0])
            given.append(flag)
    return given


def _drop_load_options(stored: dict[str, Any], given: list[Flag], path: str) -> None:
    """Remove options of --load that a run.json stores from `stored` if the flag --load is given.

    They describe the start of the stored run, from the checkpoint that it loaded.

    Args:
        stored: values of the section `checkpoint`, from the run.json and from flags.
        given: flags on the command line.
        path: the run.json.
    """
    names = {flag.name for flag in given}
    if "load" not in names:
        return
    if "init_from_hf" not in names:
        stored.pop("init_from_hf", None)
    dropped = []
    for flag in flags_of(CheckpointConfig, "checkpoint"):
        if flag.name not in LOAD_OPTIONS or flag.name in names:
            continue
        value = stored.pop(flag.name, flag.default)
        if value != flag.default:
            dropped += format_flag(flag.spellings[0], value)
    if dropped:
        warn_on_rank0(
            "%s of %s are about the checkpoint that its run loaded: not used with the --load "
            "given here",
            " ".join(dropped),
            path,
        )


def to_flags(
    config: RunConfig,
    gate_config: Callable[[str], type],
    expert_types: ExpertTypes = NO_EXPERT_TYPES,
) -> list[str]:
    """Return flags that parse to `config`, if all its values have an effect.

    They set the fields that differ from their defaults, and all gate options. Options
    without effect are left out, since `parse` refuses them.

    Args:
        gate_config: as for `parse`.
        expert_types: as for `parse`.
    Raises:
        ValueError: an element of a list starts with "--", which only run.json can express.
    """
    # An option may need one that itself has no effect: shared experts need experts.
    config = reset_without_effect(config)
    sections = {section: getattr(config, section) for section in SECTIONS}
    gate = choose_gates(config.moe.gate, {}, "", gate_config, tuple)
    for name, cls in gate.classes.items():
        sections[gate.section(name)] = cls(**config.gate_options.get(name, {}))
    expert_config = expert_types.config_class(config.moe.expert_type)
    sections[EXPERT_OPTIONS] = expert_config(**config.expert_options)
    words: list[str] = []
    done: set[str] = set()
    for seen in sections_of_each_gate(sections):
        values = values_by_name(seen)
        for section in [name for name in seen if name not in done]:
            done.add(section)
            for flag in flags_of(type(seen[section]), section):
                value = values[flag.key]
                is_set = is_gate_section(section) or value != flag.default
                if is_set and unmet_need(flag, values) is None:
                    words += format_flag(flag.spellings[0], value)
    return words


# First pass: --gate and --config


def _normalize(argv: Sequence[str]) -> Iterator[str]:
    """Replace underscores in flags by hyphens, and mark values that start with a hyphen.

    There are no one-letter flags, so `-x` can only be a value; argparse would not accept it.
    """
    for i, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            yield name.replace("_", "-") + equals + value
        elif i == 0 and word == "-h":
            yield "--help"
        elif word.startswith("-"):
            yield _VALUE_MARK + word
        else:
            yield word


def _unmark(raw: Any) -> Any:
    """Remove the mark of `_normalize` from a parsed value."""
    if isinstance(raw, list):
        return [_unmark(element) for element in raw]
    if isinstance(raw, str):
        return raw.removeprefix(_VALUE_MARK)
    return raw


def _first_pass(words: list[str]) -> tuple[str | None, str, str]:
    """Return the gate that flags name, if any, and the paths of --config and --init-from-hf."""
    parser = FlagParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gate")
    parser.add_argument("--config", default="")
    parser.add_argument("--init-from-hf", default="")
    for alias in GATE_ALIASES:
        parser.add_argument(
            alias, dest="aliases", action="append_const", const=alias, default=[]
        )
    args, _ = parser.parse_known_args(words)
    flag_of_gate = {GATE_ALIASES[alias]: alias for alias in args.aliases}
    if args.gate:
        flag_of_gate.setdefault(args.gate, f"--gate {args.gate}")
    if len(flag_of_gate) > 1:
        flags = " and ".join(flag_of_gate.values())
        raise ValueError(f"{flags} name different gates; give one of them")
    return next(iter(flag_of_gate), None), args.config, _unmark(args.init_from_hf)


# Second pass: all flags


def _build_parser(
    classes: dict[str, type],
    stored: dict[str, dict[str, Any]],
    gate: GateChoice | None,
    prog: str | None,
    description: str | None,
) -> FlagParser:
    """Build the parser of all flags, which shows stored values as defaults."""
    parser = new_parser(prog, description)
    _add_general_flags(parser)
    for section, cls in classes.items():
        title = section
        text = cls.__doc__
        if is_gate_section(section):
            title = gate.title(section)
            text = f"The gate's own flags. Gates: {' '.join(gate.all_names)}"
        if section == EXPERT_OPTIONS:
            title = "experts"
            text = "The flags of the expert type that --expert-type selects."
        group = parser.add_argument_group(title, text)
        for flag in flags_of(cls, section):
            add_flag(group, flag, stored.get(section, {}).get(flag.name, flag.default))
        if section == "moe":
            for alias, name in GATE_ALIASES.items():
                group.add_argument(
                    alias, action="store_true", help=f"the same as --gate {name}"
                )
    if gate is not None:
        for flag, targets in gate.other_flags:
            add_flag(parser, flag, targets[0].default, is_hidden=True)
    return parser


def _add_general_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that belong to no config section."""
    general = parser.add_argument_group("general")
    general.add_argument(
        "--help", action="store_true", help="show what a run needs first, and exit"
    )
    general.add_argument("--help-all", action="help", help="show all flags and exit")
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
    # Ignored: the DeepSpeed launcher adds --local-rank, which is in the environment too, and
    # scripts written for Megatron-DeepSpeed pass --deepspeed, which is always on.
    general.add_argument("--local-rank", help=argparse.SUPPRESS)
    general.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)


def _explain_unknown(
    word: str, known: dict[str, Flag], gate: GateChoice, experts: ExpertChoice
) -> str:
    """Return the error message about an argument that no flag of this run takes."""
    flag = word.partition("=")[0]
    if not flag.startswith("--"):
        return f"unexpected argument {_unmark(word)!r}; every value follows its flag"
    if reason := gate.explain(flag) or experts.explain(flag):
        return reason
    advice = "--help-all lists all flags"
    names = [*known, *GATE_ALIASES, *ALIASES, *NOT_NEEDED, *NOT_SUPPORTED]
    # Without the hyphens, which would make any two short flags similar.
    by_name = {name.removeprefix("--"): name for name in names}
    similar = difflib.get_close_matches(flag.removeprefix("--"), by_name, n=1)
    if similar:
        advice = f"did you mean {by_name[similar[0]]}? {advice}"
    return f"{flag} is no flag; {advice}"
