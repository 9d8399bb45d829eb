"""Groups of runs that differ in the seed only, and their labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron.analysis.report.groups import group_runs, result_settings
from megatron.analysis.report.runs import KindRows, ReportRun
from megatron.analysis.report.sources import RunSource
from megatron.config.schema import RunConfig

NO_ROWS = KindRows("train", np.empty(0), np.empty(0), None, None, {})


def run(name, label="", **config):
    """Return a run with a configuration, whose fields are written as section__field."""
    source = RunSource(Path(name) / "metrics.jsonl", name, label)
    return ReportRun(source, NO_ROWS, {}, config=sections_of(config))


def sections_of(config):
    sections: dict[str, dict] = {}
    for key, value in config.items():
        section, _, field = key.partition("__")
        sections.setdefault(section, {})[field] = value
    return sections


def resumed_run(name, first, last):
    """Return a run with the configurations of its first and its last start."""
    configs = [sections_of(gate("topk", **config)) for config in (first, last)]
    starts = tuple({"kind": "run", "config": config} for config in configs)
    return dataclasses.replace(run(name), config=configs[1], starts=starts)


def groups_of(*runs):
    return {group.label: [run.name for run in group.runs] for group in group_runs(runs)}


def gate(name, experts=8, **more):
    return {"moe__gate": name, "moe__num_experts": experts, **more}


def test_runs_with_other_seeds_are_one_group():
    found = groups_of(
        run("a", train__seed=1, train__save="x", **gate("topk")),
        run("b", train__seed=2, train__save="y", train__log_interval=5, **gate("topk")),
        run("c", train__seed=1, **gate("remoe")),
    )
    assert found == {"topk": ["a", "b"], "remoe": ["c"]}


@pytest.mark.parametrize(
    "field, joins",
    [
        ("train__save", True),
        ("train__metrics_file", True),
        ("train__max_bad_steps", True),
        ("data__num_workers", True),
        ("train__init_from_hf", False),
        ("train__load", True),
        ("train__load_step", True),
        ("train__load_or_init", True),
        ("train__load_optim", False),
        ("train__load_rng", False),
        ("train__override_lr_schedule", False),
        ("train__exit_interval", True),
        ("train__loss_spike_threshold", True),
        ("train__loss_spike_action", False),
        ("optimizer__lr", False),
        ("train__global_batch_size", False),
        ("model__hidden_size", False),
    ],
)
def test_only_settings_of_results_divide_groups(field, joins):
    runs = [run(str(value), **gate("topk", **{field: value})) for value in (1, 2)]
    assert len(group_runs(runs)) == (1 if joins else 2)


def test_fine_tunes_of_other_checkpoints_are_not_seeds():
    """Those of one checkpoint are, also after a resume, which has a --load of its own."""
    tuned = {"train__finetune": True, "train__load": "a", "train__load_step": 10}
    resumed = {"train__finetune": False, "train__load": "own", "train__load_step": 0}
    found = groups_of(
        run("scratch", **gate("topk", **resumed)),
        run("a", **gate("topk", **tuned)),
        resumed_run("a resumed", tuned, resumed),
        run("b", **gate("topk", **tuned | {"train__load": "b"})),
        run("later", **gate("topk", **tuned | {"train__load_step": 20})),
    )
    assert list(found.values()) == [["scratch"], ["a", "a resumed"], ["b"], ["later"]]
    assert list(found)[:3] == ["load none, load_step none"] + [
        "topk, load a, load_step 10",
        "load b, load_step 10",
    ]


def test_weights_of_a_resumed_run_are_those_of_its_first_start():
    from_hf = {"train__init_from_hf": "hf"}
    resumed = resumed_run("a", from_hf, {"train__init_from_hf": "", "train__load": "own"})
    assert len(group_runs([resumed, run("b", **gate("topk", **from_hf))])) == 1


def test_labels_name_what_differs():
    found = groups_of(
        run("a", **gate("topk", optimizer__lr=0.001, gate_options__topk={"k": 2})),
        run("b", **gate("topk", optimizer__lr=0.002, gate_options__topk={"k": 2})),
        run("c", **gate("remoe", optimizer__lr=0.001)),
        run("d", **gate("topk", 0, optimizer__lr=0.001)),
    )
    assert found == {
        "topk, lr 0.001": ["a"],
        "topk, lr 0.002": ["b"],
        "remoe": ["c"],
        "dense": ["d"],
    }


def test_labels_with_many_differences_are_names():
    values = {"model__a": 1, "model__b": 1, "model__c": 1, "model__d": 1}
    others = dict.fromkeys(values, 2)
    found = groups_of(run("a", **gate("topk", **values)), run("b", **gate("topk", **others)))
    assert found == {"a": ["a"], "b": ["b"]}


def test_one_run_is_called_by_its_name():
    assert groups_of(run("demo", **gate("topk"))) == {"demo": ["demo"]}


def test_runs_without_configuration_stay_apart():
    assert groups_of(run("a"), run("b")) == {"a": ["a"], "b": ["b"]}


def test_labels_of_the_user_group():
    found = groups_of(
        run("a", "mine", **gate("topk")), run("b", "mine", **gate("remoe")), run("c", "other")
    )
    assert found == {"mine": ["a", "b"], "other": ["c"]}


def test_labels_are_unique():
    labelled = run("x", "a")
    found = groups_of(labelled, run("a"), run("b", "x"), run("x"))
    assert len(found) == 4 and sorted(sum(found.values(), [])) == ["a", "b", "x", "x"]


def test_settings_of_a_configuration_are_flat():
    """The configuration of a run has its gate, but neither its seed nor its folders."""
    config = RunConfig().to_dict()
    flat = result_settings(config, config)
    assert flat["moe.gate"] == "topk" and "train.global_batch_size" in flat
    assert not {"train.seed", "train.save", "train.tensorboard_dir"} & set(flat)
