"""Versions of the files of runs and checkpoints: older ones are migrated, newer ones refused."""

from __future__ import annotations

import itertools
import json
import logging
import math
from fractions import Fraction

import pytest

from helpers.fake_gates import parse
from megatron.config.format_version import (
    FORMAT_VERSION,
    MIGRATIONS,
    NewerVersionError,
    migrate,
    with_version,
)
from megatron.config.run_json import (
    config_from_dict,
    load_config_json,
    read_run_json,
    run_json_text,
)
from megatron.config.schema import ModelConfig, RunConfig
from megatron.moe.dispatch.plan import capacity_from_factor


def test_written_version_is_current():
    content = json.loads(run_json_text(RunConfig()))
    assert list(content)[0] == "version" and content["version"] == FORMAT_VERSION
    assert migrate("run.json", content, "x") == json.loads(json.dumps(RunConfig().to_dict()))
    assert with_version({"a": 1}) == {"version": FORMAT_VERSION, "a": 1}


def test_every_older_version_has_migrations():
    assert sorted(MIGRATIONS) == list(range(FORMAT_VERSION))


@pytest.mark.parametrize("version", range(FORMAT_VERSION + 1))
def test_every_version_of_run_json_is_read(version, tmp_path):
    config = RunConfig(ModelConfig(num_layers=3))
    content = config.to_dict()
    if version == 0:
        content = {"config": content, "tokenizer": {"name": "x"}, "world_size": 2}
    if version >= 2:
        content["version"] = version
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    assert read_run_json(path) == config == config_from_dict(json.loads(path.read_text()))
    assert parse("--config", str(path)).model == config.model


def test_migrations_run_one_after_the_other(monkeypatch):
    """A function from n to n + 1 gets what the one before returned."""
    first = FORMAT_VERSION
    second = FORMAT_VERSION + 1
    monkeypatch.setattr("megatron.config.format_version.FORMAT_VERSION", second + 1)
    monkeypatch.setitem(
        MIGRATIONS, first, {"a.json": lambda content: {**content, "seen": [first]}}
    )
    monkeypatch.setitem(
        MIGRATIONS,
        second,
        {"a.json": lambda content: {**content, "seen": [*content["seen"], second]}},
    )
    for version in ({}, {"version": first}):
        expected = {"x": 1, "seen": [first, second]}
        assert migrate("a.json", {"x": 1, **version}, "where") == expected
    assert migrate("a.json", {"x": 1, "version": second + 1}, "where") == {"x": 1}
    assert migrate("b.json", {"x": 1, "version": first}, "where") == {"x": 1}


def test_argument_is_not_changed():
    content = {"version": 1, "data": {"a": {}}}
    migrate("state.json", content, "x")
    assert content == {"version": 1, "data": {"a": {}}}


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**30])
def test_newer_version_says_to_update(version, tmp_path):
    """Also if it has keys that this version does not know."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"version": version, "modle": {}}))
    for read in (read_run_json, lambda path: parse("--config", str(path))):
        with pytest.raises(
            NewerVersionError,
            match=f"run.json has format version {version}; .* up to {FORMAT_VERSION}. Update moe",
        ):
            read(path)


@pytest.mark.parametrize("version", [-1, True, "2", 1.0, None, [], "x" * 5000])
def test_malformed_version_is_refused(version):
    with pytest.raises(ValueError, match="^x: version is .{1,150}; allowed: an integer up to"):
        migrate("run.json", {"version": version}, "x")


def test_unknown_key_of_same_version_is_named():
    content = {"version": FORMAT_VERSION, "model": {"num_layer": 3}}
    with pytest.raises(ValueError, match=r"unknown key 'model\.num_layer'; did you mean"):
        config_from_dict(content)
    with pytest.raises(ValueError, match=r"unknown key 'x+\.\.\. \(5002 characters\)"):
        config_from_dict({"x" * 5000: {}})


def test_old_states_get_unknown_content_ids():
    state = {"data": {"a": {"bin_bytes": 1}, "b": {"content_id": "c"}, "d": 3}, "x": 1}
    assert migrate("state.json", state, "x") == {
        "data": {
            "a": {"bin_bytes": 1, "content_id": ""},
            "b": {"content_id": "c"},
            "d": 3,
        },
        "x": 1,
    }


@pytest.mark.parametrize("version", range(3))
@pytest.mark.parametrize(
    ("stored", "reduction"),
    [
        ({"num_experts": 4}, "mean"),
        ({"num_experts": 4, "moe_aux_loss_reduction": "sum"}, "sum"),
        ({"num_experts": 0}, "sum"),
        ({}, "sum"),
    ],
)
def test_old_runs_keep_mean_over_layers(version, stored, reduction):
    """Runs of the versions that averaged auxiliary losses do so when they continue."""
    content = {"moe": stored, "version": version}
    if version == 0:
        content = {"config": {"moe": stored}, "version": 0}
    before = json.dumps(content)
    assert config_from_dict(content).moe.moe_aux_loss_reduction == reduction
    assert json.dumps(content) == before
    new = {"moe": stored, "version": 3}
    assert config_from_dict(new).moe.moe_aux_loss_reduction == stored.get(
        "moe_aux_loss_reduction", "sum"
    )


@pytest.mark.parametrize("moe", [None, 3, [], "x"])
def test_malformed_old_sections_reach_their_check(moe):
    with pytest.raises(ValueError, match="^run.json: moe is .*; allowed: a JSON object$"):
        config_from_dict({"moe": moe, "version": 2})


@pytest.mark.parametrize(
    ("gate", "options", "migrated"),
    [
        ("threshold", {"topk": 3, "threshold": 0.5}, {"threshold_max_experts": 3}),
        ("threshold", {"topk": 0, "threshold": 0.5}, {"threshold_max_experts": 0}),
        ("threshold", {"threshold": 0.5}, {}),
        ("topk", {"topk": 3, "threshold": 0.5}, {"topk": 3}),
    ],
)
def test_cap_of_old_threshold_runs_is_renamed(gate, options, migrated):
    content = {"version": 2, "moe": {"gate": gate}, "gate_options": options}
    expected = {gate: {"threshold": 0.5, **migrated}}
    assert migrate("run.json", content, "x")["gate_options"] == expected
    assert "topk" not in migrated or gate == "topk"


@pytest.mark.parametrize(
    ("gate", "name"), [("moepp", "num_constant_experts"), ("tcmoe", "num_null_experts")]
)
def test_automatic_numbers_of_old_runs_stay(gate, name):
    """0 meant a number that follows from other options; now -1 does, and 0 means none."""
    for stored, expected in ((0, -1), (2, 2), (False, False), ("x", "x")):
        options = {name: stored, "topk": 3}
        content = {"version": 2, "moe": {"gate": gate}, "gate_options": options}
        migrated = migrate("run.json", content, "x")["gate_options"]
        assert migrated == {gate: {name: expected, "topk": 3}}
        assert type(migrated[gate][name]) is type(stored)
        assert options[name] is stored
        other = {**content, "moe": {"gate": "topk"}}
        assert migrate("run.json", other, "x")["gate_options"] == {"topk": options}
        new = {**content, "version": 3}
        assert migrate("run.json", new, "x")["gate_options"] == options
    content = {"version": 2, "moe": {"gate": gate}, "gate_options": {"topk": 3}}
    assert migrate("run.json", content, "x")["gate_options"] == {gate: {"topk": 3}}


@pytest.mark.parametrize(
    ("gate", "options", "k"),
    [
        ("topk", {"topk": 6}, 6),
        ("topk", {}, 2),
        ("cosine", {"topk": 1}, 1),
        ("deepseek_v3", {}, 2),
        ("expert_choice", {"topk": 3}, 3),
        ("outside", {"topk": 7}, 7),
        ("outside", {}, 1),
        ("peer", {"peer_num_heads": 2, "peer_topk": 3}, 6),
        ("peer", {"peer_num_heads": 2, "peer_topk": 99}, 32),
        ("peer", {}, 128),
        ("threshold", {"topk": 8}, 1),
        ("moepp", {"topk": 2}, 1),
        ("hash", {}, 1),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 1, 1.25, 8.0])
def test_capacity_of_old_runs_stays(gate, options, k, factor):
    """Old: ceil(factor * T / E) rows. New: with k, and a factor that is divided by k."""
    moe = {
        "num_experts": 16,
        "gate": gate,
        "moe_train_capacity_factor": factor,
        "moe_min_capacity": 4,
    }
    content = {"version": 2, "moe": moe, "gate_options": options}
    migrated = migrate("run.json", content, "x")["moe"]
    assert migrated["moe_min_capacity"] == 4 and "moe_eval_capacity_factor" not in migrated
    new = migrated["moe_train_capacity_factor"]
    assert new == pytest.approx(factor / k) and (k > 1 or new is factor)
    for tokens, experts in itertools.product((1, 7, 96, 1000, 4096), (2, 6, 64)):
        rows = math.ceil(Fraction(factor) * tokens / experts)
        expected = min(tokens, max(4, rows)) if factor else None
        assert capacity_from_factor(tokens, experts, new, 4, k) == expected


@pytest.mark.parametrize("value", ["x", None, True, [1], 10**400])
@pytest.mark.parametrize("where", ["factor", "topk", "gate_options", "gate"])
def test_malformed_capacity_stays_as_it_is(value, where):
    """Types are checked after the migration, which must not fail at them."""
    moe = {"gate": "topk", "moe_train_capacity_factor": 2.0}
    options = {"topk": 4}
    if where == "factor":
        moe["moe_train_capacity_factor"] = value
    elif where == "gate":
        moe["gate"] = value
    elif where == "topk":
        options["topk"] = value
    else:
        options = value
    content = {"version": 2, "moe": moe, "gate_options": options}
    migrated = migrate("run.json", content, "x")
    factor = moe["moe_train_capacity_factor"]
    if where == "gate":
        factor = 0.5  # of a gate outside the tree with this option
    assert migrated["moe"]["moe_train_capacity_factor"] == factor
    if where == "gate_options":
        assert migrated["gate_options"] == options
    else:
        assert migrated["gate_options"] == {str(moe["gate"]): options}


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("moe", [{}, {"gate": "mass"}])
def test_options_of_old_runs_get_a_gate(version, moe):
    """Options are stored by gate from version 3 on; runs had one gate before."""
    run = {"moe": moe, "gate_options": {"topk": 3}}
    content = {"config": run} if version == 0 else run
    config = config_from_dict({**content, "version": version})
    assert config.gate_options == {moe.get("gate", "topk"): {"topk": 3}}
    with pytest.raises(ValueError, match=r"^x: gate_options.'topk' is 3; allowed: a JSON obj"):
        config_from_dict({**run, "version": 3}, "x")


def test_meaning_of_file_without_version_is_logged(tmp_path, caplog, monkeypatch):
    """It may be written by hand for the present version; nothing is logged where it is equal."""
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    moe = {"num_experts": 4, "moe_train_capacity_factor": 3.0}
    path = tmp_path / "hand.json"
    path.write_text(json.dumps({"moe": moe}), encoding="utf-8")
    migrated = load_config_json(path)["moe"]
    assert migrated["moe_aux_loss_reduction"] == "mean"
    assert migrated["moe_train_capacity_factor"] == 1.5
    (message,) = set(caplog.messages)
    assert "--moe-aux-loss-reduction mean, --moe-train-capacity-factor 1.5; if" in message
    caplog.clear()
    for content in ({"moe": moe, "version": FORMAT_VERSION}, {"model": {"num_layers": 2}}):
        path.write_text(json.dumps(content), encoding="utf-8")
        load_config_json(path)
    assert caplog.messages == []


def test_file_without_version_may_have_options_by_gate():
    """Only version 3 has them, so nothing else of the file is migrated either."""
    run = {"moe": {"num_experts": 4}, "gate_options": {"topk": {"topk": 3}}}
    config = config_from_dict(run)
    assert config == config_from_dict({**run, "version": 3})
    assert config.gate_options == {"topk": {"topk": 3}}
