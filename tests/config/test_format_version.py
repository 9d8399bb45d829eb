"""Versions of the files of runs and checkpoints: older ones are migrated, newer ones refused."""

from __future__ import annotations

import json

import pytest

from helpers.fake_gates import parse
from megatron.config.format_version import (
    FORMAT_VERSION,
    MIGRATIONS,
    NewerVersionError,
    migrate,
    with_version,
)
from megatron.config.run_json import config_from_dict, read_run_json, run_json_text
from megatron.config.schema import ModelConfig, RunConfig


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
    monkeypatch.setattr("megatron.config.format_version.FORMAT_VERSION", 4)
    monkeypatch.setitem(MIGRATIONS, 2, {"a.json": lambda content: {**content, "seen": [2]}})
    monkeypatch.setitem(
        MIGRATIONS, 3, {"a.json": lambda content: {**content, "seen": [*content["seen"], 3]}}
    )
    for version, seen in (({}, [2, 3]), ({"version": 2}, [2, 3])):
        assert migrate("a.json", {"x": 1, **version}, "where") == {"x": 1, "seen": seen}
    assert migrate("a.json", {"x": 1, "version": 4}, "where") == {"x": 1}
    assert migrate("b.json", {"x": 1, "version": 2}, "where") == {"x": 1}


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
