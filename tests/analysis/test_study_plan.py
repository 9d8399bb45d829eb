"""Plans of studies: parameters against counting, matching, and what is refused before a start."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.studies import BASE, THRESHOLD, TOPK, tiny_plan
from megatron.analysis.compare.cell_folders import CellFolders
from megatron.analysis.compare.cell_size import CellSize, cell_size
from megatron.analysis.compare.output import initial_state, require_space
from megatron.analysis.compare.plan_table import plan_text
from megatron.log import get_logger
from megatron.model.builder import build_run_config_model
from megatron.pretrain import parse_flags

BYTE_VOCABULARY = 257
DENSE = {"num-experts": 0, "moe-ffn-hidden-size": None, "expert-interval": None}


def test_plan_has_the_sizes_and_lengths(tmp_path):
    plan = tiny_plan(tmp_path)
    assert [run.cell.cell_id for run in plan.runs] == [
        "gate-topk_seed-1",
        "gate-topk_seed-2",
        "gate-xmoe_seed-1",
        "gate-xmoe_seed-2",
    ]
    first = plan.cells[0]
    assert (first.iterations, first.tokens) == (20, 20 * 4 * 32)
    assert first.config.train.seed == 1 and plan.cells[1].config.train.seed == 2
    plan.require_matched()  # nothing is to be matched


@pytest.mark.parametrize(
    "flags",
    [
        TOPK,
        {"gate": "topk", "topk": 1, "moe-shared-experts": 1},
        {"topk": 1, "moe-latent-size": 16, "expert-interval": 1, "ffn-hidden-size": None},
        {"gate": "peer", "num-experts": 64, "moe-ffn-hidden-size": 1, "peer-topk": 4},
        {"gate": "hash@0,topk@1", "topk.topk": 3, "ffn-hidden-size": None},
        DENSE,
    ],
)
def test_parameters_are_those_of_the_model(tmp_path, flags):
    """The total, and the routed experts' part in what a token uses, tensor by tensor."""
    base = dict(BASE)
    if "gate" in flags:
        base["expert-interval"] = None if flags["gate"] != "topk" else 2
    first = tiny_plan(tmp_path, base=base, axes={"gate": {"a": flags}}).cells[0]
    model = build_run_config_model(first.config, BYTE_VOCABULARY)
    tensors = dict(model.named_parameters())
    assert first.size.total == sum(p.numel() for p in tensors.values())
    routed = {name: p.numel() for name, p in tensors.items() if ".experts." in name}
    assert sum(first.size.routed) == sum(routed.values())
    layers = {name.partition(".experts.")[0] for name in routed}
    assert len(first.size.routed) == len(layers)
    experts = first.config.moe.num_experts
    outside = first.size.total - sum(routed.values())
    for mean in (0.0, 1.0, 1.7):
        share = mean / max(experts, 1)
        expected = outside + share * sum(routed.values())
        assert first.size.active(mean) == pytest.approx(expected, rel=1e-12)
    if first.size.is_fixed:
        assert first.active == first.size.active_max


def test_active_parameters_may_differ_by_layer():
    size = CellSize(1000, 200, 1000, routed=(400, 400), num_experts=(4, 8))
    assert size.active([1.0, 2.0]) == 200 + 100 + 100
    assert size.planned_active(None) is None
    assert size.planned_active(1.0) == 200 + 100 + 50
    fixed = replace(size, active_max=200)
    assert fixed.planned_active(3.0) == 200  # exact numbers take precedence


def test_unmatched_cells_are_refused_with_both_numbers(tmp_path):
    """Twice as wide experts are named with the parameters of the cell and of its reference."""
    wide = {**TOPK, "moe-ffn-hidden-size": 64}
    match = {"reference": {"gate": "topk"}, "tolerance": 0.05}
    axes = {"gate": {"topk": TOPK, "wide": wide, "one": {**wide, "topk": 1}}}
    plan = tiny_plan(tmp_path, axes=axes, match=match)
    mismatches = {run.cell.cell_id: run.mismatch for run in plan.cells}
    narrow = plan.cells[0].size
    wide_size = plan.cells[2].size
    assert mismatches["gate-topk_seed-1"] == mismatches["gate-topk_seed-2"] == ""
    for text in (
        f"total parameters {wide_size.total:,} against {narrow.total:,} (",
        f"active parameters {wide_size.active_max:,} against {narrow.active_max:,} (",
        "of the reference gate-topk_seed-1",
    ):
        assert text in mismatches["gate-wide_seed-1"]
    # One expert of twice the width has the same active parameters.
    assert "active" not in mismatches["gate-one_seed-1"]
    assert "total parameters" in mismatches["gate-one_seed-1"]
    message = r"match: cell gate-wide_seed-1: total parameters .*\(4 cells are not matched\)"
    with pytest.raises(ValueError, match=message):
        plan.require_matched()
    assert "not matched: gate-wide_seed-1: " in plan_text(plan, CellFolders(tmp_path))


def test_cells_may_be_matched_in_active_parameters_only(tmp_path):
    """A dense model is as wide as the experts that a token uses, and has fewer in total."""
    dense = {**DENSE, "match": "active"}
    match = {"reference": {"gate": "topk"}, "tolerance": 0.03}
    axes = {"gate": {"topk": TOPK, "dense": dense}}
    tiny_plan(tmp_path, axes=axes, match=match).require_matched()
    axes["gate"]["dense"] = DENSE
    with pytest.raises(ValueError, match="gate-dense_seed-1: total parameters"):
        tiny_plan(tmp_path, axes=axes, match=match).require_matched()


def test_dynamic_gates_declare_their_experts(tmp_path):
    match = {"reference": {"gate": "topk"}, "tolerance": 0.01}
    tiny_plan(tmp_path, match=match).require_matched()
    axes = {"gate": {"topk": TOPK, "xmoe": {**THRESHOLD, "experts-per-token": 3}}}
    with pytest.raises(ValueError, match="gate-xmoe_seed-1: active parameters"):
        tiny_plan(tmp_path, axes=axes, match=match).require_matched()
    undeclared = {key: value for key, value in THRESHOLD.items() if key != "experts-per-token"}
    axes = {"gate": {"topk": TOPK, "xmoe": undeclared}}
    message = (
        r"gate-xmoe_seed-1 use from 22,848 to 28,992 parameters; declare .*experts-per-token"
    )
    with pytest.raises(ValueError, match=message):
        tiny_plan(tmp_path, axes=axes, match=match)
    total_only = {**match, "tolerance": {"total": 0.01, "active": None}}
    plan = tiny_plan(tmp_path, axes=axes, match=total_only)
    plan.require_matched()
    assert plan.cells[2].active is None


def test_each_cell_has_a_reference(tmp_path):
    """It has the cell's labels on the axes that the reference does not name."""
    match = {"reference": {"gate": "topk"}, "tolerance": 0.05}
    axes = {"gate": {"topk": TOPK, "xmoe": THRESHOLD}, "experts": [4, 8]}
    plan = tiny_plan(tmp_path, axes=axes, match=match)
    assert not any(run.mismatch for run in plan.cells)
    only_experts = {"reference": {"experts": 4}, "tolerance": 0.05}
    plan = tiny_plan(tmp_path, axes=axes, match=only_experts)
    bad = {run.cell.axes["experts"] for run in plan.cells if run.mismatch}
    assert bad == {"8"}


@pytest.mark.parametrize(
    ("base", "more", "message"),
    [
        ({"moe-los-coeff": 1}, {}, "--moe-los-coeff is no flag; did you mean --moe-loss-coeff"),
        ({"num-experts": -1}, {}, "--num-experts is -1; allowed"),
        ({"eval-iters": 0, "eval-interval": None}, {}, "--eval-iters is 0; allowed: 1 or more"),
        ({"train-iters": None}, {}, "--train-iters is 0; allowed"),
        ({"mock-data": None}, {}, "--data-path is ''; allowed: the data of the training"),
        ({}, {"eval": {"set": "wiki"}}, r"eval\.set of the study is 'wiki'.*\(none\)"),
        ({}, {"ranks": 3}, "--global-batch-size is 4; allowed: a multiple"),
    ],
)
def test_wrong_flags_are_refused_with_the_cell(tmp_path, base, more, message):
    with pytest.raises(ValueError, match=f"^cell gate-topk_seed-1: .*{message}"):
        tiny_plan(tmp_path, base={**BASE, **base}, **more)


@pytest.mark.parametrize(
    ("base", "flag", "values", "message"),
    [
        ({}, "topk", [1, 2], "2 gives 28,992 parameters, 24,896 to 24,896 per token, 20 steps"),
        ({}, "moe-ffn-hidden-size", [32, 64], "64 gives .*; 32 gives 28,992 parameters"),
        (
            {"train-iters": None, "train-tokens": 2560},
            "global-batch-size",
            [4, 8],
            "8 gives .*, 10 steps, 2,560 tokens; 4 gives .*, 20 steps, 2,560 tokens",
        ),
        ({}, "global-batch-size", [4, 8], "8 gives .*, 20 steps, 5,120 tokens"),
    ],
)
def test_grids_change_neither_size_nor_length(tmp_path, base, flag, values, message):
    """The cells would not be what was matched and planned."""
    gate = {name: value for name, value in TOPK.items() if name != flag}
    tune = {"flag": flag, "values": values, "seed": 1}
    message = f"tune: --{flag} changes what cell gate-topk_seed-1 is compared by: {message}"
    with pytest.raises(ValueError, match=message):
        tiny_plan(tmp_path, base={**BASE, **base}, axes={"gate": {"topk": gate}}, tune=tune)


def test_each_value_of_a_grid_is_checked(tmp_path):
    tune = {"flag": "moe-loss-coeff", "values": [0.1, -1], "seed": 1, "where": {"gate": "topk"}}
    with pytest.raises(ValueError, match="^cell gate-topk.*: --moe-loss-coeff is -1"):
        tiny_plan(tmp_path, tune=tune)


def test_missing_data_are_refused(tmp_path, data):
    def planned(name: str, value: object) -> None:
        base = {**BASE, "mock-data": None, "data-path": data, name: value}
        tiny_plan(tmp_path, base=base)

    planned("data-path", [0.3, data])
    planned("streaming-data-path", None)
    with pytest.raises(FileNotFoundError, match=r"gate-topk_seed-1: .*none\.idx"):
        planned("data-path", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"none\.idx"):
        planned("valid-sets", [f"wiki={tmp_path / 'none'}"])
    copy = tmp_path / "copy"
    Path(f"{copy}.idx").write_bytes(Path(f"{data}.idx").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"copy\.bin is missing"):
        planned("data-path", str(copy))
    base = {**BASE, "mock-data": None, "streaming-data-path": str(tmp_path / "none.jsonl")}
    with pytest.raises(FileNotFoundError, match="--streaming-data-path names .*none"):
        tiny_plan(tmp_path, base=base)
    with pytest.raises(FileNotFoundError, match="gate-topk_seed-1: .*tokenizer"):
        base = {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "/none/tokenizer"}
        tiny_plan(tmp_path, base={**BASE, **base})


def test_vocabulary_comes_from_the_tokenizer(tmp_path):
    flags = tiny_plan(tmp_path).cells[0].cell.words
    small = cell_size(parse_flags(flags))
    large = cell_size(parse_flags([*flags, "--vocab-size", "1000"]))
    assert large.total - small.total == (1000 - BYTE_VOCABULARY) * 32
    unread = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-size", "1000"]
    assert cell_size(parse_flags([*flags, *unread])).total == large.total


def test_full_disk_is_refused(tmp_path, monkeypatch):
    """Each unfinished run needs 16 bytes per parameter, and the running ones twice."""
    plan = tiny_plan(tmp_path)
    folders = CellFolders(tmp_path)
    sizes = [16 * run.size.total for run in plan.cells]
    needed = []

    def note(path, count, advice):
        needed.append(count)

    monkeypatch.setattr("megatron.analysis.compare.output.require_disk_space", note)
    require_space(plan, folders, 1, remove_checkpoints=False)
    require_space(plan, folders, 2, remove_checkpoints=True)
    done = replace(initial_state(plan.cells[0]), state="finished")
    done.write(folders.of(plan.cells[0].cell))
    require_space(plan, folders, 1, remove_checkpoints=False)
    assert needed == [5 * sizes[0], 4 * sizes[0], 4 * sizes[0]]
    for run in plan.cells:
        replace(initial_state(run), state="finished").write(folders.of(run.cell))
    require_space(plan, folders, 1, remove_checkpoints=False)
    assert len(needed) == 3


def test_plan_table_estimates_the_time(tmp_path):
    plan = tiny_plan(tmp_path)
    folders = CellFolders(tmp_path)
    text = plan_text(plan, folders)
    assert "remaining: 4 runs, 10,240 tokens" in text and "about" not in text
    assert "gate=xmoe" in text and "~24.90 K" in text and "0 of 2" in text
    for i, seconds in ((0, 30.0), (2, 90.0)):
        state = replace(initial_state(plan.cells[i]), state="finished", wall_seconds=seconds)
        state.write(folders.of(plan.cells[i].cell))
    assert "remaining: 2 runs, 5,120 tokens, about 2 minutes" in plan_text(plan, folders)
    assert "about 1 minutes" in plan_text(plan, folders, slots=2)


def test_repeated_warnings_are_logged_once(tmp_path):
    """Cells have most of their flags in common, and so the warnings about them."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    get_logger().addHandler(handler)
    try:
        plan = tiny_plan(tmp_path, base={**BASE, "use-flash-attn": True})
        assert sum("--use-flash-attn" in message for message in messages) == 1
        parse_flags(plan.cells[0].cell.words)  # the plan's filter has ended
    finally:
        get_logger().removeHandler(handler)
    assert sum("--use-flash-attn" in message for message in messages) == 2
