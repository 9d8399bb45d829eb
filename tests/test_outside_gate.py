"""A gate of an installed package and of a file, from training to a consolidated model.

No file of the repository knows it: it is trained with --gate-path, resumed and sampled from as an
installed package, and consolidated and inspected without its code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import runs
from helpers.outside_gates import restored_registry, write_gate
from helpers.spawn import free_port
from megatron.checkpoint.content import read_state
from megatron.moe.gate import available_gates

REPO = Path(__file__).resolve().parents[1]
PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "outside-demo"
version = "1.5"

[project.entry-points."moe_megatron.gates"]
outside_demo = "outside_demo.gate"

[tool.setuptools]
packages = ["outside_demo"]
"""
GATE = ("--gate", "outside_demo", "--shift", "1", "--moe-z-loss-coeff", "0.01")
NO_EVALUATION = ("--eval-iters", "0", "--split", "100,0,0")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Return the folder of a package's source."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    write_gate(folder, "outside_demo", file="outside_demo/gate.py")
    (folder / "outside_demo/__init__.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def site(project, tmp_path_factory) -> Path:
    """Return a folder that the package is installed into."""
    folder = tmp_path_factory.mktemp("site")
    install = "-m pip install --quiet --no-index --no-deps --no-build-isolation --target"
    done = subprocess.run(
        [sys.executable, *install.split(), str(folder), str(project)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def train_flags(data: str, out: Path, iterations: int, *more: str) -> list[str]:
    flags = [*runs.flags(data, out, iterations, *more), *NO_EVALUATION]
    return runs.with_gate(flags, *GATE)


def train_and_forget(argv: list[str]) -> None:
    """Train in a rank of the pool, which does not know the gate afterwards."""
    with restored_registry():
        runs.train(argv)


@pytest.fixture(scope="module")
def trained(data, project, ranks2, tmp_path_factory) -> Path:
    """Train two iterations with --gate-path on two ranks that share the experts."""
    out = tmp_path_factory.mktemp("trained")
    path = project / "outside_demo/gate.py"
    argv = train_flags(data, out, 2, *runs.EP2)
    ranks2.run(train_and_forget, [*argv, "--gate-path", str(path)])
    return out


def run_program(*words: object, site: Path) -> str:
    """Run a program with the package of a folder installed; return its output."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": f"{REPO}:{site}"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def resumed(data, site, trained, tmp_path_factory) -> tuple[Path, str]:
    """Resume with the installed package, two ranks that share no experts, and ZeRO 2."""
    out = tmp_path_factory.mktemp("resumed")
    argv = train_flags(data, out, 3, "--zero-stage", "2", "--override-lr-schedule")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port")
    load = ("--load", trained / "checkpoints")
    log = run_program(*launcher, free_port(), "pretrain_gpt.py", *argv, *load, site=site)
    return out / "checkpoints", log


def test_run_resumes_with_installed_package(resumed, trained):
    """At another expert-parallel size; the code is the same, so there is no warning."""
    checkpoints, log = resumed
    assert "iteration 3/3" in log and "WARNING the code of gate" not in log
    assert (checkpoints / "iter_0000003").is_dir()
    (row,) = [row for row in runs.metrics(checkpoints.parent) if row["iteration"] == 3]
    assert row["experts_per_token"] == 1.0 and row["moe_aux_loss"] > 0


def test_generation_warns_of_changed_code(resumed, site):
    """A comment was added to the installed file."""
    checkpoints, _ = resumed
    words = ("tools/generate_text.py", "--load", checkpoints, "--max-new-tokens", 3)
    file = site / "outside_demo/gate.py"
    text = file.read_text()
    file.write_text(f"{text}\n# changed\n")
    try:
        output = run_program(*words, "--temperature", 0, site=site)
    finally:
        file.write_text(text)
    (warning,) = [line for line in output.splitlines() if "WARNING" in line]
    assert "the code of gate outside_demo has changed since the checkpoint: " in warning
    assert f"{file} of the package outside-demo 1.5 has the SHA-256" in warning
    assert [line for line in output.splitlines() if line.startswith("| ")]


def test_tools_need_no_gate_code(resumed, trained, project, tmp_path, capsys, monkeypatch):
    """A consolidated model has the gate's tensors, and inspection its origin."""
    from tools import consolidate_checkpoint, inspect_checkpoint

    def run_tool(tool, *words):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
        assert tool.main() == 0
        return capsys.readouterr().out

    checkpoints, _ = resumed
    assert "outside_demo" not in available_gates()
    output = tmp_path / "model"
    run_tool(consolidate_checkpoint, checkpoints, output)
    tensors = load_file(output / "model.safetensors")
    gates = {name.partition(".gate.")[2] for name in tensors if ".gate." in name}
    assert gates == {"router.weight", "seen"}
    tokens = 3 * 8 * 32
    assert [float(t) for name, t in tensors.items() if name.endswith("seen")] == [tokens]
    shown = run_tool(inspect_checkpoint, checkpoints / "iter_0000003")
    assert "outside_demo  package  outside-demo 1.5  " in shown
    first = trained / "checkpoints/iter_0000002"
    shown = run_tool(inspect_checkpoint, first, checkpoints / "iter_0000003")
    assert "outside_demo.kind" in shown and "file -> package" in shown
    assert f"{project}/outside_demo/gate.py -> " in shown and "outside_demo.sha256" not in shown


def test_gates_of_both_kinds_share_a_model(data, project, ranks2, tmp_path):
    """A gate of a file in one layer and a built-in one in the other, with options of each."""
    layers = ("--num-layers", "3", "--expert-interval", "1")
    flags = [*runs.flags(data, tmp_path, 2, *runs.EP2), *NO_EVALUATION, *layers]
    options = ("--outside_demo.shift", "1", "--topk.topk", "3")
    gates = ("--gate", "outside_demo@0,topk@1,dense@2", *options)
    path = project / "outside_demo/gate.py"
    argv = [*runs.with_gate(flags, *gates), "--gate-path", str(path)]
    ranks2.run(train_and_forget, argv)
    (row,) = [row for row in runs.metrics(tmp_path) if row["iteration"] == 2]
    assert row["experts_per_token_by_layer"] == [1.0, 3.0]
    state = read_state(tmp_path / "checkpoints/iter_0000002")
    assert {name: gate["kind"] for name, gate in state["gates"].items()} == {
        "outside_demo": "file",
        "topk": "built-in",
    }


def generate_with_file(checkpoints, path):
    """Return what a rank that generates without the gate's file raises, and with it None."""
    from tools import generate_text

    words = ["--load", str(checkpoints), "--max-new-tokens", "2", "--prompt", "a"]
    errors = []
    for more in ([], ["--gate-path", str(path)]):
        error = None
        with restored_registry():
            try:
                generate_text.run(generate_text.parse([*words, *more]))
            except ValueError as raised:
                error = str(raised)
        errors.append(error)
    return errors


def test_generation_takes_a_copy_of_the_file(trained, project, ranks1, tmp_path):
    """Where the package is not installed; without it the error says what to give."""
    copy = tmp_path / "copy.py"
    copy.write_text((project / "outside_demo/gate.py").read_text())
    ((without, with_file),) = ranks1.run(generate_with_file, trained / "checkpoints", copy)
    assert "--gate-path" in without and with_file is None
