"""Reads the YAML file of a study. `docs/comparing-gates.md` describes its keys."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.analysis.compare.cell_flags import (
    LENGTH_FLAGS,
    RUNNER_FLAGS,
    FlagValues,
    flags_from_words,
    is_flag_name,
    is_flag_value,
    normalized_name,
)
from megatron.analysis.compare.results import MatchRule
from megatron.analysis.compare.study import (
    MATCHED,
    Axis,
    AxisValue,
    Labels,
    Study,
    Tuning,
    selected_labels,
    selects,
)
from megatron.analysis.compare.yaml_lines import YamlFile, YamlPath
from megatron.config.schema import TrainConfig

AXIS_FLAGS = {"experts": "num-experts", "width": "moe-ffn-hidden-size", "k": "topk"}
"""Flags that single values of these axes set; the axes of other names set the flag of that name"""

STUDY_KEYS = (
    "name",
    "base",
    "axes",
    "seeds",
    "exclude",
    "only",
    "cells",
    "match",
    "tune",
    "baseline",
    "eval",
    "ranks",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_AXIS_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_NOT_AXES = ("seed", "seeds")
_FLAG_VALUE = "text, a number, true, false, null (without the flag), or a list of words"


def read_study(path: str | Path) -> Study:
    """Read a study from its file, with all values of its axes.

    Raises:
        ValueError: one line with the file, the line, what is set there and what is allowed.
        OSError: the file cannot be read.
    """
    return _StudyReader(YamlFile(path)).study()


class _StudyReader:
    """Checks the content of a study file and makes a `Study` of it."""

    def __init__(self, file: YamlFile):
        self.file = file
        self.content: dict[str, Any] = {}
        self.axes: tuple[Axis, ...] = ()

    def study(self) -> Study:
        self.content = self.mapping(self.file.content, (), STUDY_KEYS)
        name = self.content.get("name", Path(self.file.path).stem)
        is_name = isinstance(name, str) and _NAME.fullmatch(name) is not None
        self.require(is_name, ("name",), name, "letters, digits, '.', '_' and '-'")
        base = self.flags(self.content.get("base", {}), ("base",), allow_words=True)
        base |= self.eval_flags(base)
        self.axes = self.read_axes()
        seeds = self.seeds(base)
        match = self.match()
        baseline = None
        if "baseline" in self.content:
            baseline = self.labels(self.content["baseline"], ("baseline",))
        elif match is not None:
            baseline = match.reference
        study = Study(
            path=self.file.path,
            name=name,
            base={flag: value for flag, value in base.items() if flag != "seed"},
            axes=self.axes,
            all_axes=self.axes,
            seeds=seeds,
            exclude=self.selections("exclude"),
            only=self.selections("only"),
            cells=self.explicit_cells(),
            match=match,
            tuning=self.tuning(),
            baseline=baseline,
            held_out=self.held_out(),
            ranks=self.positive_integer(self.content.get("ranks", 1), ("ranks",)),
        )
        return self.with_cells(study)

    def with_cells(self, study: Study) -> Study:
        """Refuse a baseline and grids of which no cell is left; `build_cells` refuses no cells.

        A reference of `match` need not be a cell, and is then no baseline either.
        """
        configurations = list(selected_labels(study))
        allowed = "what selects a cell that exclude, only and cells leave"
        for i, grid in enumerate(study.tuning):
            is_used = any(selects(grid.where, labels) for labels in configurations)
            where = {name: list(labels) for name, labels in grid.where.items()}
            path = ("tune", i, "where")
            self.require(is_used or not configurations, path, where, allowed)
        if study.baseline is None:
            return study
        is_cell = any({**labels, **study.baseline} == labels for labels in configurations)
        if is_cell or not configurations:
            return study
        self.require("baseline" not in self.content, ("baseline",), study.baseline, allowed)
        return replace(study, baseline=None)

    # Basic checks

    def require(self, ok: bool, path: YamlPath, value: Any, allowed: str, advice: str = ""):
        self.file.require(ok, path, value, allowed, advice)

    def mapping(self, value: Any, path: YamlPath, keys: Iterable[str]) -> dict[str, Any]:
        allowed = f"a mapping with some of the keys {' '.join(keys)}"
        self.require(isinstance(value, dict), path, value, allowed)
        for key in value:
            self.require(key in keys, (*path, key), key, allowed)
        return value

    def positive_integer(self, value: Any, path: YamlPath) -> int:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        self.require(is_integer and value > 0, path, value, "a positive integer")
        return value

    def list_of(self, value: Any, path: YamlPath, what: str) -> list[Any]:
        self.require(isinstance(value, list) and bool(value), path, value, f"a list of {what}")
        return value

    # Flags

    def flags(self, value: Any, path: YamlPath, *, allow_words: bool = False) -> FlagValues:
        """Return the flags of a mapping, or with `allow_words` also of a list of words."""
        if allow_words and isinstance(value, list):
            try:
                value = flags_from_words([str(word) for word in value])
            except ValueError as error:
                raise ValueError(f"{self.file.where(path)}: {error}") from None
        allowed = "a mapping of flags of pretrain_gpt.py, without dashes"
        self.require(isinstance(value, dict), path, value, allowed)
        flags = {}
        for key, raw in value.items():
            self.require(is_flag_name(key), path, key, "the name of a flag")
            name = normalized_name(key)
            self.check_flag(name, (*path, key))
            self.require(is_flag_value(raw), (*path, key), raw, _FLAG_VALUE)
            flags[name] = raw
        return flags

    def check_flag(self, name: str, path: YamlPath) -> None:
        """Refuse flags that the runner sets."""
        reason = RUNNER_FLAGS.get(name)
        self.require(reason is None, path, f"--{name}", "another flag", f"Left out: {reason}")
        if path[0] != "base":
            advice = "List seeds under seeds"
            self.require(name != "seed", path, f"--{name}", "another flag", advice)

    def eval_flags(self, base: FlagValues) -> FlagValues:
        """Return the flags that the key `eval` stands for."""
        value = self.mapping(
            self.content.get("eval", {}), ("eval",), ("set", "interval", "iters")
        )
        flags = {}
        for key in ("interval", "iters"):
            if key in value:
                name = f"eval-{key}"
                path = ("eval", key)
                advice = "Leave one of them out"
                self.require(name not in base, path, value[key], f"not with {name}", advice)
                flags[name] = self.positive_integer(value[key], path)
        return flags

    def held_out(self) -> str:
        """Return the kind of rows of metrics.jsonl with the held-out loss."""
        name = self.content.get("eval", {}).get("set", "valid")
        allowed = "valid, test, or a name of --valid-sets"
        self.require(isinstance(name, str) and bool(name), ("eval", "set"), name, allowed)
        return {"valid": "eval", "test": "test"}.get(name, f"eval/{name}")

    # Axes

    def read_axes(self) -> tuple[Axis, ...]:
        path = ("axes",)
        axes = self.content.get("axes", {})
        is_mapping = isinstance(axes, dict) and bool(axes)
        self.require(is_mapping, path, axes, "a mapping of axes, each with its values")
        return tuple(self.axis(name, values) for name, values in axes.items())

    def axis(self, name: Any, values: Any) -> Axis:
        is_name = isinstance(name, str) and _AXIS_NAME.fullmatch(name) is not None
        allowed = (
            "a name of lower-case letters, digits, '-' and '_'; seeds have a key of their own"
        )
        self.require(is_name and name not in _NOT_AXES, ("axes",), name, allowed)
        path = ("axes", name)
        flag = AXIS_FLAGS.get(name, normalized_name(name))
        is_collection = isinstance(values, (list, dict)) and bool(values)
        self.require(
            is_collection, path, values, "a list of values, or a mapping of labels to values"
        )
        read = []
        if isinstance(values, dict):
            for label, value in values.items():
                self.require_text(label, (*path, label))
                read.append(self.axis_value(value, flag, (*path, label), str(label)))
        else:
            for i, value in enumerate(values):
                read.append(self.axis_value(value, flag, (*path, i)))
        labels = [value.label for value in read]
        for label in labels:
            advice = "Give them different labels: {label: NAME, ...}"
            is_unique = labels.count(label) == 1
            self.require(is_unique, path, label, "each label once", advice)
        return Axis(name, tuple(read), flag)

    def axis_value(self, value: Any, flag: str, path: YamlPath, label: str = "") -> AxisValue:
        estimate = None
        matched = MATCHED
        if isinstance(value, dict):
            value = dict(value)
            label = label or self.label(value.pop("label", ""), path)
            value.pop("label", None)
            for key in ("experts-per-token", "experts_per_token"):
                if key in value:
                    estimate = self.positive_number(value.pop(key), (*path, key))
            if "match" in value:
                matched = self.matched(value.pop("match"), (*path, "match"))
            flags = self.flags(value, path)
        else:
            self.require(
                is_flag_value(value), path, value, f"a mapping of flags, {_FLAG_VALUE}"
            )
            self.check_flag(flag, path)
            flags = {flag: value}
        label = label or label_of(flags)
        self.require(bool(label), path, value, "a value with a label: {label: NAME, ...}")
        return AxisValue(label, flags, estimate, matched)

    def matched(self, value: Any, path: YamlPath) -> tuple[str, ...]:
        """Return which numbers of parameters are compared with the reference's."""
        known = {"total": ("total",), "active": ("active",), "none": ()}
        is_known = isinstance(value, str) and value in known
        self.require(
            is_known, path, value, "total, active or none; left out: both are compared"
        )
        return known[value]

    def label(self, label: Any, path: YamlPath) -> str:
        is_scalar = isinstance(label, (str, int, float))
        self.require(is_scalar, (*path, "label"), label, "a short text")
        self.require_text(label, (*path, "label"))
        return str(label)

    def require_text(self, label: Any, path: YamlPath) -> None:
        """Refuse labels that YAML does not read as they are written."""
        advice = "YAML reads on, off, yes, no and null as other values"
        is_text = label is not None and not isinstance(label, bool)
        self.require(is_text, path, label, "a label in quotes", advice)

    def positive_number(self, value: Any, path: YamlPath) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_positive = is_number and 0 < value < math.inf
        self.require(is_positive, path, value, "a positive number")
        return float(value)

    def seeds(self, base: FlagValues) -> tuple[int, ...]:
        path = ("seeds",)
        default = base.get("seed", TrainConfig.seed)
        if isinstance(default, str) and default.isdecimal():  # of a command line
            default = int(default)
        seeds = self.list_of(self.content.get("seeds", [default]), path, "integers")
        for i, seed in enumerate(seeds):
            is_seed = isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0
            self.require(is_seed, (*path, i), seed, "an integer, 0 or more")
            self.require(seeds.count(seed) == 1, (*path, i), seed, "each seed once")
        is_once = "seeds" not in self.content or "seed" not in base
        self.require(is_once, ("base", "seed"), base.get("seed"), "only without seeds")
        return tuple(seeds)

    # Selections of cells

    def label_of_axis(self, axis: Axis, value: Any, path: YamlPath) -> str:
        label = shown(value)
        self.require(label in axis.labels(), path, label, " ".join(axis.labels()))
        return label

    def find_axis(self, name: Any, path: YamlPath) -> Axis:
        found = [axis for axis in self.axes if axis.name == name]
        names = " ".join(axis.name for axis in self.axes)
        self.require(bool(found), path, name, f"an axis of the study: {names}")
        return found[0]

    def labels(self, value: Any, path: YamlPath) -> dict[str, str]:
        """Return one label for some axes. With one axis, the label alone is enough."""
        if not isinstance(value, dict) and len(self.axes) == 1:
            value = {self.axes[0].name: value}
        is_mapping = isinstance(value, dict) and bool(value)
        self.require(is_mapping, path, value, "a mapping of axes to labels")
        found = {}
        for name, label in value.items():
            axis = self.find_axis(name, path)
            found[name] = self.label_of_axis(axis, label, (*path, name))
        return found

    def selection(self, value: Any, path: YamlPath) -> Labels:
        """Return labels by axis; each axis may name one label or a list of them."""
        is_mapping = isinstance(value, dict) and bool(value)
        self.require(is_mapping, path, value, "a mapping of axes to one label or several")
        found = {}
        for name, labels in value.items():
            axis = self.find_axis(name, path)
            if not isinstance(labels, list):
                labels = [labels]
            inner = (*path, name)
            found[name] = tuple(self.label_of_axis(axis, label, inner) for label in labels)
        return found

    def selections(self, key: str) -> tuple[Labels, ...]:
        if key not in self.content:
            return ()
        values = self.list_of(self.content[key], (key,), "mappings of axes to labels")
        return tuple(self.selection(value, (key, i)) for i, value in enumerate(values))

    def explicit_cells(self) -> tuple[dict[str, str], ...]:
        if "cells" not in self.content:
            return ()
        cells = []
        names = [axis.name for axis in self.axes]
        for i, value in enumerate(self.list_of(self.content["cells"], ("cells",), "cells")):
            path = ("cells", i)
            labels = self.labels(value, path)
            is_complete = labels.keys() == set(names)
            self.require(is_complete, path, value, f"a label of each axis: {' '.join(names)}")
            self.require(labels not in cells, path, value, "each cell once")
            cells.append(labels)
        return tuple(cells)

    # Matching and tuning

    def match(self) -> MatchRule | None:
        if "match" not in self.content:
            return None
        path = ("match",)
        value = self.mapping(self.content["match"], path, ("reference", "tolerance"))
        for key in ("reference", "tolerance"):
            self.require(key in value, path, value, "a mapping with reference and tolerance")
        tolerance = value["tolerance"]
        inner = (*path, "tolerance")
        if not isinstance(tolerance, dict):
            tolerance = {"total": tolerance, "active": tolerance}
        self.mapping(tolerance, inner, ("total", "active"))
        limits = {}
        for key, limit in tolerance.items():
            if limit is not None:
                limits[f"{key}_tolerance"] = self.positive_number(limit, (*inner, key))
        self.require(bool(limits), inner, tolerance, "a tolerance for total, active or both")
        reference = self.labels(value["reference"], (*path, "reference"))
        return MatchRule(reference, **limits)

    def tuning(self) -> tuple[Tuning, ...]:
        entries = self.content.get("tune", [])
        if isinstance(entries, dict):
            entries = [entries]
        self.require(isinstance(entries, list), ("tune",), entries, "a list of grids")
        return tuple(self.grid(entry, ("tune", i)) for i, entry in enumerate(entries))

    def grid(self, value: Any, path: YamlPath) -> Tuning:
        keys = ("where", "flag", "values", "seed", "tokens")
        value = self.mapping(value, path, keys)
        for key in ("flag", "values", "seed"):
            self.require(key in value, path, value, "a grid with flag, values and seed")
        self.require(is_flag_name(value["flag"]), (*path, "flag"), value["flag"], "a flag")
        flag = normalized_name(value["flag"])
        self.check_flag(flag, (*path, "flag"))
        is_other = flag not in LENGTH_FLAGS
        self.require(is_other, (*path, "flag"), flag, "no flag of the length of the training")
        inner = (*path, "values")
        values = self.list_of(value["values"], inner, "values of the flag, two or more")
        self.require(len(values) > 1, inner, values, "two values or more")
        for i, element in enumerate(values):
            is_scalar = is_flag_value(element) and not isinstance(element, list)
            self.require(is_scalar and element is not None, (*inner, i), element, _FLAG_VALUE)
            self.require(values.count(element) == 1, (*inner, i), element, "each value once")
        seed = value["seed"]
        is_seed = isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0
        self.require(is_seed, (*path, "seed"), seed, "an integer, 0 or more")
        tokens = value.get("tokens")
        if tokens is not None:
            tokens = self.positive_integer(tokens, (*path, "tokens"))
        where = {}
        if "where" in value:
            where = self.selection(value["where"], (*path, "where"))
        return Tuning(where, flag, tuple(values), seed, tokens)


def label_of(flags: FlagValues) -> str:
    """Return the label of a value that has none: its values, without those left out."""
    return "-".join(shown(value) for value in flags.values() if value is not None)


def shown(value: Any) -> str:
    """Return a value of a flag as a label; a switch is on or off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return "-".join(map(str, value))
    return str(value)
