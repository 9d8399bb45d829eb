"""Origin and hash of gates in checkpoints: changed code, missing code, and code of a path."""

import json
from dataclasses import asdict, replace

import pytest

from helpers import runs
from helpers.outside_gates import restored_registry, write_gate
from helpers.spawn import groups_for
from megatron.checkpoint.content import read_state
from megatron.checkpoint.gate_code import (
    describe_expert_types,
    describe_gates,
    require_known_gates,
    require_same_gates_on_ranks,
    warn_of_changed_gates,
)
from megatron.checkpoint.loader import find_checkpoint
from megatron.config.schema import CheckpointConfig, MoEConfig, RunConfig
from megatron.moe import ExpertType
from megatron.moe.gate_registry import (
    REGISTRY,
    GateOrigin,
    expert_type_origin,
    gate_origin,
    import_gate_files,
)
from megatron.parallel.groups import Groups

NO_EVALUATION = ("--eval-iters", "0", "--split", "100,0,0")
OUTSIDE = GateOrigin("file", "/folder/mine.py", "", "12" * 32)


def stored(origin: GateOrigin) -> dict[str, dict[str, str]]:
    return {"outside_a": asdict(origin)}


def test_checkpoint_records_built_in_gate(finished):
    state = read_state(finished / "checkpoints/iter_0000020")
    origin = gate_origin("threshold")
    assert state["gates"] == {"threshold": asdict(origin)} and len(origin.sha256) == 64

    assert list(state["expert_types"]) == ["mlp"]
    recorded = state["expert_types"]["mlp"]
    assert recorded == asdict(expert_type_origin("mlp")) and recorded["kind"] == "built-in"


def test_dense_run_records_no_gate():
    assert describe_gates(RunConfig(moe=MoEConfig(num_experts=0))) == {}
    assert describe_expert_types(RunConfig(moe=MoEConfig(num_experts=0))) == {}


EXPERTS = """\
from megatron.moe import ExpertType


class Mine(ExpertType, name="outside_experts"):
    pass
"""


def import_experts(path, text=EXPERTS):
    """Import an expert type from a file; its description."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with restored_registry():
        import_gate_files([str(path)])
        moe = MoEConfig(num_experts=4, expert_type="outside_experts")
        return describe_expert_types(RunConfig(moe=moe))


def test_changed_expert_type_is_one_warning(tmp_path, caplog):
    old = import_experts(tmp_path / "a/mine.py")
    origin = old["outside_experts"]
    assert (origin["kind"], origin["path"]) == ("file", str(tmp_path / "a/mine.py"))
    warn_of_changed_gates(old, import_experts(tmp_path / "b/mine.py"), "expert type")
    assert not caplog.messages
    changed = import_experts(tmp_path / "c/mine.py", f"{EXPERTS}# changed\n")
    warn_of_changed_gates(old, changed, "expert type")
    assert len(caplog.messages) == 1
    assert "the code of expert type outside_experts has changed" in caplog.messages[0]


def test_expert_type_of_a_program_is_a_module():
    """A program of the user imported it."""
    with restored_registry():

        class Mine(ExpertType, name="outside_experts"):
            pass

        origin = expert_type_origin("outside_experts")
    assert (origin.kind, origin.path) == ("module", __file__) and origin.sha256


def compare_expert_types(folder, names):
    """Import an expert type from this rank's own file, and compare it with the other rank's."""
    groups = groups_for(1)
    with restored_registry():
        import_gate_files([str(folder / names[groups.rank] / "mine.py")])
        moe = MoEConfig(num_experts=4, expert_type="outside_experts")
        try:
            require_same_gates_on_ranks(RunConfig(moe=moe), groups)
        except ValueError as error:
            return str(error)


def test_ranks_must_have_same_expert_type(ranks2, tmp_path):
    for name, text in (("d", EXPERTS), ("e", EXPERTS), ("f", f"{EXPERTS}# changed\n")):
        import_experts(tmp_path / name / "mine.py", text)
    assert ranks2.run(compare_expert_types, tmp_path, ("d", "e")) == [None, None]
    first, second = ranks2.run(compare_expert_types, tmp_path, ("d", "f"))
    assert first == second and "expert type 'outside_experts' differs between ranks" in first


@pytest.mark.parametrize(
    "origin, words",
    [
        (OUTSIDE, "of /folder/mine.py, which is not imported .*: give --gate-path with that"),
        (
            replace(OUTSIDE, kind="package", package="outside-demo 1.5"),
            "of /folder/mine.py of the package outside-demo 1.5, .*: install outside-demo 1.5, or",
        ),
        (GateOrigin("module"), "of a Python session, which is not imported"),
    ],
)
def test_missing_gate_is_refused(origin, words):
    with pytest.raises(ValueError, match=f"checkpoint x was made .* gate 'outside_a' {words}"):
        require_known_gates(stored(origin), "x")


def test_missing_gate_names_failed_entry_point(monkeypatch):
    monkeypatch.setitem(REGISTRY.failures, "outside_a", "the entry point failed")
    with pytest.raises(ValueError, match="never is\\): the entry point failed$"):
        require_known_gates(stored(OUTSIDE), "x")


def test_later_version_may_record_more():
    with pytest.raises(ValueError, match="of /folder/mine.py, which"):
        require_known_gates({"outside_a": {**asdict(OUTSIDE), "signature": "y"}}, "x")


def test_changed_code_is_one_warning(caplog):
    moved = replace(OUTSIDE, path="/elsewhere/mine.py")
    changed = replace(moved, sha256="34" * 32)
    for current in (OUTSIDE, moved, replace(moved, sha256="")):
        warn_of_changed_gates(stored(OUTSIDE), stored(current))
    warn_of_changed_gates({}, stored(OUTSIDE))
    assert not caplog.messages
    warn_of_changed_gates(stored(OUTSIDE), stored(changed))
    assert caplog.messages == [
        "the code of gate outside_a has changed since the checkpoint: /elsewhere/mine.py has the "
        "SHA-256 343434343434, and /folder/mine.py had 121212121212"
    ]


def compare_ranks(folder, names):
    """Import a gate from this rank's own file, and compare it with the other rank's."""
    groups = groups_for(1)
    path = folder / names[groups.rank] / "outside_rank.py"
    with restored_registry():
        import_gate_files([str(path)])
        config = RunConfig(moe=MoEConfig(num_experts=4, gate="outside_rank"))
        try:
            require_same_gates_on_ranks(config, groups)
        except ValueError as error:
            return str(error)


def test_ranks_must_have_same_code(ranks2, tmp_path):
    """Every rank raises: a node with another version of the file would train another model."""
    for name in ("a", "b"):
        write_gate(tmp_path / name, "outside_rank")
    write_gate(tmp_path / "c", "outside_rank", before="# changed\n")
    assert ranks2.run(compare_ranks, tmp_path, ("a", "b")) == [None, None]
    first, second = ranks2.run(compare_ranks, tmp_path, ("a", "c"))
    assert first == second and "'outside_rank' differs between ranks: " in first
    assert "on rank 0, and" in first and f"{tmp_path}/c/outside_rank.py" in second


def train_and_forget(argv):
    with restored_registry():
        runs.train(argv)


def find_error(checkpoints):
    """Return the error of a rank that loads a checkpoint."""
    try:
        find_checkpoint(CheckpointConfig(load=checkpoints), Groups(), required=True)
    except ValueError as error:
        return str(error)


def test_path_of_checkpoint_is_never_imported(data, ranks1, tmp_path):
    """The gate's file writes a file when it is imported."""
    mark = tmp_path / "imported"
    write = f"open({str(mark)!r}, 'a').close()\n"
    path = write_gate(tmp_path, "outside_mark", before=write)
    flags = [*runs.flags(data, tmp_path, 1), *NO_EVALUATION, "--gate-path", str(path)]
    argv = runs.with_gate(flags, "--gate", "outside_mark")
    checkpoints = tmp_path / "checkpoints"
    ranks1.run(train_and_forget, argv)
    assert mark.exists(), "the user's --gate-path is imported"
    mark.unlink()
    folder = checkpoints / "iter_0000001"
    assert json.loads((folder / "run.json").read_text())["moe"]["gate_path"] == [str(path)]
    (error,) = ranks1.run(find_error, str(checkpoints))
    assert error.startswith(
        f"checkpoint {folder} was made with the gate 'outside_mark' of {path}"
    )
    assert "(a path in a checkpoint never is)" in error and not mark.exists()
