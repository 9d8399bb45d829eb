"""The gates of a run and their options, as sections and flags of its configuration.

A run with one gate has the section `gate_options`, whose flags are the plain ones: --topk. A run
with a gate per layer has a section `gate_options.NAME` for each gate, with flags that begin with
the gate's name: --deepseek-v3.topk. A plain flag then sets the option in every gate that has it,
and the flag of one gate takes precedence. With one gate, both forms work, too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.fields import flag_name
from megatron.config.flags import Flag, flags_of, index_flags, is_gate_section
from megatron.config.gate_layers import GateLayers, parse_gate_layers, with_known_names
from megatron.config.gate_overrides import drop_gate_overrides
from megatron.config.moe import LAYER_FIELDS, MoEConfig
from megatron.config.run_json import parse_stored_values
from megatron.config.values import parse_value
from megatron.log import warn_on_rank0

GATE_OPTIONS = "gate_options"
"""Section of the options of a run's only gate; beginning of the section of each of several"""

Values = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class GateChoice:
    """The gates of a run, and the others that could be chosen."""

    layers: GateLayers
    classes: dict[str, type]
    """Config of each gate of the run by name"""
    others: dict[str, type]
    """Config of every available gate by name; may include those of the run"""

    @property
    def all_names(self) -> list[str]:
        """Names of all gates, sorted."""
        return sorted({*self.classes, *self.others})

    @property
    def has_several(self) -> bool:
        """Whether the run has more than one gate."""
        return len(self.classes) > 1

    @property
    def sections(self) -> dict[str, type]:
        """Config of each gate of the run by section."""
        return {self.section(name): cls for name, cls in self.classes.items()}

    def section(self, name: str) -> str:
        """Return the section of a gate's options."""
        return f"{GATE_OPTIONS}.{name}" if self.has_several else GATE_OPTIONS

    def title(self, section: str) -> str:
        """Return the title of a section's flags in --help."""
        for name in self.classes:
            if self.section(name) == section:
                return f"gate {name}"
        raise KeyError(section)

    @contextlib.contextmanager
    def naming(self, section: str) -> Iterator[None]:
        """Name the gate in errors about the options of a section, if there are several gates."""
        try:
            yield
        except ValueError as error:
            if not self.has_several or not is_gate_section(section):
                raise
            raise ValueError(f"{self.title(section)}: {error}") from None

    @functools.cached_property
    def other_flags(self) -> list[tuple[Flag, list[Flag]]]:
        """Flags in addition to those of `sections`, with the options that each of them sets.

        With one gate these have the gate's name, with several they are the plain ones. An option
        that is a switch in one gate and takes a value in another one has no plain flag.

        Raises:
            ValueError: a plain flag has another meaning elsewhere.
        """
        if not self.has_several:
            ((name, cls),) = self.classes.items()
            named = flags_of(cls, f"{GATE_OPTIONS}.{name}")
            options = flags_of(cls, GATE_OPTIONS)
            return [(flag, [own]) for flag, own in zip(named, options, strict=True)]
        by_name: dict[str, list[tuple[Flag, Flag]]] = {}
        for name, cls in self.classes.items():
            index_flags({GATE_OPTIONS: cls})
            options = flags_of(cls, GATE_OPTIONS)
            for plain, own in zip(options, flags_of(cls, self.section(name)), strict=True):
                by_name.setdefault(plain.name, []).append((plain, own))
        found = []
        for pairs in by_name.values():
            plain = pairs[0][0]
            if len({_arity(own) for _, own in pairs}) == 1:
                found.append((plain, [own for _, own in pairs]))
        return found

    def set_values(
        self,
        values: Values,
        namespace: argparse.Namespace,
        given: list[Flag],
        unmark: Callable[[Any], Any],
    ) -> list[list[Flag]]:
        """Set the values of `other_flags` by section and field.

        Args:
            values: changed in place.
            namespace: the parsed command line.
            given: flags on the command line; changed in place.
            unmark: restores the text of a value.

        Returns:
            For each plain flag of several gates the options that it set.
        """
        groups = []
        for flag, targets in self.other_flags:
            raw = getattr(namespace, flag.dest, None)
            if raw is None:
                continue
            changed = targets
            if self.has_several:
                changed = [target for target in targets if target not in given]
                groups.append(changed)
            for target in changed:
                what = flag.spellings[0]
                if self.has_several:
                    what += f" for {self.title(target.section)}"
                values[target.section][target.name] = parse_value(target, unmark(raw), what)
                if target not in given:
                    given.append(target)
        return groups

    def explain(self, flag: str) -> str:
        """Return why a flag is none of this run's if it belongs to another gate, else ""."""
        known = {*self.classes, *self.others}
        if "." in flag:
            return self._explain_named(flag, known)
        owners = []
        for name, config_class in self.others.items():
            if flag in index_flags({GATE_OPTIONS: config_class}):
                owners.append(name)
        own = [name for name in owners if name in self.classes]
        if own:
            spellings = " or ".join(f"--{name}.{flag.removeprefix('--')}" for name in own)
            return f"{flag} means different things for its gates; give {spellings}"
        if not owners:
            return ""
        subject = f"the gate is {self.layers.text}"
        if self.has_several:
            subject = f"the gates are {' '.join(self.classes)}"
        return (
            f"{flag} belongs to --gate {' or '.join(sorted(owners))}, but {subject}; "
            "leave the flag out or choose another gate"
        )

    def _explain_named(self, flag: str, known: Iterable[str]) -> str:
        """Explain a flag --GATE.OPTION."""
        name, _, option = flag.removeprefix("--").partition(".")
        by_spelling = {flag_name(gate).removeprefix("--"): gate for gate in known}
        gate = by_spelling.get(name)
        if gate is None:
            allowed = " ".join(self.classes)
            return f"{flag}: {name} is no gate; allowed before the dot: {allowed}"
        if gate not in self.classes:
            return (
                f"{flag} belongs to the gate {gate}, which no layer of --gate "
                f"{self.layers.text} has; leave the flag out or give the gate layers"
            )
        options = [other.spellings[0] for other in flags_of(self.classes[gate], GATE_OPTIONS)]
        allowed = " ".join(spelling.removeprefix("--") for spelling in options) or "none"
        return f"{flag}: the gate {gate} has no option {option}; its options: {allowed}"


def _arity(flag: Flag) -> str:
    """Return how many words follow a flag, which is the same for all flags of one spelling."""
    if flag.type.base is bool:
        return "none"
    return "several" if flag.type.is_list else "one"


def choose_gates(
    gate_flag: str | None,
    stored: Values,
    path: str,
    gate_config: Callable[[str], type],
    gate_names: Callable[[], Iterable[str]],
) -> GateChoice:
    """Choose the gates, and keep in `stored` only what applies to them.

    Fields of MoEConfig that followed from the stored gates' options are removed if the options
    may change, and so are options of gates that the run does not have, and the choice of MoE
    layers if flags name a gate per layer.

    Args:
        gate_flag: value of --gate on the command line.
        stored: sections of a run.json; its gate options become those of the choice's sections.
        path: the run.json, for messages.
        gate_config: see `megatron.config.cli.parse`.
        gate_names: see `megatron.config.cli.parse`.
    Raises:
        ValueError: the list of gates is malformed, or a gate is unknown.
    """
    others = {other: gate_config(other) for other in gate_names()}
    stored_text = stored.get("moe", {}).get("gate", MoEConfig.gate)
    layers = parse_gate_layers(with_known_names(gate_flag or stored_text, others))
    stored_text = with_known_names(stored_text, others)
    stored_layers = parse_gate_layers(stored_text)
    dropped_flags = []
    for name in stored_layers.gates:
        if name in {*layers.gates, *others}:  # a gate that no longer exists may be replaced
            dropped_flags += drop_gate_overrides(stored, name, gate_config(name), path)
    choice = GateChoice(layers, {name: gate_config(name) for name in layers.gates}, others)
    options = stored.pop(GATE_OPTIONS, {})
    for name, cls in choice.classes.items():
        section = choice.section(name)
        where = f"{GATE_OPTIONS}.{name}"
        flags = flags_of(cls, section)
        if name in options:
            stored[section] = parse_stored_values(options.pop(name), where, flags, path)
    unused = {name: values for name, values in options.items() if values}
    if layers.text != stored_text:
        if layers.is_per_layer:
            _drop_layer_fields(stored, layers, path)
        if unused:
            _warn_of_dropped(layers, stored_text, unused, dropped_flags, path)
        elif not layers.is_per_layer and stored_layers.has_dense:
            warn_on_rank0(
                "--gate %s replaces %s of %s, which made layers dense",
                layers.text,
                stored_text,
                path,
            )
    elif unused:
        name = next(iter(unused))
        raise ValueError(
            f"{path}: {GATE_OPTIONS} has options of {name!r}; allowed: those of the gates of "
            f"moe.gate, which is {stored_text!r}"
        )
    return choice


def _drop_layer_fields(stored: Values, layers: GateLayers, path: str) -> None:
    """Remove the stored choice of MoE layers, which a list of gates replaces."""
    moe = stored.get("moe", {})
    dropped = []
    for name in LAYER_FIELDS:
        default = getattr(MoEConfig, name, ())
        if moe.pop(name, default) != default:
            dropped.append(flag_name(name))
    if dropped:
        warn_on_rank0("--gate %s replaces %s of %s", layers.text, " ".join(dropped), path)


def _warn_of_dropped(
    layers: GateLayers,
    stored_text: str,
    unused: Mapping[str, Any],
    dropped_flags: list[str],
    path: str,
) -> None:
    """Log which stored options a new choice of gates drops."""
    derived = ""
    if dropped_flags:
        derived = f" with the {' '.join(dropped_flags)} that came from them"
    of_gates = f" of {' '.join(unused)}" if parse_gate_layers(stored_text).is_per_layer else ""
    warn_on_rank0(
        "--gate %s replaces %s of %s: the gate options%s stored there are dropped%s, "
        "and %s starts from its own defaults",
        layers.text,
        stored_text,
        path,
        of_gates,
        derived,
        layers.text,
    )


def options_by_gate(built: dict[str, Any], choice: GateChoice) -> dict[str, dict[str, Any]]:
    """Take the gates' sections out of `built` and return their options by gate."""
    options = {}
    for name in choice.classes:
        options[name] = dataclasses.asdict(built.pop(choice.section(name)))
    return options


def sections_of_each_gate(sections: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sections once for each gate: the common ones and the gate's own.

    Options of two gates may have the same name, and what they need is in their own section.
    """
    gates = [section for section in sections if section.startswith(GATE_OPTIONS)]
    common = {name: value for name, value in sections.items() if name not in gates}
    return [{**common, section: sections[section]} for section in gates] or [common]
