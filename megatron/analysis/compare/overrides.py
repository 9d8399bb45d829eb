"""Selections and settings of the command line, which replace those of a study file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.analysis.compare.cell_flags import (
    LENGTH_FLAGS,
    RUNNER_FLAGS,
    FlagValues,
    is_flag_name,
    is_flag_value,
    normalized_name,
    without_length,
)
from megatron.analysis.compare.study import Axis, AxisValue, Study
from megatron.analysis.compare.study_file import shown
from megatron.config.fields import require
from megatron.optional_packages import import_optional


def override(
    study: Study,
    selection: Mapping[str, Sequence[str]],
    seeds: Sequence[int] = (),
    settings: Sequence[str] = (),
) -> Study:
    """Return the study that the command line selects.

    Args:
        selection: words by axis: labels, or for an axis of single values also new values.
        seeds: replace those of the file; empty: as in the file.
        settings: `flag=value` words of --set, which are added to `base`. A length of the
            training replaces the length that `base` has in another unit.

    Raises:
        ValueError: an axis has no such value, a seed is given twice, or a setting is no flag, or
            one that an axis or a grid sets.
    """
    axes = tuple(_selected(axis, selection.get(axis.name, ())) for axis in study.axes)
    for seed in seeds:
        require(seed >= 0, "--seeds", seed, "integers, 0 or more")
        require(seeds.count(seed) == 1, "--seeds", list(seeds), "each seed once")
    study = dataclasses.replace(study, axes=axes, seeds=tuple(seeds) or study.seeds)
    added: FlagValues = {}
    for word in settings:
        setting = _setting(word)
        _refuse_replaced(study, word, setting)
        added |= setting
    base = study.base
    if any(added.get(name) is not None for name in LENGTH_FLAGS):
        base = without_length(base)
    return dataclasses.replace(study, base={**base, **added})


def _selected(axis: Axis, words: Sequence[str]) -> Axis:
    if not words:
        return axis
    known = {value.label: value for value in axis.values}
    is_single = all(value.flags.keys() == {axis.flag} for value in axis.values)
    values = []
    for word in words:
        allowed = f"labels of the axis: {' '.join(known)}"
        require(is_single or word in known, f"--{axis.name}", word, allowed)
        if word in known:
            values.append(known[word])
            continue
        value = parse_scalar(word, f"--{axis.name}")
        values.append(AxisValue(shown(value), {axis.flag: value}))
    labels = [value.label for value in values]
    require(len(set(labels)) == len(labels), f"--{axis.name}", list(words), "each value once")
    return dataclasses.replace(axis, values=tuple(values))


def _refuse_replaced(study: Study, word: str, setting: FlagValues) -> None:
    """Refuse a setting that would not hold for all cells: their own flags come after `base`."""
    (name,) = setting
    same = LENGTH_FLAGS if name in LENGTH_FLAGS else (name,)
    for axis in study.axes:
        for value in axis.values:
            found = [flag for flag in same if flag in value.flags]
            advice = f"The value {value.label} of axis {axis.name} sets --{' '.join(found)}."
            require(not found, "--set", word, "a flag that no axis sets", advice)
    is_tuned = any(grid.flag == name for grid in study.tuning)
    require(not is_tuned, "--set", word, "a flag that no grid of tune sets")


def _setting(word: str) -> FlagValues:
    name, equals, text = word.partition("=")
    allowed = "FLAG=VALUE, a flag of pretrain_gpt.py without dashes"
    require(bool(equals) and is_flag_name(name), "--set", word, allowed)
    name = normalized_name(name)
    reason = RUNNER_FLAGS.get(name)
    require(reason is None, "--set", word, "another flag", f"Left out: {reason}.")
    require(name != "seed", "--set", word, "another flag", "Seeds are set by --seeds.")
    return {name: parse_scalar(text, f"--set {name}")}


def parse_scalar(text: str, what: str) -> Any:
    """Parse the value of a flag as in a study file: `true`, `null`, `0.1`, `[a, b]` or text.

    Raises:
        ValueError: it is not YAML, or not the value of a flag.
    """
    yaml = import_optional("yaml", "analysis", what)
    allowed = "text, a number, true, false, null, or [WORD, WORD]"
    try:
        value = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError):
        require(False, what, text, allowed)
    require(is_flag_value(value), what, text, allowed)
    return value
