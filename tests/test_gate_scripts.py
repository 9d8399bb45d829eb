"""Tests of the gate scripts in examples_deepspeed/MoE/gates: flags parse, model sizes agree."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from helpers.scripts import config_of, launch_command, run_script
from megatron.model.builder import build_model
from megatron.model.meta_device import meta_device
from megatron.model.parameter_count import count_parameters
from megatron.moe.gate import available_gates, gate_class
from megatron.parallel.groups import Groups

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "examples_deepspeed/MoE/gates"
SCALES = ("demo", "158m", "679m", "xmoe")


def dry_run(gate: str, folder: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a script under DRY_RUN; `echo` replaces Python, which would only print the model size."""
    fixed = {"PYTHON": "/bin/echo", "DRY_RUN": "1", "NUM_GPUS": "2"}
    return run_script(FOLDER / f"{gate}.sh", cwd=folder, **{**fixed, **env})


def config(gate: str, folder: Path, **env: str):
    done = dry_run(gate, folder, **env)
    assert done.returncode == 0, done.stderr
    return config_of(launch_command(done.stdout))


def size(config):
    with meta_device():
        model = build_model(
            config.model,
            config.moe,
            config.gate_options,
            vocab_size=8000,
            seed=0,
            groups=Groups(),
        )
    return count_parameters(model)


def test_every_gate_has_a_script():
    assert sorted(p.stem for p in FOLDER.glob("*.sh") if p.stem != "scale") == available_gates()


@pytest.mark.parametrize("gate", available_gates())
@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_builds_a_model(gate, scale, tmp_path):
    run = config(gate, tmp_path, SCALE=scale)
    moe = run.moe
    assert (moe.moe_train_capacity_factor, moe.moe_eval_capacity_factor) == (0, 0), "dropless"
    assert run.moe.gate == gate and run.moe.num_experts % run.moe.moe_expert_parallel_size == 0
    assert run.moe.moe_expert_parallel_size == 2, "two ranks share the experts"
    layers, hidden = {
        "demo": (6, 256),
        "158m": (16, 512),
        "679m": (18, 1024),
        "xmoe": (12, 768),
    }[scale]
    assert (run.model.num_layers, run.model.hidden_size) == (layers, hidden)
    got = size(run)
    if gate == "peer":
        assert run.moe.moe_layers == (layers // 2,) and run.moe.num_experts == (
            128**2 if scale == "demo" else 1024**2
        )
    elif scale == "158m":
        assert got.total - got.parts["embedding"] == pytest.approx(158e6 - 8000 * 512, rel=0.03)
    elif scale == "679m":
        assert got.total - got.parts["embedding"] == pytest.approx(
            679e6 - 8000 * 1024, rel=0.05
        )


@pytest.mark.parametrize("scale", SCALES)
def test_gates_have_equal_model_size(scale, tmp_path):
    """Gates are compared at equal total and, where the number of experts is fixed, active size.

    A token has LibMoE's 8 experts, or the demo's 4. PEER is another model.
    """
    top_k = size(config("topk", tmp_path, SCALE=scale))
    for gate in available_gates():
        if gate == "peer":
            continue
        run = config(gate, tmp_path, SCALE=scale)
        got, cls = size(run), gate_class(gate)
        assert got.total == pytest.approx(top_k.total, rel=0.03), (
            gate
        )  # 66 experts are 8.25 times 8
        most = cls.experts_per_token(cls.Config(**run.gate_options[gate]), run.moe.num_experts)[
            1
        ]
        if most < run.moe.num_experts:
            assert got.active_max == pytest.approx(top_k.active_max, rel=0.02), gate


@pytest.mark.parametrize("gate", ["threshold", "moepp", "topk"])
@pytest.mark.parametrize("scale", ["demo", "xmoe"])
def test_scripts_are_dropless_unless_asked(gate, scale, tmp_path):
    """Also where run.sh alone has the capacity of XMoE's recipe."""

    def factors(**env):
        moe = config(gate, tmp_path, SCALE=scale, **env).moe
        return moe.moe_train_capacity_factor, moe.moe_eval_capacity_factor

    default = {"threshold": 8.0, "moepp": 1.1}.get(gate, 1.25)
    assert factors() == (0, 0)
    assert factors(MOE_DROP_TOKEN="true") == (default, default)
    assert factors(MOE_TRAIN_CAP_FACTOR="2") == (2, 2)
    assert factors(MOE_EVAL_CAP_FACTOR="2") == (0, 2)


def test_environment_variables_override_scripts(tmp_path):
    run = config("topk", tmp_path, SCALE="158m", TOPK="3", EP_SIZE="32", NUM_LAYERS="4")
    assert (run.gate_options["topk"]["topk"], run.moe.num_experts, run.model.num_layers) == (
        3,
        32,
        4,
    )
    shared = config("deepseek_v3", tmp_path, SCALE="679m")
    assert (
        shared.moe.num_experts,
        shared.moe.moe_shared_experts,
        shared.gate_options["deepseek_v3"]["topk"],
    ) == (64, 2, 6)
    shared = config("topk", tmp_path, SHARED="1")
    assert (
        shared.moe.num_experts,
        shared.moe.moe_shared_experts,
        shared.gate_options["topk"]["topk"],
    ) == (15, 1, 3)
    done = dry_run("topk", tmp_path, SCALE="huge")
    assert (
        done.returncode == 2 and "SCALE is 'huge'; allowed: demo 158m 679m xmoe" in done.stderr
    )
