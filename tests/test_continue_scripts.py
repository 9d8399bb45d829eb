"""examples_deepspeed/MoE/continue: from a Hugging Face folder to one that transformers runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import runs, scripts
from helpers.hf_folders import save_model

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "examples_deepspeed/MoE/continue"
MODEL_TYPES = {
    "mixtral": "mixtral",
    "qwen2_moe": "qwen2_moe",
    "deepseek": "deepseek_v2",
    "olmoe": "olmoe",
}


def run_script(name: str, out: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a script of the folder on the CPU for a few steps."""
    sizes = {"SEQ_LEN": "32", "GLOBAL_BATCH_SIZE": "4", "TRAIN_ITERS": "2", "EVAL_ITERS": "0"}
    variables = {**os.environ, "PYTHON": sys.executable, "OUTPUT_DIR": str(out), **sizes, **env}
    return subprocess.run(
        ["bash", str(FOLDER / f"{name}.sh")],
        env=variables,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def require_continued(name: str, data: str, tmp_path: Path, **env: str) -> None:
    """Train, export and generate by a script, and compare the export with its origin."""
    from transformers import AutoModelForCausalLM

    origin = save_model(tmp_path / "origin", MODEL_TYPES[name])
    variables = {"INIT_FROM_HF": str(origin), "DATA_PATH": data, "SPLIT": "100,0,0", **env}
    done = run_script(name, tmp_path / "out", PROMPT="the quick", **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "\nthe quick" in done.stdout
    assert [row["iteration"] for row in runs.metrics(tmp_path / "out")][-1] == 2
    exported = tmp_path / "out/hf-0000002"
    for file in ("config.json", "generation_config.json"):
        assert read_json(exported / file) == read_json(origin / file)
    before = AutoModelForCausalLM.from_pretrained(origin).state_dict()
    after = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert before.keys() == after.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert any("experts" in key for key in changed) and any("q_" in key for key in changed)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Write token ids below 256 as a .bin/.idx pair. Returns its prefix."""
    import numpy as np

    from megatron.data.indexed.writer import IndexedWriter

    prefix = str(tmp_path_factory.mktemp("data") / "tiny_text_document")
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(40):
            writer.add_document(generator.integers(1, 256, 100))
    return prefix


def test_mixtral_continues_on_two_ranks(shards, tmp_path):
    require_continued("mixtral", shards, tmp_path, NUM_GPUS="2", LR="1e-2", PRECISION="fp32")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_TYPES)
def test_families_continue_in_bf16(name, shards, tmp_path):
    require_continued(name, shards, tmp_path, NUM_GPUS="2", LR="1e-2", ZERO_STAGE="2")


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_missing_model_is_named(name, tmp_path):
    done = run_script(name, tmp_path / "out", INIT_FROM_HF="")
    assert done.returncode == 2
    assert f"{name}.sh: INIT_FROM_HF is empty; set it to the folder" in done.stderr
    done = run_script(name, tmp_path / "out", INIT_FROM_HF=str(tmp_path))
    assert done.returncode == 2
    assert "with the config.json of a Hugging Face model" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{oops", "whose config.json is not a JSON object"),
        ("[1]", "whose config.json is not a JSON object"),
        ('{"model_type": "llama"}', "has no experts; make an MoE model of it with"),
    ],
)
def test_unfit_config_is_one_line(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    out = tmp_path / "out"
    done = run_script("mixtral", out, INIT_FROM_HF=str(tmp_path), GATE="threshold")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("run.sh: ") and message in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({}, "runs/continue-origin"),
        ({"GATE": "threshold"}, "runs/continue-origin-threshold"),
        ({"NAME": "mine", "GATE": "threshold"}, "runs/mine"),
    ],
)
def test_runs_have_folders_by_name_and_gate(env, folder, tmp_path):
    """Another gate does not resume the run of the model's own; `false` replaces Python."""
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "config.json").write_text("{}")
    variables = {"INIT_FROM_HF": str(origin), "EP_SIZE": "4", "DRY_RUN": "1", **env}
    done = run_script("mixtral", Path(), PYTHON="/bin/false", **variables | {"OUTPUT_DIR": ""})
    assert f"--save {folder}/checkpoints" in done.stdout


def test_every_script_has_a_family():
    scripts = {path.stem for path in FOLDER.glob("*.sh")}
    assert scripts == {*MODEL_TYPES, "steps"}


@pytest.mark.parametrize(
    "config, experts",
    [
        ({"num_local_experts": 4}, "4"),
        ({"run": {"moe": {"num_experts": 6}}}, "6"),  # a folder of a model of ours
        ({"num_hidden_layers": 2}, None),
    ],
)
def test_experts_of_folder_are_sharded(config, experts, tmp_path):
    """run.sh divides the experts of the folder's config.json among the ranks."""
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    env = {"DRY_RUN": "1", "NUM_GPUS": "2", "INIT_FROM_HF": str(tmp_path)}
    # The command is printed before its flags are checked, which needs a complete config.json.
    done = scripts.run_script(FOLDER.parent / "run.sh", cwd=tmp_path, **env)
    words = scripts.launch_command(done.stdout)
    assert words[words.index("--init-from-hf") + 1] == str(tmp_path)
    if experts is None:
        assert "--num-experts" not in words
        return
    assert words[words.index("--num-experts") + 1] == experts
    assert words[words.index("--moe-expert-parallel-size") + 1] == "2"
    assert "--gate" not in words and "--hidden-size" not in words
