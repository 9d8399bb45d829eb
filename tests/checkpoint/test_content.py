"""Content of the JSON files of a checkpoint, value by value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import handmade
from megatron.checkpoint.content import (
    read_config,
    read_shard_index,
    read_state,
    with_typed_gate_options,
)
from megatron.checkpoint.manifest import CorruptCheckpointError
from megatron.config.format_version import FORMAT_VERSION


@pytest.fixture
def made(tmp_path) -> Path:
    """Return a checkpoint of one tensor on two ranks."""
    return handmade.checkpoint(tmp_path, handmade.weights(a=(6,)), 2)


def change(file: Path, path: str, value: object) -> None:
    """Set a value of a JSON file; `path` is its keys, joined by points."""
    content = json.loads(file.read_text())
    container = content
    *parents, last = path.split(".")
    for key in parents:
        container = container[int(key) if isinstance(container, list) else key]
    container[int(last) if isinstance(container, list) else last] = value
    file.write_text(json.dumps(content))


def test_valid_files_are_returned_as_stored(made):
    state = json.loads((made / "state.json").read_text())
    assert {"version": FORMAT_VERSION, **read_state(made)} == state
    index = json.loads((made / "index.json").read_text())
    assert {"version": FORMAT_VERSION, **read_shard_index(made)} == index
    assert read_config(made) == handmade.CONFIG


def test_unknown_keys_of_state_are_kept(made):
    change(made / "state.json", "optimizer.note", "x")
    assert read_state(made)["optimizer"]["note"] == "x"


@pytest.mark.parametrize(
    "path, value",
    [
        ("optimizer.counters", {}),
        ("optimizer.counters.global_steps", "3"),
        ("optimizer.steps", True),
        ("optimizer.scaler", {"cur_scale": float("nan")}),
        ("optimizer.scaler", []),
        ("topology.ranks", 0),
        ("topology.ranks", "two"),
        ("progress.iteration", -1),
        ("progress.consumed_tokens", 2**63),
        ("progress.iteration", 1.0),
        ("identity", None),
        ("identity.tokenizer_vocab_size", "257"),
        ("data", {"corpus": []}),
        ("global_batch_size", 10**400),
        ("saved_at", 3),
        ("versions", {"torch": None}),
    ],
)
def test_wrong_value_of_state_is_named(path, value, made):
    change(made / "state.json", path, value)
    with pytest.raises(
        CorruptCheckpointError, match=f"state.json: the value of '{path}.*wrong"
    ):
        read_state(made)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("tensors.a.pieces.0.0", "zero", r"'tensors\.a\.pieces\.0\.0' is missing or wrong"),
        ("tensors.a.pieces.0", [0, 0], r"'tensors\.a\.pieces\.0' is missing or wrong"),
        ("tensors.a.pieces", [[0, 0, 3]], "no file has element 3 of 'a'"),
        (
            "tensors.a.pieces",
            [[0, 0, 3], [1, 2, 4]],
            "no file has element 3 of 'a', or several",
        ),
        ("tensors.a.pieces", [[0, 0, 3], [1, 4, 2]], "no file has element 3 of 'a'"),
        ("tensors.a.pieces", [[0, 0, 6], [0, 0, 6]], "no file has element 6 of 'a', or sev"),
        ("tensors.a.shape", [7], "no file has element 6 of 'a'"),
        ("tensors.a.shape", [2**62] * 64, "no file has element 6 of 'a'"),
        ("tensors.a.shape", [1] * 65, "should have at most 64 items"),
        (
            "kinds",
            ["exp_avg"],
            r"kinds is \['exp_avg'\]; allowed: different names with 'weight'",
        ),
        ("kinds", ["weight", "weight"], "allowed: different names"),
        ("kinds", ["weight", "a/b"], r"'kinds\.1' is missing or wrong"),
        ("buffers", ["a"], "two tensors have the same name"),
        ("buffers", ["__metadata__"], "or a reserved one"),
    ],
)
def test_wrong_value_of_index_is_named(path, value, message, made):
    change(made / "index.json", path, value)
    with pytest.raises(CorruptCheckpointError, match=rf"index\.json.*{message}"):
        read_shard_index(made)


@pytest.mark.parametrize(
    "name, read", [("state.json", read_state), ("index.json", read_shard_index)]
)
def test_other_json_is_refused(name, read, made):
    (made / name).write_text('["' + "x" * 5000 + '"]')
    with pytest.raises(
        CorruptCheckpointError, match=r"5004 characters\); allowed: a JSON object"
    ):
        read(made)


def test_gate_options_have_types_of_the_gate(made):
    change(made / "run.json", "gate_options.threshold.threshold", 1)
    typed = with_typed_gate_options(read_config(made), made)
    assert type(typed.gate_options["threshold"]["threshold"]) is float
    for name, value, message in (
        ("threshold", "high", "threshold is 'high'; allowed: a finite number"),
        ("unknown", 3, "unknown key 'gate_options.threshold.unknown'"),
    ):
        change(made / "run.json", f"gate_options.threshold.{name}", value)
        with pytest.raises(ValueError, match=f"run.json: .*{message}"):
            with_typed_gate_options(read_config(made), made)
        change(made / "run.json", f"gate_options.threshold.{name}", 0.5)
    change(made / "run.json", "moe.gate", "nothing")
    with pytest.raises(
        ValueError, match="gate_options is .*; allowed: options by gate, of not"
    ):
        read_config(made)
    change(made / "run.json", "gate_options", {})
    with pytest.raises(ValueError, match="--gate is 'nothing'; allowed: base"):
        with_typed_gate_options(read_config(made), made)


@pytest.mark.parametrize(
    "path, message",
    [
        ("progress.iteration", "the iteration is 99, but 3 in the manifest"),
        ("optimizer.steps", "the optimizer has taken 99 steps in 3 iterations"),
    ],
)
def test_contradicting_counts_are_refused(path, message, made):
    assert read_state(made)["progress"]["iteration"] == 3
    change(made / "state.json", path, 99)
    with pytest.raises(CorruptCheckpointError, match=message):
        read_state(made)
