"""Options without effect: refused on the command line, or reset to their defaults.

An option declares what it needs to have an effect (`megatron.config.needs`). A flag that is
given without that is a mistake, since the run would differ from what its command line says.
Two kinds are no mistake: a flag that leaves an option off (`--save-interval 0`), and options
of a feature that the command line switches off (`--eval-iters 0` after a script's
`--eval-interval 100`). The latter, like those of a run.json, are reset, with a warning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from megatron.config.flags import Flag, flags_of, negative_spellings, value_key
from megatron.config.needs import Need
from megatron.config.schema import SECTIONS, RunConfig


def values_by_name(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all fields of several config sections by `Flag.key`."""
    values: dict[str, Any] = {}
    for section, config in sections.items():
        for field in dataclasses.fields(config):
            values[value_key(section, field.name)] = getattr(config, field.name)
    return values


def unmet_need(flag: Flag, values: Mapping[str, Any]) -> Need | None:
    """Return the first setting that an option lacks to have an effect, or None."""
    for need in flag.needs:
        if not need.holds(values):
            return need
    return None


def is_switched_off(flag: Flag, values: Mapping[str, Any], given: Iterable[Flag]) -> bool:
    """Return whether flags switch off what an option needs: `--num-experts 0`, `--skip-train`.

    Args:
        values: values of all fields by name.
        given: flags on the command line.
    """
    need = unmet_need(flag, values)
    if need is None:
        return False
    if need.resets:
        return True
    names = {other.key for other in given}
    return any(s.name in names for s in need.settings if not s.values)


def require_effect(
    given: Iterable[Flag], values: Mapping[str, Any], flags: Iterable[Flag]
) -> None:
    """Check that the flags of a command line have an effect.

    Args:
        given: flags on the command line.
        values: values of all fields by name.
        flags: the flags of all fields, for messages.

    Raises:
        ValueError: one has none. The message names all flags that lack the same setting.
    """
    lacking: dict[Need, list[Flag]] = {}
    for flag in given:
        value = values[flag.key]
        need = unmet_need(flag, values)
        if need is None or is_switched_off(flag, values, given):
            continue
        if value or value != flag.default:
            lacking.setdefault(need, []).append(flag)
    for need, useless in lacking.items():
        named = [_state(flag, values[flag.key]) for flag in useless]
        subject = "they have"
        rest = "them"
        if len(useless) == 1:
            subject = "it has"
            rest = _given_spelling(useless[0], values[useless[0].key])
        raise ValueError(
            f"{_join(named, 'and')}; {subject} an effect only {_describe(need, values, flags)}. "
            f"{_advice(need, flags)} or leave {rest} out."
        )


def without_effect(flags: Iterable[Flag], values: Mapping[str, Any]) -> list[tuple[Flag, Need]]:
    """Return the options that are set but have no effect, and what they lack.

    Args:
        values: values of all fields by name.
    """
    found = []
    for flag in flags:
        need = unmet_need(flag, values)
        if need is not None and values[flag.key] != flag.default:
            found.append((flag, need))
    return found


def describe_dropped(
    dropped: Iterable[tuple[Flag, Need]], values: Mapping[str, Any], flags: Iterable[Flag]
) -> str:
    """Return a list of options and what they lack, for a warning."""
    by_need: dict[Need, list[str]] = {}
    for flag, need in dropped:
        by_need.setdefault(need, []).append(_state(flag, values[flag.key]))
    parts = []
    for need, states in by_need.items():
        parts.append(f"{_join(states, 'and')} (only {_describe(need, values, flags)})")
    return ", ".join(parts)


def reset_without_effect(config: RunConfig) -> RunConfig:
    """Return a configuration in which options without effect have their defaults.

    Runs whose configurations are then equal are the same, whatever else was set for them.
    Gate options are not reset, but a gate of a dense model takes its options along.
    """
    while True:
        sections = {section: getattr(config, section) for section in SECTIONS}
        values = values_by_name(sections)
        changed: dict[str, Any] = {}
        for section, cls in SECTIONS.items():
            useless = without_effect(flags_of(cls, section), values)
            if useless:
                defaults = {flag.name: flag.default for flag, _ in useless}
                changed[section] = dataclasses.replace(sections[section], **defaults)
        if not changed:
            return config
        gates = changed.get("moe", config.moe).gate_layers.gates
        options = {
            name: values for name, values in config.gate_options.items() if name in gates
        }
        config = dataclasses.replace(config, gate_options=options, **changed)


def _state(flag: Flag, value: Any) -> str:
    """Return what a flag is set to, as the beginning of a sentence."""
    spelling = _given_spelling(flag, value)
    if isinstance(value, bool):
        return f"{spelling} is set"
    if isinstance(value, tuple):
        value = list(value)
    return f"{spelling} is {value!r}"


def _given_spelling(flag: Flag, value: Any) -> str:
    """Return a flag as it was given to set this value: --no-x for a switch that is off."""
    spelling = flag.spellings[0]
    if value is False:
        return negative_spellings([spelling])[0]
    return spelling


def _describe(need: Need, values: Mapping[str, Any], flags: Iterable[Flag]) -> str:
    """Return a need with its preposition: "with --save"."""
    if need.rule:
        return f"with {need.text}"
    spellings = _spellings(flags)
    texts = []
    for setting in need.settings:
        text = setting.describe(spellings[setting.name])
        if setting.values == (False,):
            return f"without {spellings[setting.name]}"
        if setting.values or setting.above:
            text += f", not {values[setting.name]}"
        texts.append(text)
    return f"with {_join(texts, 'or')}"


def _advice(need: Need, flags: Iterable[Flag]) -> str:
    """Return the first half of the advice, which "or leave it out" follows."""
    if need.rule or need.settings[0].values or need.settings[0].above:
        return "Change that"
    if len(need.settings) > 1:
        return "Set one of them"
    return f"Set {_spellings(flags)[need.settings[0].name]}"


def _spellings(flags: Iterable[Flag]) -> dict[str, str]:
    """Return the preferred spelling of each field's flag."""
    return {flag.key: flag.spellings[0] for flag in flags}


def _join(texts: list[str], word: str) -> str:
    """Return "a, b and c"."""
    if len(texts) == 1:
        return texts[0]
    return f"{', '.join(texts[:-1])} {word} {texts[-1]}"
