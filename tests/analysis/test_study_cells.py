"""Cells of a study: combinations, selections, tuned flags, names, and flags as words."""

from __future__ import annotations

import itertools

import pytest
import yaml

from megatron.analysis.compare.cell_flags import (
    changed_flags,
    flags_from_words,
    identity,
    to_words,
)
from megatron.analysis.compare.cells import build_cells, build_tuning_groups, reference_cell
from megatron.analysis.compare.overrides import override
from megatron.analysis.compare.study import Study
from megatron.analysis.compare.study_file import read_study

TEXT = {
    "base": {"lr": 0.1, "topk": 2},
    "axes": {
        "gate": {"topk": {"gate": "topk"}, "xmoe": {"gate": "threshold", "topk": None}},
        "experts": [4, 8],
    },
    "seeds": [1, 2],
}


def study(tmp_path, **more) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**TEXT, **more}, sort_keys=False))
    return read_study(path)


def labels(cells) -> list[tuple]:
    return [(*cell.axes.values(), cell.seed) for cell in cells]


def test_cells_are_all_combinations(tmp_path):
    cells = build_cells(study(tmp_path))
    assert labels(cells) == list(itertools.product(["topk", "xmoe"], ["4", "8"], [1, 2]))
    assert cells[1].cell_id == "gate-topk_experts-4_seed-2"
    assert cells[1].flags == {"lr": 0.1, "topk": 2, "gate": "topk", "num-experts": 4, "seed": 2}
    # null leaves out a flag that base sets.
    assert cells[-1].words == ["--lr=0.1", "--gate=threshold", "--num-experts=8", "--seed=2"]


def test_selections_leave_their_cells(tmp_path):
    every = labels(build_cells(study(tmp_path)))
    found = build_cells(study(tmp_path, exclude=[{"gate": "xmoe", "experts": 8}]))
    assert labels(found) == [c for c in every if c[:2] != ("xmoe", "8")]
    found = build_cells(study(tmp_path, only=[{"gate": "xmoe"}, {"experts": [8]}]))
    assert labels(found) == [c for c in every if c[0] == "xmoe" or c[1] == "8"]
    found = build_cells(study(tmp_path, cells=[{"gate": "xmoe", "experts": 4}]))
    assert labels(found) == [c for c in every if c[:2] == ("xmoe", "4")]
    with pytest.raises(ValueError, match="selects no cell"):
        build_cells(study(tmp_path, exclude=[{"experts": [4, 8]}]))


def test_tuned_flags_have_runs_of_their_own(tmp_path):
    grid = {"where": {"gate": "topk"}, "flag": "lr", "values": [1, 0.2], "seed": 9}
    tuned = study(tmp_path, base={"lr": 0.1, "train-iters": 5}, tune=[{**grid, "tokens": 50}])
    cells = build_cells(tuned)
    assert [cell.tuning is not None for cell in cells] == [True] * 4 + [False] * 4
    assert "lr" not in cells[0].flags and cells[-1].flags["lr"] == 0.1
    assert cells[0].with_tuned(0.2).flags["lr"] == 0.2
    groups = build_tuning_groups(cells)
    assert [group.axes["experts"] for group in groups] == ["4", "8"]
    runs = groups[0].cells
    assert [run.cell_id for run in runs] == [
        "gate-topk_experts-4_lr-1_seed-9",
        "gate-topk_experts-4_lr-0.2_seed-9",
    ]
    assert runs[1].flags == {
        "gate": "topk",
        "num-experts": 4,
        "lr": 0.2,
        "seed": 9,
        "train-tokens": 50,
    }
    # Without `tokens` a run is as long as the cells, and one of them is the cell of its seed.
    (group, _) = build_tuning_groups(build_cells(study(tmp_path, tune=[{**grid, "seed": 2}])))
    same = build_cells(study(tmp_path, tune=[{**grid, "seed": 2}]))[1].with_tuned(0.2)
    assert same.seed == 2 and same.identity == group.cells[1].identity
    with pytest.raises(ValueError, match="--lr and --lr of gate=topk .*one grid"):
        build_cells(study(tmp_path, tune=[grid, grid]))


def test_equal_cells_are_refused(tmp_path):
    axes = {"gate": {"a": {"gate": "topk"}, "b": {"gate": "topk"}}}
    with pytest.raises(ValueError, match="gate-a_seed-1 and gate-b_seed-1 have the same flags"):
        build_cells(study(tmp_path, axes=axes))
    axes = {"gate": {"a/b": {"gate": "topk"}, "a:b": {"gate": "hash"}}}
    with pytest.raises(ValueError, match="gate=a/b and gate=a:b would both have the folder"):
        build_cells(study(tmp_path, axes=axes))


def test_long_ids_stay_different(tmp_path):
    axes = {"gate": {"x" * 200 + end: {"gate": end} for end in ("topk", "hash")}}
    ids = {cell.cell_id for cell in build_cells(study(tmp_path, axes=axes))}
    assert len(ids) == 4 and all(len(cell_id) <= 120 for cell_id in ids)


def test_estimates_of_two_axes_are_refused(tmp_path):
    value = {"gate": "topk", "experts-per-token": 2}
    axes = {"gate": {"a": value}, "lr": {"b": {"lr": 1, "experts-per-token": 3}}}
    with pytest.raises(ValueError, match="axis lr: experts-per-token of b is 3"):
        build_cells(study(tmp_path, axes=axes))


# Overrides


def test_command_line_selects_values_and_seeds(tmp_path):
    selected = override(
        study(tmp_path), {"gate": ["xmoe"], "experts": ["8", "16"]}, [5], ["lr=1", "bf16=true"]
    )
    cells = build_cells(selected)
    assert labels(cells) == [("xmoe", "8", 5), ("xmoe", "16", 5)]
    assert cells[1].flags["num-experts"] == 16
    assert selected.base == {"lr": 1, "topk": 2, "bf16": True}
    assert override(study(tmp_path), {}) == study(tmp_path)
    # The reference need not be among the selected values.
    found = reference_cell(selected, {"gate": "topk", "experts": "16"})
    assert found.flags["gate"] == "topk" and found.flags["num-experts"] == 16


def test_length_of_the_command_line_is_the_only_one(tmp_path):
    """In whichever unit the file has its own; null leaves a length out."""
    tokens = study(tmp_path, base={"train-tokens": 1000, "lr": 1})
    assert override(tokens, {}, (), ["train-iters=5"]).base == {"lr": 1, "train-iters": 5}
    assert override(tokens, {}, (), ["train_tokens=5"]).base == {"lr": 1, "train-tokens": 5}
    neither = override(tokens, {}, (), ["train-iters=null"]).base
    assert neither == {"train-tokens": 1000, "lr": 1, "train-iters": None}


def test_settings_hold_for_all_cells(tmp_path):
    """A flag of an axis or a grid is refused; a value that is not selected sets nothing."""
    grid = {"where": {"gate": "topk"}, "flag": "lr", "values": [1, 2], "seed": 1}
    axes = {"gate": {"a": {"gate": "topk"}, "b": {"train-iters": 5}}}
    tuned = study(tmp_path, axes=axes, tune=[{**grid, "where": {"gate": "a"}}])
    with pytest.raises(
        ValueError, match="--set is 'lr=1'; allowed: a flag that no grid of tune"
    ):
        override(tuned, {}, (), ["lr=1"])
    message = (
        "--set is 'train-tokens=9'; allowed: a flag that no axis sets. The value b of axis gate "
        "sets --train-iters"
    )
    with pytest.raises(ValueError, match=message):
        override(tuned, {}, (), ["train-tokens=9"])
    assert override(tuned, {"gate": ["a"]}, (), ["train-tokens=9"]).base["train-tokens"] == 9


@pytest.mark.parametrize(
    ("selection", "seeds", "settings", "message"),
    [
        (
            {"gate": ["hash"]},
            [],
            [],
            "--gate is 'hash'; allowed: labels of the axis: topk xmoe",
        ),
        ({"experts": ["8", "8"]}, [], [], "--experts is .*each value once"),
        ({"experts": ["{a: 1}"]}, [], [], "--experts is .*allowed: text, a number"),
        ({"experts": ["{"]}, [], [], "--experts is .*allowed: text, a number"),
        ({}, [1, 1], [], "--seeds is .*each seed once"),
        ({}, [-1], [], "--seeds is -1; allowed: integers, 0 or more"),
        ({}, [], ["lr"], "--set is 'lr'; allowed: FLAG=VALUE"),
        ({}, [], ["seed=1"], "--set is 'seed=1'.*Seeds are set by --seeds"),
        ({}, [], ["save=x"], "--set is 'save=x'; allowed: another flag"),
        ({}, [], ["lr={a: 1}"], "--set lr is "),
    ],
)
def test_wrong_overrides_are_refused(tmp_path, selection, seeds, settings, message):
    with pytest.raises(ValueError, match=message):
        override(study(tmp_path), selection, seeds, settings)


# Flags


def test_flags_become_words():
    flags = {"a": 1, "b": [1, "x y"], "c": True, "d": False, "e": None, "g.f": False, "h": -1.5}
    words = ["--a=1", "--b", "1", "x y", "--c", "--no-d", "--g.no-f", "--h=-1.5"]
    assert to_words(flags) == words
    assert flags_from_words(["--a_b", "1", "--c", "--d=", "--e", "1", "2", "3"]) == {
        "a-b": "1",
        "c": True,
        "d": "",
        "e": ["1", "2", "3"],
    }


def test_identity_depends_on_flags_and_ranks():
    flags = {"a": 1, "b": None}
    assert identity(flags, 1) == identity({"a": 1}, 1) == identity({"a": "1"}, 1)
    others = [identity({"a": 2}, 1), identity({"a": 1}, 2), identity({"a": 1, "b": 2}, 1)]
    assert len({identity(flags, 1), *others}) == 4
    assert identity({"a": 1, "b": 2}, 1) == identity({"b": 2, "a": 1}, 1)
    changes = changed_flags({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4})
    assert changes == "--b=2, now --b=4; --c=3, now no --c"
