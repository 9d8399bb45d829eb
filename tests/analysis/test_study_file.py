"""Study files: what their keys mean, and one clear line with its number for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.analysis.compare.results import MatchRule
from megatron.analysis.compare.study import Axis, AxisValue, Tuning
from megatron.analysis.compare.study_file import read_study
from megatron.analysis.compare.yaml_lines import YamlFile

FULL = """\
name: tiny
base:
  num_layers: 2
  --hidden-size: 32
  lr: 1e-3
  bf16: true
axes:
  gate:
    topk: {gate: topk, topk: 2}
    xmoe: {gate: threshold, threshold: 0.8, experts-per-token: 2.5, match: active}
  experts: [4, 8]
  width: [{label: narrow, moe-ffn-hidden-size: 16}, {moe-ffn-hidden-size: 32}]
seeds: [1, 2]
exclude:
- {gate: xmoe, experts: [8]}
only:
- gate: [topk, xmoe]
match:
  reference: {gate: topk}
  tolerance: {total: 0.01, active: null}
tune:
- where: {gate: topk}
  flag: moe_loss_coeff
  values: [0.01, 1.0e-3]
  seed: 7
  tokens: 1000
eval: {set: wiki, interval: 10, iters: 2}
ranks: 2
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def test_study_file_is_read_completely(tmp_path):
    study = read_study(write(tmp_path, FULL))
    assert study.name == "tiny"
    assert study.base == {
        "num-layers": 2,
        "hidden-size": 32,
        "lr": "1e-3",
        "bf16": True,
        "eval-interval": 10,
        "eval-iters": 2,
    }
    gate, experts, width = study.axes
    assert gate.values == (
        AxisValue("topk", {"gate": "topk", "topk": 2}),
        AxisValue("xmoe", {"gate": "threshold", "threshold": 0.8}, 2.5, ("active",)),
    )
    assert experts == Axis(
        "experts",
        (AxisValue("4", {"num-experts": 4}), AxisValue("8", {"num-experts": 8})),
        "num-experts",
    )
    assert width.labels() == ["narrow", "32"]
    assert study.seeds == (1, 2)
    assert study.exclude == ({"gate": ("xmoe",), "experts": ("8",)},)
    assert study.only == ({"gate": ("topk", "xmoe")},)
    assert study.match == MatchRule({"gate": "topk"}, total_tolerance=0.01)
    assert study.baseline == {"gate": "topk"}
    assert study.tuning == (
        Tuning({"gate": ("topk",)}, "moe-loss-coeff", (0.01, 0.001), 7, 1000),
    )
    assert study.held_out == "eval/wiki"
    assert study.ranks == 2


def test_defaults_need_only_axes(tmp_path):
    """The name is that of the file, and the seed that of base or pretrain_gpt.py."""
    study = read_study(write(tmp_path, "axes: {gate: [topk, hash]}"))
    assert (study.name, study.seeds, study.held_out) == ("study", (1234,), "eval")
    assert (study.match, study.baseline, study.tuning) == (None, None, ())
    assert study.axes[0].values[1] == AxisValue("hash", {"gate": "hash"})
    study = read_study(write(tmp_path, "base: {seed: 3}\naxes: {gate: [topk]}"))
    assert (study.seeds, study.base) == ((3,), {})


def test_labels_of_switches_are_those_of_references(tmp_path):
    """In quotes; without them YAML reads true and false, also in a reference."""
    text = "axes: {bf16: {'on': true, 'off': false}, gate: {topk: {topk: 2}}}\n"
    for reference in ("'off'", "off"):
        study = read_study(write(tmp_path, text + f"baseline: {{bf16: {reference}}}"))
        assert study.axes[0].labels() == ["on", "off"]
        assert study.baseline == {"bf16": "off"}


def test_reference_that_is_no_cell_is_no_baseline(tmp_path):
    text = AXES + "match: {reference: {gate: topk}, tolerance: 0.1}\nexclude: "
    assert read_study(write(tmp_path, text + "[{gate: topk}]")).baseline is None
    part = text + "[{gate: topk, experts: 8}]"
    assert read_study(write(tmp_path, part)).baseline == {"gate": "topk"}


def test_base_may_be_a_command_line(tmp_path):
    text = "base: [--lr, 0.1, --bf16, --data-path, a, b, --seed=4]\naxes: {gate: [topk]}"
    study = read_study(write(tmp_path, text))
    assert study.base == {"lr": "0.1", "bf16": True, "data-path": ["a", "b"]}
    assert study.seeds == (4,)


def test_merge_keys_and_aliases_work(tmp_path):
    text = "x: &x {lr: 1}\nbase: {<<: *x, bf16: true}\naxes: {gate: [topk]}"
    with pytest.raises(ValueError, match=r"study\.yaml:1: x is 'x'; allowed: a mapping"):
        read_study(write(tmp_path, text))
    text = "base: &b {lr: 1}\naxes: {data: {a: *b, b: {<<: *b, bf16: true}}}"
    values = read_study(write(tmp_path, text)).axes[0].values
    assert [value.flags for value in values] == [{"lr": 1}, {"lr": 1, "bf16": True}]


AXES = "axes: {gate: [topk, hash], experts: [4, 8]}\n"
MISTAKES = {
    "": "1: the file is None; allowed: a mapping",
    "[1]": "1: the file is .1.; allowed: a mapping",
    "axes: {gate: [topk]": "1: not YAML: ",
    "a: b: c": "1: not YAML: mapping values are not allowed here",
    "a: &a [*a]": "1: an alias refers to what contains it",
    "axes: {gate: [topk]}\nseeds: [1]\nseeds: [2]": "3: seeds is set twice",
    "axes: {? [a] : 1}": "1: a key is a list or a mapping",
    AXES + "sedes: [1]": "2: sedes is 'sedes'; allowed: .* seeds ",
    AXES + "name: a/b": "2: name is 'a/b'; allowed: letters, digits",
    AXES + "null: 1": "2: None is None; allowed: a mapping with some",
    AXES + "\n1.5: 1": r"3: 1\.5 is 1\.5; allowed: a mapping with some",
    AXES + "on: 1": "2: True is True; allowed: a mapping with some",
    "axes:\n  bf16:\n    a: 1\n    on: true": r"4: axes\.bf16\.True is True; allowed: a label in "
    "quotes. YAML reads on, off",
    "axes: {bf16: {null: true}}": r"1: axes\.bf16\.None is None; allowed: a label in quotes",
    "axes: {gate: [{label: no, topk: 1}]}": r"axes\.gate\[0\]\.label is False; .* in quotes",
    AXES
    + "exclude: [{gate: topk}]\nbaseline: {gate: topk}": r"3: baseline is {'gate': 'topk'}; "
    "allowed: what selects a cell that exclude, only and cells leave",
    AXES + "only: [{experts: 4}]\nbaseline: {gate: topk, experts: 8}": "3: baseline is",
    AXES
    + "exclude: [{gate: topk}]\n"
    + "tune:\n- {flag: lr, values: [1, 2], seed: 1,\n   where: {gate: topk}}": r"5: "
    r"tune\[0\]\.where is {'gate': \['topk'\]}; allowed: what selects a cell",
    AXES + "base: 3": "2: base is 3; allowed: a mapping of flags",
    AXES + "base: [lr, 3]": "2: base: 'lr' follows no flag",
    AXES + "base: {lr: {a: 1}}": r"2: base\.lr is .*allowed: text, a number",
    AXES + "base: {lr: 2020-01-01}": r"2: base\.lr is datetime",
    AXES + "base: {lr: 2020-99-99}": ": not YAML: month must be in 1..12",
    AXES + "base: {-lr: 1}": "2: base.* is '-lr'; allowed: the name of a flag",
    AXES
    + "base:\n  save: x": r"3: base\.save is '--save'; allowed: another flag.*its own folder",
    AXES + "base: {seed: 1}\nseeds: [1]": r"2: base\.seed is 1; allowed: only without seeds",
    "base: {}": "1: axes is {}; allowed: a mapping of axes",
    "axes: {Gate: [topk]}": "1: axes is 'Gate'; allowed: a name",
    "axes: {seed: [1]}": "1: axes is 'seed'; allowed: a name.*seeds have a key",
    "axes: {gate: topk}": r"1: axes\.gate is 'topk'; allowed: a list of values",
    "axes: {gate: [topk, topk]}": r"1: axes\.gate is 'topk'; allowed: each label once",
    "axes:\n  gate:\n  - {seed: 1}": r"3: axes\.gate\[0\]\.seed is '--seed'.*under seeds",
    "axes: {gate: [{topk: null}]}": r"1: axes\.gate\[0\] is .*with a label",
    "axes: {gate: [{label: [1]}]}": r"1: axes\.gate\[0\]\.label is \[1\]; allowed: a short text",
    "axes: {gate: [[[1]]]}": r"1: axes\.gate\[0\] is \[\[1\]\]; allowed: a mapping of flags, text",
    "axes: {gate: {a: {experts-per-token: -1}}}": r"1: axes\.gate\.a\.experts-per-token is -1",
    "axes: {gate: {a: {match: all}}}": r"1: axes\.gate\.a\.match is 'all'; allowed: total, active",
    AXES + "seeds: 3": r"2: seeds is 3; allowed: a list of integers",
    AXES + "seeds: [a]": r"2: seeds\[0\] is 'a'; allowed: an integer",
    AXES + "seeds: [1, 1]": r"2: seeds\[0\] is 1; allowed: each seed once",
    AXES + "only: []": "2: only is .*allowed: a list of mappings",
    AXES + "exclude: [topk]": r"2: exclude\[0\] is 'topk'; allowed: a mapping of axes",
    AXES + "exclude: [{k: 1}]": r"2: exclude\[0\] is 'k'; allowed: an axis .*gate experts",
    AXES + "exclude:\n- gate: foo": r"3: exclude\[0\]\.gate is 'foo'; allowed: topk hash",
    AXES + "cells: [{gate: topk}]": r"2: cells\[0\] is .*a label of each axis: gate experts",
    AXES
    + "cells: [{gate: topk, experts: 4}, {gate: topk, experts: 4}]": r"2: cells\[1\].*once",
    AXES + "match: {tolerance: 1}": "2: match is .*with reference and tolerance",
    AXES
    + "match: {reference: topk, tolerance: 1}": r"2: match\.reference is 'topk'; allowed: a m",
    AXES + "match: {reference: {gate: topk}, tolerance: 0}": r"match\.tolerance\.total is 0",
    AXES
    + "match: {reference: {gate: topk}, tolerance: {total: null}}": "total, active or both",
    AXES + "baseline: {gate: x}": r"2: baseline\.gate is 'x'; allowed: topk hash",
    AXES + "tune: 3": "2: tune is 3; allowed: a list of grids",
    AXES + "tune: {flag: lr}": r"2: tune\[0\] is .*flag, values and seed",
    AXES
    + "tune: {flag: lr, values: [1], seed: 1}": r"tune\[0\]\.values is \[1\]; .*two values",
    AXES + "tune: {flag: lr, values: [1, 1], seed: 1}": r"tune\[0\]\.values\[0\] is 1.*once",
    AXES + "tune: {flag: lr, values: [1, [2]], seed: 1}": r"tune\[0\]\.values\[1\] is \[2\]",
    AXES + "tune: {flag: lr, values: [1, 2], seed: -1}": r"tune\[0\]\.seed is -1",
    AXES + "tune: {flag: lr, values: [1, 2], seed: 1, tokens: 0}": r"tune\[0\]\.tokens is 0",
    AXES + "tune: {flag: train-iters, values: [1, 2], seed: 1}": "no flag of the length",
    AXES + "tune: {flag: 3, values: [1, 2], seed: 1}": r"tune\[0\]\.flag is 3; allowed: a flag",
    AXES + "eval: {set: 3}": r"2: eval\.set is 3; allowed: valid, test",
    AXES + "base: {eval-iters: 1}\neval: {iters: 2}": r"3: eval\.iters is 2; allowed: not with",
    AXES + "ranks: true": "2: ranks is True; allowed: a positive integer",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_refused_with_their_line(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=MISTAKES[text]) as raised:
        read_study(path)
    message = str(raised.value)
    assert message.startswith(f"{path}:") and "\n" not in message


def test_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "study.yaml"
    with pytest.raises(FileNotFoundError):
        read_study(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text; allowed: a YAML file"):
        read_study(path)
    path.write_text("a\x00")
    with pytest.raises(ValueError, match="not YAML: "):
        read_study(path)
    path.write_text("[" * 5000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_study(path)
    path.write_text("#" * ((1 << 22) + 1))
    with pytest.raises(ValueError, match=r"study\.yaml: it is longer than"):
        read_study(path)


def test_many_aliases_take_no_time(tmp_path):
    """A few lines that stand for 2^40 values."""
    lines = ["a0: &a0 [1, 1]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert len(YamlFile(write(tmp_path, "\n".join(lines))).content) == 40
