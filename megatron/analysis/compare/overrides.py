"""Selections and settings of the command line, which replace those of a study file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.analysis.compare.cell_flags import (
    RUNNER_FLAGS,
    FlagValues,
    is_flag_name,
    is_flag_value,
    normalized_name,
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
        settings: `flag=value` words of --set, which are added to `base`.

    Raises:
        ValueError: an axis has no such value, a seed is given twice, or a setting is no flag.
    """
    axes = tuple(_selected(axis, selection.get(axis.name, ())) for axis in study.axes)
    for seed in seeds:
        require(seed >= 0, "--seeds", seed, "integers, 0 or more")
        require(seeds.count(seed) == 1, "--seeds", list(seeds), "each seed once")
    base = dict(study.base)
    for word in settings:
        base |= _setting(word)
    return dataclasses.replace(study, axes=axes, base=base, seeds=tuple(seeds) or study.seeds)


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
